"""Photos in, batches out."""

from datamodules.protection import Protection

__all__ = ["Protection"]
