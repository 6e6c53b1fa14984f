"""Cloaked photos back to files: their names, their numbers within the budget, everything else as it was."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import chain, count
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from torch import Tensor

from antidreambooth.errors import InputError, require
from antidreambooth.files import write_atomically
from antidreambooth.photos import exif
from antidreambooth.photos.encoding import LONGEST, Content, encoded
from antidreambooth.photos.metadata import Metadata
from antidreambooth.photos.original import ROWS, Original, read_original, turn_back

# Formats that come back as they came, and how their files may be called; all others cannot be written without loss,
# or not with a profile.
_SUFFIXES = {"PNG": (".png",), "TIFF": (".tif", ".tiff"), "WEBP": (".webp",), "BMP": (".bmp",)}
_SUFFIXES_OF_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")


@dataclass(frozen=True)
class Delivery:
    """How a cloaked photo is written.

    Args:
        format: own: as it came where that is lossless, PNG otherwise. png, webp (lossless), jpeg: as that, where the
            photo fits into it, and PNG otherwise. JPEG does not keep the budget.
        quality: of JPEG, 98 to 100; its colours are never at half the resolution.
        keep_orientation: store the pixels as the file stored them, with its orientation tag; upright otherwise.
        keep_metadata: keep all metadata that is no second picture: location, names and serial numbers, too.
    """

    format: Literal["own", "png", "webp", "jpeg"] = "own"
    quality: int = 100
    keep_orientation: bool = False
    keep_metadata: bool = False

    def __post_init__(self) -> None:
        """Refuses what is no quality.

        Raises:
            InputError: it is not from 98 to 100.
        """
        require("quality", self.quality, 98, 100, unit="for JPEG")


@dataclass(frozen=True)
class Delivered:
    """A cloaked photo's file, read back and compared with the original."""

    data: bytes = field(repr=False)
    suffix: str  # of its name
    largest: int  # difference of a number from the original's, in 8-bit steps, rounded up
    over: float  # share of the numbers that differ by more than the budget: 0 but for JPEG
    removed: tuple[str, ...]  # what the original's file holds and this does not, in plain words
    back: Original = field(repr=False)  # the file, as it was read back


def deliver(
    original: Original, change: Integer[np.ndarray, "h w 3"], budget: float | Float[np.ndarray, "h w"], how: Delivery
) -> Delivered:
    """Writes a photo with its change, and reads it back.

    A number of 16 bits changes by 256 for each step; nothing changes where alpha is 0; grey changes by the mean of the
    three channels, rounded toward zero.

    Args:
        original: the photo.
        change: of each number, upright, in 8-bit steps.
        budget: largest change, in 8-bit steps; 12.7 allows 12. One for all pixels, or each one's own.
        how: in which format, and what is kept.

    Raises:
        ValueError: ``change`` is of another size, or oversteps the budget.
        RuntimeError: the file does not hold what was written to it; a mistake of this module, or of a library.
    """
    if change.shape[:2] != original.numbers.shape[:2]:
        raise ValueError(f"the change of {original.name} is {change.shape}, the photo {original.numbers.shape}")
    kind, lies = delivered_format(original, how), original.turned if how.keep_orientation else 1
    metadata = _metadata(original, how, kind, lies)
    data = encoded(_content(original, change, how, kind, metadata), kind)
    back = read_original(data, original.name)
    largest, over = _differences(original, change, back, budget, exact=kind != "JPEG")
    return Delivered(data, delivered_suffix(original, how), largest, over, metadata.removed, back)


def delivered_format(original: Original, how: Delivery) -> str:
    """Pillow's name of the format in which a photo comes back."""
    wanted = original.format if how.format == "own" else how.format.upper()
    deep, clear = original.numbers.dtype != np.uint8, original.alpha is not None
    fits = max(original.size) <= LONGEST.get(wanted, max(original.size))
    named_grey = original.numbers.shape[-1] == 1 and original.profile is not None  # WebP has RGB only
    holds = {"WEBP": not (deep or named_grey), "BMP": not (deep or clear), "JPEG": not (deep or clear)}
    lossless = wanted in _SUFFIXES or how.format == "jpeg"
    return wanted if lossless and fits and holds.get(wanted, True) else "PNG"


