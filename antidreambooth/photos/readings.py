"""How trainers make squares of photos: what is cut out, with which kernel it is scaled, and what is ignored.

Read in their sources in 2026. Trainers with aspect buckets see more of a long photo than a square; that is not modelled
here, and neither is that OneTrainer scales floating-point numbers, which it does not round to 8 bits.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from antidreambooth.photos.decoding import (
    Box,
    Photo,
    centred,
    decode_pixels,
    decoding,
    find_photos,
    flatten,
    open_photo,
    orientation,
    read,
    separate,
)
from antidreambooth.photos.formats import why_undecoded
from antidreambooth.photos.original import turn, turn_back
from antidreambooth.photos.regions import face_boxes, widened

FACE_WIDTHS = 2.0  # side of the square around a face, in widths of the face

Crop = Literal["centre", "random", "face"]
Kernel = Literal["bilinear", "bicubic", "lanczos", "area", "linear"]


@dataclass(frozen=True)
class Reading:
    """How a photo's file becomes a square; by default as this project has always read photos.

    Args:
        crop: the centred square; one at random along the longer side, drawn anew in each step, so that each step
            encodes its photos anew; or the square of two face widths around the largest face.
        kernel: bilinear, bicubic or lanczos as Pillow has them, or area or linear as OpenCV has them: linear makes the
            photo smaller without antialiasing, and area enlarges with Lanczos, as kohya does.
        upright: whether a photo is turned as its EXIF says; some trainers see a phone's photos lying on their side.
        profile: whether colours go through the profile to sRGB and transparent parts are white, as people see it;
            trainers ignore both.
    """

    crop: Crop = "centre"
    kernel: Kernel = "lanczos"
    upright: bool = True
    profile: bool = True

    def __call__(self, path: Path, side: int, place: float = 0.5) -> UInt8[Tensor, "3 side side"]:
        """The square that a trainer makes of a photo.

        Args:
            path: of the photo's file.
            side: of the square, in pixels.
            place: of a random crop along the photo's longer side, see ``square_at``.

        Raises:
            InputError: the photo cannot be read or decoded.
        """
        return square_at(self.photo(path, side).pixels, place)

    def photo(self, path: Path, side: int) -> Photo:
        """The same before it is cut at random: then all of the photo, its shorter side scaled to ``side`` pixels.

        Warns where there is no face to cut out; then it is the centred square.

        Raises:
            InputError: the photo cannot be read or decoded.
        """
        data = read(path)
        picture, lies = self._picture(data, path.name)
        box = self._box(picture, path.name)
        lengths = box[2] - box[0], box[3] - box[1]
        width, height = (int(side * length / min(lengths)) for length in lengths)  # rounded as torchvision does
        scaled = resize(picture, (width, height), self.kernel, box)
        if not self.upright:
            scaled = turn_back(scaled, lies)
        pixels = torch.from_numpy(scaled).permute(2, 0, 1).contiguous()
        return Photo(path, path.name, hashlib.sha256(data).hexdigest(), picture.size, box, pixels)

    def _picture(self, data: bytes, name: str) -> tuple[Image.Image, int]:
        """A photo, upright and of mode RGB, and how its decoder gives it (1 to 8, as in EXIF)."""
        image = open_photo(data, name)
        if self.profile:
            return flatten(image, name), orientation(image)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with decoding(name, lambda: why_undecoded(image.format)):
                decode_pixels(image, name)
            lies = orientation(image)
            colours = separate(image, name)[0].convert("RGB")
        return (colours if lies == 1 else Image.fromarray(turn(np.asarray(colours), lies))), lies

    def _box(self, picture: Image.Image, name: str) -> Box:
        """What of an upright picture is scaled."""
        width, height = picture.size
        if self.crop == "random":
            return 0, 0, width, height
        if self.crop == "face":
            if faces := face_boxes(picture):
                return widened(faces[0], FACE_WIDTHS, picture.size)
            warnings.warn(f"no face is found in {name}: its centred square is taken", stacklevel=4)
        return centred(picture.size)


DIFFUSERS = Reading("random", "bilinear", profile=False)
KOHYA = Reading("centre", "area", upright=False, profile=False)
ONETRAINER = Reading("random", "bilinear", profile=False)
AI_TOOLKIT = Reading("centre", "bicubic", profile=False)
SIMPLETUNER = Reading("centre", "linear", upright=False, profile=False)


def read_photos(source: Path, side: int, reading: Reading) -> list[Photo]:
    """Photos of ``source`` (see ``find_photos``) as a trainer reads them; one at a time at its own size.

    Raises:
        InputError: there is no photo, or one that cannot be read or decoded.
    """
    return [reading.photo(path, side) for path in find_photos(source)]


def square_at(pixels: UInt8[Tensor, "3 h w"], place: float) -> UInt8[Tensor, "3 s s"]:
    """The largest square at a place along the longer side: in [0, 1), 0 at its beginning, every pixel equally often."""
    height, width = pixels.shape[1:]
    side = min(height, width)
    top, left = (math.floor(place * (length - side + 1)) for length in (height, width))
    return pixels[:, top : top + side, left : left + side]


def resize(picture: Image.Image, size: tuple[int, int], kernel: Kernel, box: Box) -> UInt8[np.ndarray, "h w 3"]:
    """A part of an RGB picture, scaled.

    Args:
        picture: mode RGB.
        size: width and height of the result.
        kernel: see ``Reading``.
        box: the part.
    """
    larger = size[0] > box[2] - box[0] or size[1] > box[3] - box[1]
    if kernel == "linear" or (kernel == "area" and not larger):
        taps = linear_taps if kernel == "linear" else area_taps
        cut = np.asarray(picture.crop(box))
        rows = _along_rows(cut, taps(cut.shape[0], size[1]))
        columns = _along_rows(rows.swapaxes(0, 1), taps(cut.shape[1], size[0]))
        return np.ascontiguousarray(np.floor(columns + 0.5).astype(np.uint8).swapaxes(0, 1))  # halves upward, as OpenCV
    by_pillow = Image.Resampling["LANCZOS" if kernel == "area" else kernel.upper()]
    return np.array(picture.resize(size, by_pillow, box=box))  # no copy of the part


Taps = tuple[int, Float32[np.ndarray, " taps"]]  # of a new pixel: the first old one that it is made of, and the weights


def area_taps(length: int, count: int) -> Iterator[Taps]:
    """OpenCV's INTER_AREA: each of ``count`` pixels, no more than ``length``, is the mean of what it covers."""
    scale = length / count
    for index in range(count):
        low, high = index * scale, min((index + 1) * scale, length)
        old = np.arange(math.floor(low), math.ceil(high))
        covered = np.minimum(old + 1, high) - np.maximum(old, low)
        yield int(old[0]), (covered / covered.sum()).astype(np.float32)


def linear_taps(length: int, count: int) -> Iterator[Taps]:
    """OpenCV's INTER_LINEAR: each pixel from the two nearest to its centre, however many it covers."""
    for index in range(count):
        centre = min(max((index + 0.5) * length / count - 0.5, 0.0), length - 1.0)
        first = min(math.floor(centre), max(length - 2, 0))
        yield first, np.array([1 - (centre - first), centre - first], np.float32)[: length - first]


def _along_rows(pixels: np.ndarray, taps: Iterable[Taps]) -> Float32[np.ndarray, "count w c"]:
    """New rows, each a weighted sum of old ones; only those of one are held in floating point."""
    new = [np.tensordot(ws, pixels[first : first + len(ws)].astype(np.float32), 1) for first, ws in taps]
    return np.stack(new)
