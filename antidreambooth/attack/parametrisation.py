"""Of what size cloaked photos are, and what of them PGD moves: a setting of every method."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from antidreambooth.attack.basis import Basis, Pixels
from antidreambooth.attack.canvas import Canvas, OwnSizeCanvas, SquareCanvas
from antidreambooth.attack.shaped import OwnBudgets, ShapedGrids, ShapedSquares
from antidreambooth.attack.views import Views
from antidreambooth.errors import InputError, require
from antidreambooth.photos.decoding import Box, Photo, find_photos, load_photos, square, to_float
from antidreambooth.photos.delivery import Delivered, Delivery, deliver, png, require_change, to_8bit, unchanged_photo
from antidreambooth.photos.given import squares, wholes
from antidreambooth.photos.original import read_original
from antidreambooth.photos.regions import Person, Region
from antidreambooth.photos.whole import Wanted, WholePhoto, whole_photo

ANYWHERE = Region()
SHAPES = ("flat", "visible")

Shape = Literal["flat", "visible"]  # of a budget: the same for all pixels, or by what is seen at each one


class Bounds(NamedTuple):
    """The budgets of a photo's pixels, where each has its own, in 8-bit steps."""

    largest: int
    mean: float

    @classmethod
    def of(cls, budgets: float | Tensor) -> Bounds | None:
        """None where all pixels have the same one."""
        if not isinstance(budgets, Tensor):
            return None
        whole = budgets.floor()
        return cls(int(whole.max()), round(float(whole.mean(dtype=torch.float64)), 3))


@dataclass(frozen=True)
class Finished:
    """A cloaked photo as it is given back.

    Args:
        file: of the cloaked photo; its largest change is of the file's own numbers, read back.
        before: the photo, h w 3, as trainers read it.
        after: the same of the file.
        seen_before: the photo's square as people see it.
        seen_after: the same of the file.
        bounds: what its pixels were allowed, where each has a budget of its own.
    """

    file: Delivered
    before: UInt8[np.ndarray, "h w 3"]
    after: UInt8[np.ndarray, "h w 3"]
    seen_before: UInt8[Tensor, "3 s s"]
    seen_after: UInt8[Tensor, "3 s s"]
    bounds: Bounds | None = None


class Parametrisation(ABC):
    """What of the photos PGD moves.

    Attributes:
        own_size: whether photos come back at their own size.
        plain: the budget in 8-bit steps of which a pixel's own is a share; None where all pixels have the same one.
    """

    own_size: bool
    plain: float | None = None

    def shaped(self, shape: str, budget: float) -> Parametrisation:
        """The same, with a budget of this shape.

        Args:
            shape: ``flat``: the same for all pixels. ``visible``: see ``OwnBudgets``.
            budget: in 8-bit steps.

        Raises:
            InputError: there is no such shape.
        """
        if shape not in SHAPES:
            raise InputError(f"the shape of a budget is {' or '.join(SHAPES)}: got {shape!r}")
        made = copy(self)
        made.plain = budget if shape == "visible" else None
        return made

    @abstractmethod
    def load(self, source: Path, side: int, region: Region = ANYWHERE, person: Person | None = None) -> list[Photo]:
        """Photos of a folder, or the one photo, with what the canvas needs of them; one at a time at its own size.

        Args:
            source: the folder or file, see ``find_photos``.
            side: of the square that a model sees, in pixels.
            region: where the photos may change.
            person: tells which faces are the person's.

        Raises:
            InputError: There is no photo, or one that cannot be read or decoded.
        """

    @abstractmethod
    def take(self, given: object, what: str, side: int, again: bool, region: Region = ANYWHERE) -> list[Photo]:
        """The same of photos that a program hands over, see ``squares``."""

    @abstractmethod
    def canvas(self, photos: Sequence[Photo], side: int) -> Canvas:
        """What PGD moves of these photos.

        Args:
            photos: to protect.
            side: of the square that a model sees, in pixels.
        """

    @abstractmethod
    def shown(self, canvas: Any, state: Tensor, photos: Sequence[Photo], budget: float) -> UInt8[Tensor, "n 3 s s"]:
        """Each photo's square as a model sees it, in 8 bits.

        Args:
            canvas: of these photos, on the CPU.
            state: of the canvas, on the CPU.
            photos: whose canvas it is.
            budget: in 8-bit steps.
        """

    @abstractmethod
    def finish(
        self, canvas: Any, state: Tensor, photos: Sequence[Photo], budget: float, delivery: Delivery
    ) -> Iterator[Finished]:
        """The photos as they are given back, one at a time.

        Args:
            canvas: of these photos, on the CPU.
            state: of the canvas, on the CPU.
            photos: whose canvas it is.
            budget: in 8-bit steps.
            delivery: the format of the files, and what is kept in them.

        Raises:
            InputError: a photo's file has changed meanwhile, or no pixel of a photo has changed.
        """


def require_everywhere(region: Region) -> None:
    """Refuses a region for squares, which are the published form and change everywhere.

    Raises:
        InputError: it names the fix.
    """
    if region != ANYWHERE:
        raise InputError("only photos at their own size have a region: leave it out, or leave out Square")


