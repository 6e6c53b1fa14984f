"""Cloaked photos back to files: their names, their 8-bit pixels within the budget, lossless PNG."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from itertools import chain, count
from pathlib import Path, PurePath

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from antidreambooth.errors import InputError
from antidreambooth.files import write_atomically


def cloaked_names(names: Sequence[str]) -> list[str]:
    """PNG file name for each source name, all different on any file system; depends on nothing but ``names``.

    ``IMG_1.jpg`` becomes ``IMG_1.png``; sources that share a stem keep their suffix in it (``IMG_1-heic.png``), and
    what still clashes is numbered from 2. Phones and Macs ignore case and how accents are composed; so does this.
    """
    stems = Counter(_folded(PurePath(name).stem) for name in names)
    taken: set[str] = set()
    cloaked = []
    for path in map(PurePath, names):
        stem = path.stem if stems[_folded(path.stem)] == 1 else f"{path.stem}-{path.suffix[1:].lower()}"
        candidates = chain([stem], (f"{stem}-{number}" for number in count(2)))
        free = next(candidate for candidate in candidates if _folded(candidate) not in taken)
        taken.add(_folded(free))
        cloaked.append(f"{free}.png")
    return cloaked


def to_8bit(
    images: Float[Tensor, "n 3 h w"], originals: UInt8[Tensor, "n 3 h w"], budget: float
) -> UInt8[Tensor, "n 3 h w"]:
    """Nearest 8-bit pixels to ``images`` that keep the budget: rounding must not overstep it.

    Args:
        images: In [-1, 1]; what lies outside is clamped.
        originals: What the budget is measured from.
        budget: Largest difference in 8-bit steps, 0 or more; 12.7 allows 12.

    Raises:
        ValueError: ``images`` hold NaN, of which no pixel is nearest.
    """
    if images.isnan().any():
        raise ValueError("the images hold NaN: what computed them diverged")
    steps = math.floor(min(budget, 255))
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
            raise InputError(
                f"no pixel of {name} has changed, so nothing is delivered as cloaked: use more rounds, a larger step "
                "size or a larger budget"
            )


def write_png(path: Path, pixels: UInt8[Tensor, "3 h w"]) -> str:
    """Write pixels without loss; the same pixels give the same bytes. See ``write_atomically``.

    Returns:
        SHA-256 of the file.
    """
    buffer = BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def _folded(name: str) -> str:
    """Equal for names that some file system takes for the same (Unicode 15, D145: canonical caseless match)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
