"""Errors that are the user's to mend are shown as one line; all others keep their traceback.

An error is translated only where its cause is known, at the place where it happens: a full disk where a file is
written, a dead network where something is downloaded, a truncated photo where the decoder says so.
``ANTIDREAMBOOTH_DEBUG=1`` in the environment shows the traceback of translated errors, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

DEBUG = "ANTIDREAMBOOTH_DEBUG"
Number = int | float  # types are checked in tests, where an int is no float


class InputError(Exception):
    """Something the user gave cannot be used; the message names it and the fix."""


class OutOfRangeError(InputError):
    """A number that nothing can be done with; whoever knows the command line puts the flag before ``reason``.

    Args:
        name: of the argument.
        value: what was given.
        allowed: which numbers are, in words.
    """

    def __init__(self, name: str, value: Number, allowed: str) -> None:
        self.name, self.value, self.reason = name, value, f"is {allowed}: got {value}"
        super().__init__(f"{name} {self.reason}")


def require(
    name: str,
    value: Number | None,
    least: Number | None = None,
    most: Number | None = None,
    *,
    above: Number | None = None,
    below: Number | None = None,
    unit: str = "",
) -> None:
    """Refuses a number out of its range, when it is given and not by a library later; NaN and infinity are in none.

    Args:
        name: of the argument, as its owner calls it.
        value: None passes: it means that nothing was given.
        least: the smallest number that is allowed.
        most: the largest one.
        above: instead of ``least``, a number that is just too small.
        below: instead of ``most``, a number that is just too large.
        unit: what the number counts, as it ends the message, such as ``in 8-bit steps``.

    Raises:
        OutOfRangeError: it is; the message says what is allowed.
    """
    if value is None:
        return
    bounds = (
        least is None or value >= least,
        most is None or value <= most,
        above is None or value > above,
        below is None or value < below,
    )
    if math.isfinite(value) and all(bounds):
        return
    if least is not None and most is not None:
        allowed = f"from {least} to {most}"
    else:
        low = f"{least} or more" if least is not None else f"above {above}" if above is not None else ""
        high = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
        allowed = " and ".join(filter(None, (low, high))) or "a finite number"
    raise OutOfRangeError(name, value, f"{allowed} {unit}" if unit else allowed)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from (``raise ... from``), and so on.

    What was merely being handled at the time (``__context__``) is not followed: an error of ours that happens while
    another one is handled is still ours.
    """
    while error is not None:
        yield error
        error = error.__cause__


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
