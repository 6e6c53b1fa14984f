"""Photos that a program hands over: paths, Pillow images, arrays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import decode, flatten, read, square
from antidreambooth.provenance import require_originals

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]  # an array is h w 3, in sRGB
KINDS = "a path, a Pillow image, or an array of uint8 with h w 3 values"


def squares(given: object, what: str, side: int, again: bool) -> list[UInt8[Tensor, "3 h w"]]:
    """Photos as centred squares: upright, in sRGB, 8 bits. One at a time is in memory at its own size.

    Args:
        given: what the caller calls photos; meant to be an iterable of ``Picture``.
        what: the caller's word for them, for messages.
        side: of the squares, in pixels.
        again: whether files may be given that a run of this project has cloaked.

    Raises:
        InputError: it is no list of photos, or one cannot be used; the message says which one.
    """
    one = isinstance(given, str | bytes | os.PathLike | Image.Image)
    if one or (isinstance(given, np.ndarray) and given.ndim in (2, 3)):
        raise InputError(f"{what} are a list: put the one photo into brackets, {what}=[photo]")
    if not isinstance(given, Iterable):
        raise InputError(f"{what} are a list of photos, each of them {KINDS}: got {described(given)}")
    found = [square(_picture(item, f"{what}[{n}]", again), side)[0] for n, item in enumerate(given)]
    if not found:
        raise InputError(f"{what} are empty: there is nothing to work on")
    return found


def described(value: object) -> str:
    """What something is, in a few words for a message; of an object its class, as it may say much of itself."""
    return str(value) if value is None or isinstance(value, int | float) else f"of class {type(value).__name__}"


def _picture(item: Any, name: str, again: bool) -> Image.Image:
    if isinstance(item, str | os.PathLike):
        try:
            return _read(Path(item), again)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[-1] != 3:
            raise InputError(f"{name} is an array of {item.dtype} with shape {item.shape}: give {KINDS}")
        item = Image.fromarray(np.ascontiguousarray(item))
    if not isinstance(item, Image.Image):
        raise InputError(f"{name} is {described(item)}: give {KINDS}")
    if 0 in item.size:
        raise InputError(f"{name} has no pixels: it is {item.width} by {item.height}")
    return flatten(item, name)


def _read(path: Path, again: bool) -> Image.Image:
    with suppress(RuntimeError):  # ~nobody stays as it is, and does not exist
        path = path.expanduser()
    if path.is_dir():
        raise InputError(f"{path} is a folder: give its photos, such as *sorted(Path({str(path)!r}).glob('*.jpg'))")
    data = read(path)
    if not again:
        advice = "give the original, or cloak it once more with again=True"
        require_originals([(path, hashlib.sha256(data).hexdigest())], advice)
    return decode(data, str(path))