def delivered_suffix(original: Original, how: Delivery) -> str:
    """The suffix of its name: its own one where that is one of the format's."""
    kind, own = delivered_format(original, how), PurePath(original.name).suffix
    of_format = _SUFFIXES.get(kind, _SUFFIXES_OF_JPEG)
    return own if own.lower() in of_format else of_format[0]


def cloaked_names(names: Sequence[str], suffixes: Sequence[str] | None = None) -> list[str]:
    """File name for each source name, all different on any file system; depends on nothing but what is given.

    ``IMG_1.jpg`` becomes ``IMG_1.png``; sources that share a stem keep their suffix in it (``IMG_1-heic.png``), and
    what still clashes is numbered from 2. Phones and Macs ignore case and how accents are composed; so does this.

    Args:
        names: of the sources.
        suffixes: of the files to be written, with the dot, one for each source; ``.png`` when not given.
    """
    stems = Counter(_folded(PurePath(name).stem) for name in names)
    taken: set[str] = set()
    cloaked = []
    for path, suffix in zip(map(PurePath, names), suffixes or [".png"] * len(names), strict=True):
        stem = path.stem if stems[_folded(path.stem)] == 1 else f"{path.stem}-{path.suffix[1:].lower()}"
        candidates = chain([stem], (f"{stem}-{number}" for number in count(2)))
        free = next(candidate for candidate in candidates if _folded(candidate) not in taken)
        taken.add(_folded(free))
        cloaked.append(f"{free}{suffix}")
    return cloaked


def whole_steps(budget: float | Float[Tensor, "*size"]) -> Float[Tensor, "*size"]:
    """The whole 8-bit steps within a budget, 255 at most; 32 bits would round 1.99999999 up, so that comes later."""
    if isinstance(budget, Tensor):
        return budget.floor().clamp(max=255)
    return torch.tensor(float(math.floor(min(budget, 255))), device="cpu")


def to_8bit(
    images: Float[Tensor, "n 3 h w"],
    originals: UInt8[Tensor, "n 3 h w"],
    budget: float | Float[Tensor, "n 1 h w"],
) -> UInt8[Tensor, "n 3 h w"]:
    """Nearest 8-bit pixels to ``images`` that keep the budget: rounding must not overstep it.

    Args:
        images: In [-1, 1]; what lies outside is clamped.
        originals: What the budget is measured from.
        budget: Largest difference in 8-bit steps, 0 or more; 12.7 allows 12. One for all pixels, or each one's own.

    Raises:
        ValueError: ``images`` hold NaN, of which no pixel is nearest.
    """
    if images.isnan().any():
        raise ValueError("the images hold NaN: what computed them diverged")
    steps = whole_steps(budget).to(images.device)
    levels = ((images.float() + 1) * 127.5).round()
    lowest, highest = (originals.float() - steps).clamp(min=0), (originals.float() + steps).clamp(max=255)
    return levels.clamp(lowest, highest).to(torch.uint8)


def require_change(
    originals: UInt8[Tensor, "n 3 h w"], cloaked: UInt8[Tensor, "n 3 h w"], names: Sequence[str]
) -> None:
    """Refuses to deliver a photo as cloaked of which no pixel has changed.

    Raises:
        InputError: it names the first such photo.
    """
    same = (originals == cloaked).flatten(1).all(dim=1).tolist()
    for name, unchanged in zip(names, same, strict=True):
        if unchanged:
            raise unchanged_photo(name)


def unchanged_photo(name: str) -> InputError:
    """The error that ends a run which would deliver a photo as cloaked of which no pixel has changed."""
    return InputError(
        f"no pixel of {name} has changed, so nothing is delivered as cloaked: use more rounds, a larger step size or a "
        "larger budget"
    )


