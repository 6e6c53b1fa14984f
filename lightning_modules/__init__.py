"""Phases and hooks: how Lightning runs the engine's rounds and steps."""

from lightning_modules.aspl import ASPL
from lightning_modules.cloaking import Cloaking
from lightning_modules.fsmg import FSMG
from lightning_modules.metacloak import MetaCloak
from lightning_modules.pretraining import Pretraining
from lightning_modules.running.atomic_checkpoint import AtomicCheckpointIO
from lightning_modules.running.strategies import DDP, FSDP2, DeepSpeed
from lightning_modules.running.tensorboard_log import TensorBoardLog
from lightning_modules.victim import Victim

__all__ = [
    "ASPL",
    "DDP",
    "FSDP2",
    "FSMG",
    "AtomicCheckpointIO",
    "Cloaking",
    "DeepSpeed",
    "MetaCloak",
    "Pretraining",
    "TensorBoardLog",
    "Victim",
]
