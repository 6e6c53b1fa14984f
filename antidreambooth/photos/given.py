"""Photos that a program hands over: paths, Pillow images, arrays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import Photo, decode, flatten, read, square
from antidreambooth.photos.original import original_of, read_original
from antidreambooth.photos.whole import Wanted, WholePhoto, whole
from antidreambooth.provenance import require_originals

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]  # an array is h w 3, in sRGB
KINDS = "a path, a Pillow image, or an array of uint8 with h w 3 values"


def squares(given: object, what: str, side: int, again: bool) -> list[Photo]:
    """Photos as centred squares: upright, in sRGB, 8 bits. One at a time is in memory at its own size.

    Args:
        given: what the caller calls photos; meant to be an iterable of ``Picture``.
        what: the caller's word for them, for messages.
        side: of the squares, in pixels.
        again: whether files may be given that a run of this project has cloaked.

    Raises:
        InputError: it is no list of photos, or one cannot be used; the message says which one.
    """
    photos = []
    for number, (name, one) in enumerate(_each(given, what, again)):
        image = decode(one, name) if isinstance(one, bytes) else flatten(one, name)
        pixels, box = square(image, side)
        photos.append(Photo(Path(), f"image {number}", "", image.size, box, pixels))
    return photos


def wholes(given: object, what: str, again: bool, how: Wanted) -> list[WholePhoto]:
    """Photos that come back at their own size; of files the bytes are kept, and not the pixels.

    Args:
        given: what the caller calls photos; meant to be an iterable of ``Picture``.
        what: the caller's word for them, for messages.
        again: whether files may be given that a run of this project has cloaked.
        how: what is kept of them.

    Raises:
        InputError: it is no list of photos, or one cannot be used; the message says which one.
    """
    photos = []
    for number, (name, one) in enumerate(_each(given, what, again)):
        opened = partial(read_original, one, name) if isinstance(one, bytes) else partial(original_of, one, name)
        (mask,) = how.masks([Path(name.rpartition(": ")[2] if isinstance(one, bytes) else f"image {number}")])
        photos.append(whole(opened(), Path(), f"image {number}", "", opened, how, mask))
    return photos


def _each(given: object, what: str, again: bool) -> Iterator[tuple[str, bytes | Image.Image]]:
    """What messages call each photo; of a file its bytes, or else the picture that the caller has opened.

    Raises:
        InputError: it is no list of photos, or one cannot be used.
    """
    one = isinstance(given, str | bytes | os.PathLike | Image.Image)
    if one or (isinstance(given, np.ndarray) and given.ndim in (2, 3)):
        raise InputError(f"{what} are a list: put the one photo into brackets, {what}=[photo]")
    if not isinstance(given, Iterable):
        raise InputError(f"{what} are a list of photos, each of them {KINDS}: got {described(given)}")
    count = 0
    for item in given:
        name = f"{what}[{count}]"
        count += 1
        if isinstance(item, str | os.PathLike):
            name = f"{name}: {Path(item)}"
            yield name, _read(Path(item), name, again)
        else:
            yield name, _picture(item, name)
    if not count:
        raise InputError(f"{what} are empty: there is nothing to work on")


def described(value: object) -> str:
    """What something is, in a few words for a message; of an object its class, as it may say much of itself."""
    return str(value) if value is None or isinstance(value, int | float) else f"of class {type(value).__name__}"


def _picture(item: Any, name: str) -> Image.Image:
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[-1] != 3:
            raise InputError(f"{name} is an array of {item.dtype} with shape {item.shape}: give {KINDS}")
        item = Image.fromarray(np.ascontiguousarray(item))
    if not isinstance(item, Image.Image):
        raise InputError(f"{name} is {described(item)}: give {KINDS}")
    if 0 in item.size:
        raise InputError(f"{name} has no pixels: it is {item.width} by {item.height}")
    return item


def _read(path: Path, name: str, again: bool) -> bytes:
    """A file's bytes; ``name`` is what messages call it."""
    with suppress(RuntimeError):  # ~nobody stays as it is, and does not exist
        path = path.expanduser()
    if path.is_dir():
        folder = f"give its photos, such as *sorted(Path({str(path)!r}).glob('*.jpg'))"
        raise InputError(f"{name} is a folder: {folder}")
    try:
        data = read(path)
        if not again:
            advice = "give the original, or cloak it once more with again=True"
            require_originals([(path, hashlib.sha256(data).hexdigest())], advice)
    except InputError as error:
        raise InputError(f"{name.partition(': ')[0]}: {error}") from error
    return data