def png(pixels: UInt8[Tensor, "3 h w"]) -> bytes:
    """Pixels as a PNG file; the same pixels give the same bytes."""
    buffer = BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path: Path, pixels: UInt8[Tensor, "3 h w"]) -> str:
    """Write pixels without loss; the same pixels give the same bytes. See ``write_atomically``.

    Returns:
        SHA-256 of the file.
    """
    data = png(pixels)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def _metadata(original: Original, how: Delivery, kind: str, lies: int) -> Metadata:
    """What is written beside the pixels, saying how they lie."""
    metadata = original.whole if how.keep_metadata else original.kept
    removed = list(metadata.removed)
    xmp, iptc, block = metadata.xmp, metadata.iptc, metadata.exif
    if kind == "BMP":
        removed += ["EXIF data"] * bool(block) + ["XMP metadata"] * bool(xmp)
        xmp = block = None
    if iptc and kind in ("BMP", "WEBP"):
        iptc, removed = None, [*removed, "IPTC metadata"]
    if xmp:  # says how the photo lies, too; some readers believe it where EXIF says nothing
        xmp = re.sub(rb"(tiff:Orientation(?:=[\"']|>))\d", rb"\g<1>%d" % lies, xmp)
        block = block or exif.serialised(exif.Block(), lies)
    return replace(metadata, exif=exif.oriented(block, lies), xmp=xmp, iptc=iptc, removed=tuple(removed))


def _content(original: Original, change: np.ndarray, how: Delivery, kind: str, metadata: Metadata) -> Content:
    numbers = np.empty_like(original.numbers)
    for rows in _rows(original):
        numbers[rows] = _changed(original, change, rows)
    lies = original.turned if how.keep_orientation else 1
    alpha = None if original.alpha is None else turn_back(original.alpha, lies)
    chunks = original.chunks if kind == "PNG" else b""
    return Content(turn_back(numbers, lies), alpha, original.profile, metadata, chunks, how.quality)


def _rows(original: Original) -> Iterator[slice]:
    """All rows of a photo, a few at a time."""
    yield from (slice(top, top + ROWS) for top in range(0, len(original.numbers), ROWS))


def _changed(original: Original, change: np.ndarray, rows: slice) -> np.ndarray:
    """Some rows of a photo with their change, in the photo's own numbers."""
    numbers, steps = original.numbers[rows], change[rows].astype(np.int32)
    if numbers.shape[-1] == 1:
        total = steps.sum(axis=-1, keepdims=True)
        steps = np.sign(total) * (np.abs(total) // 3)
    if original.alpha is not None:
        steps = steps * (original.alpha[rows] > 0)[..., None]
    unit = 1 if numbers.dtype == np.uint8 else 256
    return (numbers + unit * steps).clip(0, np.iinfo(numbers.dtype).max).astype(numbers.dtype)


def _differences(
    original: Original, change: np.ndarray, back: Original, budget: float | np.ndarray, exact: bool
) -> tuple[int, float]:
    """Largest difference of the numbers in 8-bit steps, and the share of those over the budget.

    Raises:
        ValueError: the change oversteps the budget.
        RuntimeError: what was read back is not what was written.
    """
    alpha = original.alpha is None or (back.alpha is None and bool((original.alpha == 255).all()))  # WebP leaves it out
    alike = (
        back.size == original.size,
        back.numbers.dtype == original.numbers.dtype,
        back.profile == original.profile,
        alpha or _same(back.alpha, original.alpha),
    )
    if not all(alike):
        names = ("size", "depth", "profile", "transparency")
        other = ", ".join(name for name, same in zip(names, alike, strict=True) if not same)
        raise RuntimeError(f"{original.name}: read back, its {other} is not the photo's")
    unit, largest, over = 1 if original.numbers.dtype == np.uint8 else 256, 0, 0
    bound = np.broadcast_to(np.asarray(budget, np.float32), original.numbers.shape[:2])  # of one for all, no copies
    for rows in _rows(original):
        if exact and not (back.numbers[rows] == _changed(original, change, rows)).all():
            raise RuntimeError(f"{original.name}: read back, its numbers are not those that were written")
        apart = np.abs(back.numbers[rows].astype(np.int32) - original.numbers[rows])
        largest = max(largest, -(-int(apart.max()) // unit))
        over += int((apart > bound[rows][..., None] * unit).sum())
    if exact and over:
        raise ValueError(f"the change of {original.name} is up to {largest} steps, the budget {np.max(budget)}")
    return largest, over / back.numbers.size


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is not None and other is not None and np.array_equal(one, other)


def _folded(name: str) -> str:
    """Equal for names that some file system takes for the same (Unicode 15, D145: canonical caseless match)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
