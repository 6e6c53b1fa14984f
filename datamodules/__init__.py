"""Photos in."""

from datamodules.protection import Protection
from datamodules.subject import Subject

__all__ = ["Protection", "Subject"]
