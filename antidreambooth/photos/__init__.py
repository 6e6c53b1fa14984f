"""Photos in, cloaked photos out."""
