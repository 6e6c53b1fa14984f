"""Errors that are the user's to mend are shown as one line; all others keep their traceback.

An error is translated only where its cause is known, at the place where it happens: a full disk where a file is
written, a dead network where something is downloaded, a truncated photo where the decoder says so.
``ANTIDREAMBOOTH_DEBUG=1`` in the environment shows the traceback of translated errors, too.
"""

from __future__ import annotations

from collections.abc import Iterator

DEBUG = "ANTIDREAMBOOTH_DEBUG"


class InputError(Exception):
    """Something the user gave cannot be used; the message names it and the fix."""


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
