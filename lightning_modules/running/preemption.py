"""Being told to go: a checkpoint when the round is whole, and back into the queue."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger("antidreambooth")
# A kill; SLURM's warning as set up here; submitit's. Windows knows the first one only.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


class Preemption:
    """Notes that a signal came; what follows waits for the end of the round or step.

    Lightning's own handlers write a checkpoint at once, in the middle of a round: with weights that are borrowed, and
    on one rank while the others compute.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def arm(self) -> None:
        """From now on."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def disarm(self) -> None:
        """The handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def leave_if_asked(self, trainer: Trainer) -> None:
        """Ends the run after writing a checkpoint, if a signal came to any rank; all ranks have to ask.

        Raises:
            SIGTERMException: it did.
        """
        if not trainer.strategy.reduce_boolean_decision(self.received, all=False):
            return
        kept = trainer.checkpoint_callback
        if isinstance(kept, ModelCheckpoint) and kept.dirpath is not None:
            path = os.path.join(kept.dirpath, "last.ckpt")  # noqa: PTH118 (may be on another file system)
            trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            log.warning("told to stop: what there is is written%s", (kept and "; go on with --ckpt_path last") or "")
            requeue()
        raise SIGTERMException(128 + signal.SIGTERM)


def requeue() -> None:
    """Puts this job back into SLURM's queue, unless whoever started it does so: submitit has its own way."""
    number = os.environ.get("SLURM_JOB_ID")
    if not number or os.environ.get("SUBMITIT_EXECUTOR") or os.environ.get("SLURM_JOB_NAME") == "interactive":
        return
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    command = [shutil.which("scontrol") or "scontrol", "requeue", f"{array}_{task}" if array else number]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        log.warning("SLURM does not requeue this job (%s): submit it again", done.stderr.strip())
