"""One file for each family of base models."""
