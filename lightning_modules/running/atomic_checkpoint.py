"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from antidreambooth.files import writing

ADVICE = "an older one there is untouched: make room and go on with --ckpt_path last"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old checkpoint and renames.

    Lightning's own goes through the system's temporary folder: where that is another disk, a kill in the middle of the
    copy leaves half a checkpoint; and it holds two more copies in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves; an older checkpoint at ``path`` stays whole until the new one is on the disk.

        Raises:
            InputError: the disk is full or the folder not writable.
        """
        target = Path(path)
        # What a kill leaves is removed when the next run begins in the folder.
        temporary = target.with_name(f".{secrets.token_hex(8)}.part")
        with writing(target, ADVICE):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            except BaseException:
                with suppress(OSError):  # what went wrong is what counts, such as a file where the folder should be
                    temporary.unlink(missing_ok=True)
                raise
