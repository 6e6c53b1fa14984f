"""``cli.py verdict``: many victims, compared."""
