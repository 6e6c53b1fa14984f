"""What several runs of one process share: made for the first one, copied for the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

T = TypeVar("T")
_kept: ContextVar[dict[Hashable, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def kept_in_memory() -> Iterator[None]:
    """Inside, base models are read and class images encoded once; it costs their size in memory once more."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def remembered(key: Callable[[], Hashable], make: Callable[[], T]) -> T:
    """What ``make`` gives; inside ``kept_in_memory`` it is made once for a key, and everybody gets a copy of their own.

    Args:
        key: tells what is the same; not called outside, as it may have to hash a model.
        make: gives something that can be deep-copied; the copy computes the same to the bit.
    """
    kept = _kept.get()
    if kept is None:
        return make()
    name = key()
    if name not in kept:
        kept[name] = make()
    return cast(T, copy.deepcopy(kept[name]))
