"""Whether a folder can take what a run will write."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lightning import Trainer

from antidreambooth.errors import InputError

FIX = "choose another folder with --trainer.default_root_dir"


def for_all_ranks(trainer: Trainer, check: Callable[[], None]) -> None:
    """Lets the first rank check something and ends all of them where that fails.

    The others would else wait for the first one, on GPUs for half an hour.

    Raises:
        InputError: what the check said.
    """
    refusal: InputError | None = None
    if trainer.is_global_zero:
        try:
            check()
        except InputError as error:
            refusal = error
    if trainer.world_size > 1:
        told = trainer.strategy.broadcast(refusal and str(refusal))
        refusal = refusal or (InputError(told) if told else None)
    if refusal is not None:
        raise refusal


def require_writable(folder: Path) -> None:
    """Creates the folder and a file in it, which is gone again at once.

    Raises:
        InputError: that does not work.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise InputError(f"nothing can be written to {folder}: {error.strerror}; {FIX}") from error


def require_room(folder: Path, needed: int) -> None:
    """Looks for ``needed`` bytes on the folder's disk.

    Raises:
        InputError: there are fewer.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the disk of {folder} has {free / 2**20:.0f} MiB free, this run needs about {needed / 2**20:.0f} MiB: "
            f"make room, or {FIX}"
        )
