"""Where the faces of a photo are, and where in it the budget may go."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray
from PIL import Image

from antidreambooth.errors import InputError, require
from antidreambooth.photos.decoding import Box, decode, find_photos, read

SIDES = (512, 1536)  # longer side in pixels that faces are looked for at; the detector needs faces of about 80
ENLARGED = 4  # times at most: more shows no more, and a photo of a few pixels would cost as much as one of a phone
WHITE = 128  # the lowest grey level that counts as white: lossy formats and soft edges make white that is not 255

Which = Literal["all", "largest", "person"]


@dataclass(frozen=True)
class Region:
    """Where the budget may go; outside of it not one bit of a photo changes. The whole photo when nothing is given.

    Args:
        faces: which of a photo's faces count: all, the largest, or those that look like the person's clean photos.
        widths: side of the square around each of these faces that may change, in widths of the face.
        mask: a picture whose white parts may change, or a folder of such pictures, named as the photos are.

    Raises:
        InputError: ``widths`` and ``mask`` are both given.
        OutOfRangeError: ``widths`` is less than one.
    """

    faces: Which = "all"
    widths: float | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        require("widths", self.widths, 1)
        if self.widths is not None and self.mask is not None:
            raise InputError("widths and mask both say where a photo may change: give one of them")


Person = Callable[[Image.Image, Sequence[Box]], list[Box]]  # which of a picture's faces are the person's


def chosen(region: Region, picture: Image.Image, person: Person | None = None) -> tuple[Box, ...]:
    """The faces of a photo that are protected.

    Args:
        region: what the user wants.
        picture: the photo, as ``face_boxes`` wants it.
        person: tells which faces are the person's; only asked where the region is about those.
    """
    boxes = face_boxes(picture)
    if region.faces == "person" and person is not None:
        boxes = person(picture, boxes)
    return tuple(boxes[:1] if region.faces == "largest" else boxes)


@cache
def detector() -> Any:
    """Dlib's frontal face detector (HOG), the only one of the process; takes an array of h w 3 in 8 bits."""
    import dlib  # here, as it takes a while

    return dlib.get_frontal_face_detector()


def face_boxes(picture: Image.Image) -> list[Box]:
    """Where the faces of a picture are, in its own pixels, the largest first; may reach over its edge.

    Looks at both of ``SIDES``: the smaller one takes .05 s and finds the face of a portrait, the larger one .2 s and
    finds the faces of people further away, who may be there beside it.

    Args:
        picture: mode RGB, upright, in sRGB. A face that lies on its side is not found.
    """
    found: list[Box] = []
    for side in dict.fromkeys(min(side, ENLARGED * max(picture.size)) for side in SIDES):
        found += [box for box in faces_at(picture, side) if not any(_centred(box, other) for other in found)]
    return sorted(found, key=lambda box: box[0] - box[2])


def faces_at(picture: Image.Image, side: int) -> list[Box]:
    """The faces of a picture that are found when its longer side has ``side`` pixels; see ``face_boxes``."""
    width, height = (max(1, round(length * side / max(picture.size))) for length in picture.size)
    scaled = picture.resize((width, height), Image.Resampling.BILINEAR)
    across, down = picture.width / width, picture.height / height
    return [  # dlib's right and bottom are the last pixel inside, and a Box's the first one outside
        (
            round(face.left() * across),
            round(face.top() * down),
            round((face.right() + 1) * across),
            round((face.bottom() + 1) * down),
        )
        for face in detector()(np.asarray(scaled))
    ]


def widened(box: Box, widths: float, size: tuple[int, int]) -> Box:
    """The square around a face, shifted into the photo, and never larger than the photo's shorter side.

    Args:
        box: of the face.
        widths: side of the square in widths of the face.
        size: width and height of the photo.
    """
    side = max(1, min(round(widths * (box[2] - box[0])), *size))
    starts = (round((low + high - side) / 2) for low, high in (box[0::2], box[1::2]))
    left, top = (max(0, min(start, length - side)) for start, length in zip(starts, size, strict=True))
    return left, top, left + side, top + side


def find_masks(source: Path, photos: Sequence[Path]) -> list[Path]:
    """The user's mask for each photo: of a folder the one with the photo's stem, or the one file for all of them.

    Raises:
        InputError: there is no mask for a photo, or several.
    """
    try:
        found = find_photos(source)
    except InputError as error:
        raise InputError(f"no masks: {error}") from error
    if found == [source.expanduser()]:
        return found * len(photos)
    masks = []
    for photo in photos:
        own = [path for path in found if path.stem.lower() == photo.stem.lower()]
        if not own:
            raise InputError(
                f"{source} holds no mask for {photo.name}: add {photo.stem}.png, white where it may change"
            )
        if len(own) > 1:
            raise InputError(
                f"{source} holds several masks for {photo.name}, {own[0].name} and {own[1].name}: keep one"
            )
        masks += own
    return masks


def read_mask(path: Path, name: str, size: tuple[int, int]) -> Bool[NDArray[np.bool_], "h w"]:
    """Where a photo may change, by a user's mask.

    Args:
        path: of the mask.
        name: of the photo, for messages.
        size: width and height of the photo, upright.

    Raises:
        InputError: the mask is no picture, has another size or transparent parts, or nothing in it is white.
    """
    data, what = read(path), f"the mask {path.name}"
    picture = decode(data, what).convert("L")
    if picture.size != size:
        (width, height), (its_width, its_height) = size, picture.size
        raise InputError(
            f"{what} has {its_width} x {its_height} pixels, and the photo {name} has {width} x {height}, upright: "
            "save the mask at the photo's size"
        )
    if _see_through(data):  # whoever paints on a transparent layer may mean either by what is left transparent
        raise InputError(f"{what} is transparent in parts: paint them black or white, and save it without transparency")
    white: NDArray[np.bool_] = np.asarray(picture) >= WHITE
    if not white.any():
        raise InputError(f"nothing in {what} is white, so nothing of {name} may change: paint white what may")
    return white


def mask_of(
    region: Region, name: str, size: tuple[int, int], faces: Sequence[Box], mask: Path | None = None
) -> Bool[NDArray[np.bool_], "h w"] | None:
    """Where a photo may change, at its own size; None for everywhere. Warns where no face is found to go by.

    Args:
        region: what the user wants.
        name: of the photo, for messages.
        size: its width and height, upright.
        faces: those that are protected, see ``chosen``.
        mask: the user's mask for this photo, see ``find_masks``.

    Raises:
        InputError: the mask cannot be used, see ``read_mask``.
    """
    assert (mask is None) == (region.mask is None), "a mask that the user gave is never left out"
    if mask is not None:
        return read_mask(mask, name, size)
    if region.widths is None:
        return None
    if not faces:
        whose = "no face that looks like the clean photos" if region.faces == "person" else "no face"
        warnings.warn(f"{whose} is found in {name}: the whole photo may change", stacklevel=2)
        return None
    allowed = np.zeros(size[::-1], np.bool_)
    for face in faces:
        left, top, right, bottom = widened(face, region.widths, size)
        allowed[top:bottom, left:right] = True
    return allowed


def _centred(box: Box, other: Box) -> bool:
    """Whether the centre of a box lies in another one: two boxes of one face."""
    left, top, right, bottom = other
    return left <= (box[0] + box[2]) / 2 < right and top <= (box[1] + box[3]) / 2 < bottom


def _see_through(data: bytes) -> bool:
    """Whether a picture that ``decode`` can read has a pixel that is not opaque."""
    with Image.open(BytesIO(data)) as image:
        return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255
