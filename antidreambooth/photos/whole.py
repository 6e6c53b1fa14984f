"""A photo that comes back at its own size: what the attack has of it, and how it is read again to be given back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import Box, Photo, read, square
from antidreambooth.photos.original import Original, read_original
from antidreambooth.photos.regions import face_boxes
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
    """

    picture: UInt8[Tensor, "3 rows columns"] = field(repr=False, compare=False)
    size: tuple[int, int]
    faces: tuple[Box, ...] = ()
    grey: bool = False


def reduced(pixels: NDArray[np.uint8], points: int, faces: tuple[Box, ...] = (), grey: bool = False) -> Reduced:
    """A photo at its grid's size.

    Args:
        pixels: h w 3, as trainers read them.
        points: of the grid's short side, see ``grid_size``.
        faces: boxes in own pixels.
        grey: whether the photo has one channel.
    """
    size = pixels.shape[1], pixels.shape[0]
    small = Image.fromarray(pixels).resize(grid_size(size, points), Image.Resampling.LANCZOS)
    return Reduced(torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous(), size, faces, grey)


@dataclass(frozen=True)
class WholePhoto(Photo):
    """A photo that comes back as it was; its square (``pixels``, in sRGB) is for looking at.

    Args:
        at_grid: what the attack has of it.
        original: reads it once more, as photos are not kept in memory at their own size.
    """

    at_grid: Reduced = field(repr=False, compare=False, kw_only=True)
    original: Callable[[], Original] = field(repr=False, compare=False, kw_only=True)


def whole_photo(path: Path, side: int, points: Points) -> WholePhoto:
    """A photo's file; see ``whole``.

    Raises:
        InputError: the file cannot be read or decoded.
    """
    sha256 = hashlib.sha256(read(path)).hexdigest()
    return whole(path, path.name, sha256, partial(read_unchanged, path, sha256), side, points)


def whole(
    path: Path, name: str, sha256: str, original: Callable[[], Original], side: int, points: Points
) -> WholePhoto:
    """Reads a photo, and keeps what the attack needs of it.

    Args:
        path: of its file.
        name: what manifests and messages call it.
        sha256: of the file's bytes.
        original: reads the photo.
        side: of the square that a model sees, in pixels.
        points: how fine the grid is.

    Raises:
        InputError: the photo cannot be read or decoded.
    """
    photo = original()
    looks = photo.looks()
    faces = tuple(face_boxes(looks))
    pixels, box = square(looks, side)
    at_grid = reduced(photo.pixels(), points(photo.size, faces, side), faces, photo.numbers.shape[-1] == 1)
    return WholePhoto(path, name, sha256, photo.size, box, pixels, at_grid=at_grid, original=original)


def read_unchanged(path: Path, sha256: str) -> Original:
    """A photo's file once more.

    Raises:
        InputError: it has changed meanwhile, or is gone.
    """
    data = read(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{path.name} has changed since the run began: put the file back as it was, or start anew")
    return read_original(data, path.name)
