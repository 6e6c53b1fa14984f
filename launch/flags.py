"""Flags as a user types them: what an error calls an argument, and numbers that no class of ours is given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace

from antidreambooth.diffusion.seeding import require_seed
from antidreambooth.errors import InputError, Number, OutOfRangeError, causes, require

AT_LEAST = {  # numbers of Lightning's that it would take, or refuse with a traceback
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.log_every_n_steps": 0,
    "trainer.num_nodes": 1,
    "checkpoint.every_n_epochs": 0,
    "checkpoint.every_n_train_steps": 0,
    "checkpoint.save_top_k": -1,
}


@contextmanager
def named(settings: Namespace) -> Iterator[None]:
    """Inside, a number out of range is called by its flag.

    Args:
        settings: of the command, as they were parsed.

    Raises:
        InputError: a number is out of range; its owner knows what it calls it, not where on a command line that is.
    """
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, OutOfRangeError) and (flag := flag_of(cause, settings)):
                raise InputError(f"--{flag} {cause.reason}") from error
        raise


def flag_of(error: OutOfRangeError, settings: Namespace) -> str | None:
    """The flag that gave a number; None where no flag did, but a base model's own defaults, say."""
    for flag, value in numbers(settings):
        same = value == error.value or (math.isnan(value) and math.isnan(error.value))
        if same and flag.rpartition(".")[2] == error.name:
            return flag
    return None


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Number]]:
    """All numbers of some settings, with their flags; those in a list have the list's."""
    if isinstance(value, Namespace | dict):
        for key, item in (value if isinstance(value, dict) else vars(value)).items():
            # What a class is given follows the class's own name on the command line.
            yield from numbers(item, name if key == "init_args" else f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def require_numbers(settings: Namespace) -> None:
    """Refuses numbers of a run that no class of ours is given.

    Raises:
        OutOfRangeError: the seed, or one of Lightning's numbers, is out of range.
    """
    for flag, value in numbers(settings):
        if flag == "seed_everything":
            require_seed(f"--{flag}", int(value))
        elif flag in AT_LEAST:
            require(f"--{flag}", value, AT_LEAST[flag])
