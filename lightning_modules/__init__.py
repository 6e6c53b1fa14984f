"""Phases and hooks: how Lightning runs the engine's rounds."""

from lightning_modules.aspl import ASPL
from lightning_modules.atomic_checkpoint import AtomicCheckpointIO
from lightning_modules.cloaking import Cloaking

__all__ = ["ASPL", "AtomicCheckpointIO", "Cloaking"]
