"""The page in the browser, for people who read no code. Imports nothing heavy: what computes is ``cli.py``."""
