"""Which part of each photo a step of the attack sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from antidreambooth.errors import InputError, require
from antidreambooth.photos.decoding import Box
from antidreambooth.photos.whole import Reduced


class Part(NamedTuple):
    """A square part of a photo, in its own pixels."""

    left: float
    top: float
    side: float


@dataclass(frozen=True)
class Views:
    """Which part of each photo the attack's steps see.

    A cloak made for the whole view alone does little for a trainer that crops to the face, and what is made for the
    face alone does little for one that does not; by turns it does most of both at no more cost.

    Args:
        close: share of the steps that see a part of the photo: a face where one is known, a random square where not.
            The others see a square of the short side, anywhere along the long one.
        narrowest: side of a face's square, in widths of the face, at least.
        widest: the same, at most.
        smallest: side of a random square, as a share of the photo's short side, at least.
    """

    close: float = 0.5
    narrowest: float = 2.0
    widest: float = 3.0
    smallest: float = 0.6

    def __post_init__(self) -> None:
        require("close", self.close, 0, 1)
        require("narrowest", self.narrowest, 1)
        require("widest", self.widest, 1)
        require("smallest", self.smallest, above=0, most=1)
        if self.narrowest > self.widest:
            raise InputError(f"narrowest is at most widest: got {self.narrowest} and {self.widest}")

    def is_close(self, number: int) -> bool:
        """Whether a step of the run, counted from 0, sees a part of the photos: evenly spread over the steps."""
        return math.floor((number + 1) * self.close) > math.floor(number * self.close)

    def smallest_part(self, size: tuple[int, int], faces: Sequence[Box]) -> float:
        """Side of the smallest square that steps see of a photo, as a share of the short side."""
        if not self.close:
            return 1.0
        if not faces:
            return self.smallest
        return min(1.0, min(self.narrowest * (right - left) for left, _, right, _ in faces) / min(size))

    def part(self, photo: Reduced, close: bool, numbers: Sequence[float]) -> Part:
        """A part of a photo.

        Args:
            photo: of which.
            close: whether it is a face or a random square, or else the whole view.
            numbers: four in [0, 1) that say which.
        """
        which, size, across, down = numbers
        width, height = photo.size
        short = float(min(width, height))
        if not (close and photo.faces):
            side = short * (self.smallest + (1 - self.smallest) * size) if close else short
            return Part(across * (width - side), down * (height - side), side)
        left, top, right, bottom = photo.faces[int(which * len(photo.faces))]
        side = min(short, (right - left) * (self.narrowest + (self.widest - self.narrowest) * size))
        # The face's middle moves by up to a tenth of the square's side: no two detectors agree on a face's box.
        x, y = (left + right) / 2 + 0.2 * (across - 0.5) * side, (top + bottom) / 2 + 0.2 * (down - 0.5) * side
        return Part(min(max(0.0, x - side / 2), width - side), min(max(0.0, y - side / 2), height - side), side)
