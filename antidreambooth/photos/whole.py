"""A photo that comes back at its own size: what the attack has of it, and how it is read again to be given back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import Box, Photo, read, square
from antidreambooth.photos.original import Original, read_original
from antidreambooth.photos.regions import Person, Region, chosen, find_masks, mask_of
from antidreambooth.photos.resampling import grid_size

Points = Callable[[tuple[int, int], tuple[Box, ...], int], int]  # of size, faces and side: of a grid's short side


@dataclass(frozen=True)
class Reduced:
    """A photo at the size of the grid that PGD moves.

    Args:
        picture: the photo as trainers read it (its own numbers, no profile, no alpha), scaled down by Lanczos.
        size: of the photo itself, width and height.
        faces: boxes of the faces that are protected, in the photo's own pixels.
        grey: whether the photo has one channel, so that its change must be the same in all three.
        allowed: which points of the grid may change; all when not given.
    """

    picture: UInt8[Tensor, "3 rows columns"] = field(repr=False, compare=False)
    size: tuple[int, int]
    faces: tuple[Box, ...] = ()
    grey: bool = False
    allowed: Bool[Tensor, "rows columns"] | None = field(default=None, repr=False, compare=False)


def reduced(
    pixels: NDArray[np.uint8],
    points: int,
    faces: tuple[Box, ...] = (),
    grey: bool = False,
    allowed: NDArray[np.bool_] | None = None,
) -> Reduced:
    """A photo at its grid's size.

    Args:
        pixels: h w 3, as trainers read them.
        points: of the grid's short side, see ``grid_size``.
        faces: boxes in own pixels.
        grey: whether the photo has one channel.
        allowed: h w, which pixels may change; a point of the grid may where any of its pixels may.
    """
    size = pixels.shape[1], pixels.shape[0]
    grid = grid_size(size, points)
    small = Image.fromarray(pixels).resize(grid, Image.Resampling.LANCZOS)
    picture = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()
    if allowed is None:
        return Reduced(picture, size, faces, grey)
    share = Image.fromarray(allowed.astype(np.float32)).resize(grid, Image.Resampling.BOX)
    return Reduced(picture, size, faces, grey, torch.from_numpy(np.array(share) > 0))


@dataclass(frozen=True)
class WholePhoto(Photo):
    """A photo that comes back as it was; its square (``pixels``, in sRGB) is for looking at.

    Args:
        at_grid: what the attack has of it.
        original: reads it once more, as photos are not kept in memory at their own size.
        allowed: which pixels may change, h w; None for all.
    """

    at_grid: Reduced = field(repr=False, compare=False, kw_only=True)
    original: Callable[[], Original] = field(repr=False, compare=False, kw_only=True)
    allowed: Callable[[], NDArray[np.bool_] | None] = field(repr=False, compare=False, kw_only=True)


@dataclass(frozen=True)
class Wanted:
    """What is kept of photos that come back at their own size.

    Args:
        side: of the square that a model sees, in pixels.
        points: how fine their grids are.
        region: where they may change.
        person: tells which faces are the person's.
    """

    side: int
    points: Points
    region: Region = field(default_factory=Region)
    person: Person | None = None

    def masks(self, photos: Sequence[Path]) -> list[Path | None]:
        """The user's mask for each photo.

        Raises:
            InputError: one is missing.
        """
        return [*find_masks(Path(self.region.mask), photos)] if self.region.mask else [None] * len(photos)


def whole_photo(path: Path, how: Wanted, mask: Path | None = None) -> WholePhoto:
    """A photo's file; see ``whole``.

    Raises:
        InputError: the file cannot be read or decoded.
    """
    data = read(path)
    sha256 = hashlib.sha256(data).hexdigest()
    photo, again = read_original(data, path.name), partial(read_unchanged, path, sha256)
    return whole(photo, path, path.name, sha256, again, how, mask)


def whole(
    photo: Original,
    path: Path,
    name: str,
    sha256: str,
    again: Callable[[], Original],
    how: Wanted,
    mask: Path | None = None,
) -> WholePhoto:
    """Keeps what the attack needs of a photo.

    Args:
        photo: as it was read.
        path: of its file.
        name: what manifests and messages call it.
        sha256: of the file's bytes.
        again: reads the photo once more.
        how: what is kept.
        mask: the user's.

    Raises:
        InputError: the mask cannot be read or decoded.
    """
    looks = photo.looks()
    faces = chosen(how.region, looks, how.person)
    pixels, box = square(looks, how.side)
    allowed = mask_of(how.region, name, photo.size, faces, mask)
    grey = photo.numbers.shape[-1] == 1
    at_grid = reduced(photo.pixels(), how.points(photo.size, faces, how.side), faces, grey, allowed)
    # The mask is made once more in the end, too: of a large photo it is large.
    once_more = partial(mask_of, how.region, name, photo.size, faces, mask) if allowed is not None else lambda: None
    return WholePhoto(path, name, sha256, photo.size, box, pixels, at_grid=at_grid, original=again, allowed=once_more)


def read_unchanged(path: Path, sha256: str) -> Original:
    """A photo's file once more.

    Raises:
        InputError: it has changed meanwhile, or is gone.
    """
    data = read(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{path.name} has changed since the run began: put the file back as it was, or start anew")
    return read_original(data, path.name)
