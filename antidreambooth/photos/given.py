"""Photos that a program hands over: paths, Pillow images, arrays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import decode, flatten, read
from antidreambooth.provenance import require_originals

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]  # an array is h w 3, in sRGB
KINDS = "a path, a Pillow image, or an array of uint8 with h w 3 values"


def pictures(given: object, what: str, again: bool) -> list[Image.Image]:
    """Photos as ``decode`` gives them: upright, in sRGB, 8 bits; mode RGB.

    Args:
        given: what the caller calls photos; meant to be an iterable of ``Picture``.
        what: the caller's word for them, for messages.
        again: whether files may be given that a run of this project has cloaked.

    Raises:
        InputError: it is no list of photos, or one cannot be used; the message says which one.
    """
    one = isinstance(given, str | os.PathLike | Image.Image) or (isinstance(given, np.ndarray) and given.ndim == 3)
    if one:
        raise InputError(f"{what} are a list: put the one photo into brackets, {what}=[photo]")
    if not isinstance(given, Iterable):
        raise InputError(f"{what} are a list of photos, each of them {KINDS}: got {given!r}")
    found = [_picture(item, f"{what}[{number}]", again) for number, item in enumerate(given)]
    if not found:
        raise InputError(f"{what} are empty: there is nothing to work on")
    return found


def _picture(item: Any, name: str, again: bool) -> Image.Image:
    if isinstance(item, str | os.PathLike):
        path = Path(item).expanduser()
        data = read(path)
        if not again:
            advice = "give the original, or cloak it once more with again=True"
            require_originals([(path, hashlib.sha256(data).hexdigest())], advice)
        return decode(data, str(path))
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[-1] != 3:
            raise InputError(f"{name} is an array of {item.dtype} with shape {item.shape}: give {KINDS}")
        item = Image.fromarray(np.ascontiguousarray(item))
    if not isinstance(item, Image.Image):
        raise InputError(f"{name} is {item!r}: give {KINDS}")
    if 0 in item.size:
        raise InputError(f"{name} has no pixels: it is {item.width} by {item.height}")
    try:
        return flatten(item, name)
    except InputError as error:
        if "closed image" in str(error.__cause__):  # Pillow's words
            raise InputError(f"{name} is closed: give it before it is closed, or give its path") from error
        raise