class Square(Parametrisation):
    """Each photo's centred square at the model's resolution, which is also what comes back: as published.

    Args:
        basis: what PGD moves of the squares: each value by itself when not given, or Coarse, Gaussian, LowFrequencies.
    """

    own_size = False

    def __init__(self, basis: Basis | None = None) -> None:
        self.basis = basis

    def load(self, source: Path, side: int, region: Region = ANYWHERE, person: Person | None = None) -> list[Photo]:
        """The squares, which may change everywhere.

        Raises:
            InputError: the region is another one.
        """
        require_everywhere(region)
        return load_photos(source, side)

    def take(self, given: object, what: str, side: int, again: bool, region: Region = ANYWHERE) -> list[Photo]:
        """The squares."""
        require_everywhere(region)
        return squares(given, what, side, again)

    def canvas(self, photos: Sequence[Photo], side: int) -> SquareCanvas | ShapedSquares:
        """The squares."""
        pictures = torch.stack([photo.pixels for photo in photos])
        if self.plain is None and self.basis is None:
            return SquareCanvas(to_float(pictures))
        budgets = None if self.plain is None else OwnBudgets([*pictures], self.plain)
        return ShapedSquares(to_float(pictures), self.basis or Pixels(), budgets)

    def shown(
        self, canvas: SquareCanvas | ShapedSquares, state: Tensor, photos: Sequence[Photo], budget: float
    ) -> UInt8[Tensor, "n 3 s s"]:
        """The squares."""
        originals = torch.stack([photo.pixels for photo in photos])
        return to_8bit(canvas.images(state), originals, canvas.bound(budget))

    def finish(
        self,
        canvas: SquareCanvas | ShapedSquares,
        state: Tensor,
        photos: Sequence[Photo],
        budget: float,
        delivery: Delivery,
    ) -> Iterator[Finished]:
        """PNG files of the squares."""
        cloaked = self.shown(canvas, state, photos, budget)
        originals = torch.stack([photo.pixels for photo in photos])
        require_change(originals, cloaked, [photo.name for photo in photos])
        bound = canvas.bound(budget)
        bounds = [Bounds.of(bound[index] if isinstance(bound, Tensor) else bound) for index in range(len(photos))]
        for photo, before, after, allowed in zip(photos, originals, cloaked, bounds, strict=True):
            data, first = png(after), before.permute(1, 2, 0).numpy()
            back = read_original(data, photo.name)
            largest = int(np.abs(back.numbers.astype(np.int16) - first).max())
            file = Delivered(data, ".png", largest, 0.0, (), back)
            yield Finished(file, first, back.pixels(), before, after, allowed)


class OwnSize(Parametrisation):
    """A grid for each photo, which is enlarged to the photo's own size; each step sees a part of the photo.

    Args:
        oversampling: points of the grid for each pixel of what a model sees of the whole photo (of its short side).
            Where steps see a small part of a photo the grid is finer, up to twice as fine.
        views: which parts of the photos the steps see.
        basis: what PGD moves of the grids: each value by itself when not given, or Coarse, Gaussian, LowFrequencies.
    """

    own_size = True

    def __init__(
        self,
        oversampling: float = 2.0,
        views: Views = Views(),  # noqa: B008 (frozen)
        basis: Basis | None = None,
    ) -> None:
        require("oversampling", oversampling, 1, 8)
        self.oversampling, self.views, self.basis = oversampling, views, basis

    def points(self, size: tuple[int, int], faces: tuple[Box, ...], side: int) -> int:
        """Of the short side of a photo's grid: one for each pixel of the smallest part, as a model sees it.

        Args:
            size: of the photo, width and height.
            faces: boxes of the faces that are protected.
            side: of the square that a model sees, in pixels.
        """
        finest = 1 / self.views.smallest_part(size, faces)
        return math.ceil(side * min(max(self.oversampling, finest), 2 * self.oversampling))

    def load(self, source: Path, side: int, region: Region = ANYWHERE, person: Person | None = None) -> list[Photo]:
        """The photos at the size of their grids, with their faces."""
        how, paths = Wanted(side, self.points, region, person), find_photos(source)
        return [whole_photo(path, how, mask) for path, mask in zip(paths, how.masks(paths), strict=True)]

    def take(self, given: object, what: str, side: int, again: bool, region: Region = ANYWHERE) -> list[Photo]:
        """The photos at the size of their grids, with their faces."""
        return [*wholes(given, what, again, Wanted(side, self.points, region))]

    def canvas(self, photos: Sequence[Photo], side: int) -> OwnSizeCanvas:
        """The grids."""
        grids = [photo.at_grid for photo in photos if isinstance(photo, WholePhoto)]
        if self.plain is None and self.basis is None:
            return OwnSizeCanvas(grids, side, self.views)
        budgets = None if self.plain is None else OwnBudgets([grid.picture for grid in grids], self.plain)
        return ShapedGrids(grids, side, self.views, basis=self.basis or Pixels(), budgets=budgets)

    def shown(
        self, canvas: OwnSizeCanvas, state: Tensor, photos: Sequence[Photo], budget: float
    ) -> UInt8[Tensor, "n 3 s s"]:
        """The middle squares, as trainers see them."""
        return ((canvas.images(state) + 1) * 127.5).round().to(torch.uint8)

    def finish(
        self, canvas: OwnSizeCanvas, state: Tensor, photos: Sequence[Photo], budget: float, delivery: Delivery
    ) -> Iterator[Finished]:
        """The photos at their own size, each read once more from its file."""
        for index, photo in enumerate(photos):
            assert isinstance(photo, WholePhoto)
            original = photo.original()
            change = canvas.change(state, index, budget).numpy()
            if (allowed := photo.allowed()) is not None:
                change[~allowed] = 0
            bound = canvas.bound(index, budget)
            file = deliver(original, change, bound.numpy() if isinstance(bound, Tensor) else bound, delivery)
            if not file.largest:
                raise unchanged_photo(photo.name)
            seen, _ = square(file.back.looks(), canvas.side)
            yield Finished(file, original.pixels(), file.back.pixels(), photo.pixels, seen, Bounds.of(bound))
