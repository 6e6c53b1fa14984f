"""``cli.py fragility``: how far the autoencoder of a base model can be fooled."""
