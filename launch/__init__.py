"""What runs many fits."""
