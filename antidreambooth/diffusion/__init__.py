"""What a base model is."""
