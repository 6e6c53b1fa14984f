"""Photos in."""

from datamodules.captioned import Captioned
from datamodules.protection import Protection
from datamodules.subject import Subject

__all__ = ["Captioned", "Protection", "Subject"]
