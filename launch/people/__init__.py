"""``cli.py people``: a folder of people, each cloaked by a run of their own."""
