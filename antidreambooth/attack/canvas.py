"""What PGD moves, and how a model sees it: a photo's square, or a grid that is enlarged to the photo's own size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from antidreambooth.attack.steps import StepRule
from antidreambooth.attack.views import Part, Views
from antidreambooth.diffusion.precision import full_precision
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.photos.decoding import to_float
from antidreambooth.photos.delivery import whole_steps
from antidreambooth.photos.resampling import along, enlarged
from antidreambooth.photos.whole import Reduced

STEP = 1 / 127.5  # one 8-bit step of a pixel, in [-1, 1]


def project(
    images: Float[Tensor, "n 3 h w"], originals: Float[Tensor, "n 3 h w"], radius: float
) -> Float[Tensor, "n 3 h w"]:
    """Nearest images within ``radius`` of ``originals`` (l-inf), all in [-1, 1] (arXiv:1706.06083)."""
    return images.clamp((originals - radius).clamp(min=-1), (originals + radius).clamp(max=1))


class Look(NamedTuple):
    """What one step sees of one photo: two matrices for its change, and the part of the photo itself."""

    rows: Float[Tensor, "s gh"]
    columns: Float[Tensor, "s gw"]
    photo: Float[Tensor, "3 s s"]  # in [-1, 1]


Looks = Sequence[Look]


class Canvas(ABC):
    """What PGD moves: a state of any shape, seen by a model as one square picture a photo.

    Attributes:
        blank: the state before any change, on the device; a perturbation is the difference from it.
    """

    blank: Tensor

    @abstractmethod
    def to(self, device: torch.device) -> Canvas:
        """The same on a device."""

    @abstractmethod
    def project(self, state: Tensor, radius: float) -> Tensor:
        """The nearest state whose pixels are within ``radius`` (in units of [-1, 1]) of the photos' own."""

    def looks(self, turn: Turn, number: int) -> Looks:
        """Which part of each photo step ``number`` of the whole run sees: all of it, unless a subclass draws one."""
        return ()

    @abstractmethod
    def images(self, state: Tensor, looks: Looks = ()) -> Float[Tensor, "n 3 s s"]:
        """What a model sees of a state, in [-1, 1]; of each photo's middle without ``looks``."""

    def lessons(self, state: Tensor) -> Float[Tensor, "m 3 s s"]:
        """What a surrogate learns from."""
        return self.images(state)

    @abstractmethod
    def gradient(self, gradient: Float[Tensor, "n 3 s s"], looks: Looks) -> Tensor:
        """The gradient in the state, from that in what a model saw."""

    def pixel_change(self, state: Tensor) -> Tensor:
        """What a state's difference from ``blank`` changes of the pixels, or of the grids, in units of [-1, 1]."""
        return state

    def begin(self, rule: StepRule) -> Tensor:
        """What a step rule remembers before the first step."""
        return rule.begin(self.blank)

    def direction(self, rule: StepRule, gradient: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Which way a step goes, and what the rule remembers for the next one; each photo by itself."""
        return rule.direction(gradient, memory)


class SquareCanvas(Canvas):
    """Photos as squares of the model's resolution: the state is the squares themselves, as published.

    Args:
        originals: the squares, n 3 h w in [-1, 1].
    """

    def __init__(self, originals: Float[Tensor, "n 3 h w"]) -> None:
        self.blank = originals

    def to(self, device: torch.device) -> SquareCanvas:
        """The same on a device."""
        return SquareCanvas(self.blank.to(device))

    def project(self, state: Float[Tensor, "n 3 h w"], radius: float) -> Float[Tensor, "n 3 h w"]:
        """See the function."""
        return project(state, self.blank, radius)

    def images(self, state: Float[Tensor, "n 3 h w"], looks: Looks = ()) -> Float[Tensor, "n 3 h w"]:
        """The squares."""
        return state

    def gradient(self, gradient: Float[Tensor, "n 3 h w"], looks: Looks) -> Float[Tensor, "n 3 h w"]:
        """As it is."""
        return gradient

    def bound(self, budget: float) -> float | Tensor:
        """The budget of each pixel, in 8-bit steps: the same one everywhere."""
        return budget


class OwnSizeCanvas(Canvas):
    """A grid for each photo, which is enlarged to the photo's own size; the state is all grids, one after the other.

    Where a value would leave 0..255 the photo is clipped when it is written, and the picture that a step sees is; the
    gradient takes no notice.

    Args:
        photos: at the sizes of their grids.
        side: of the square that a model sees, in pixels.
        views: which parts of the photos the steps see.
        device: where the state lies.
    """

    def __init__(
        self, photos: Sequence[Reduced], side: int, views: Views | None = None, device: torch.device | None = None
    ) -> None:
        self.photos, self.side, self.views = list(photos), side, views or Views()
        self.device = device or torch.device("cpu")
        self.pictures = [to_float(photo.picture[None])[0].to(self.device) for photo in photos]
        self.shapes = [tuple(picture.shape) for picture in self.pictures]
        self.sizes = [picture.numel() for picture in self.pictures]
        self.blank = torch.zeros(sum(self.sizes), device=self.device, dtype=torch.float32)
        self.allowed = self._allowed()

    def to(self, device: torch.device) -> OwnSizeCanvas:
        """The same on a device."""
        return self if device == self.device else OwnSizeCanvas(self.photos, self.side, self.views, device)

    def parts(self, state: Float[Tensor, " values"]) -> list[Float[Tensor, "c a b"]]:
        """Each photo's part of a state, or of what belongs to each of its values."""
        parts = zip(torch.split(state, self.sizes), self.shapes, strict=True)
        return [part.view(shape) for part, shape in parts]

    def grids(self, state: Float[Tensor, " values"]) -> list[Float[Tensor, "3 gh gw"]]:
        """The change of each photo's grid."""
        return self.parts(state)

    def project(self, state: Float[Tensor, " values"], radius: float) -> Float[Tensor, " values"]:
        """Each grid's values within ``radius``: enlarging takes means, so that no pixel changes by more."""
        within = state.clamp(-radius, radius)
        return within if self.allowed is None else within * self.allowed

    def looks(self, turn: Turn, number: int) -> Looks:
        """A part of each photo; other ranks see other ones."""
        numbers = turn.numbers(number, len(self.photos), 4)
        close = self.views.is_close(number)
        parts = [self.views.part(p, close, drawn) for p, drawn in zip(self.photos, numbers, strict=True)]
        return [self.look(index, part) for index, part in enumerate(parts)]

    def look(self, index: int, part: Part | None = None) -> Look:
        """What a step sees of a photo's square; of the one in its middle when not given."""
        photo, picture = self.photos[index], self.pictures[index]
        part = part or self.views.part(photo, False, (0.5, 0.5, 0.5, 0.5))
        (width, height), (_, rows, columns) = photo.size, picture.shape
        with full_precision(self.device):
            down, photo_down = along(rows, height, part.top, part.side, self.side, self.device)
            across, photo_across = along(columns, width, part.left, part.side, self.side, self.device)
            return Look(down, across, photo_down @ picture @ photo_across.T)

    def images(self, state: Float[Tensor, " values"], looks: Looks = ()) -> Float[Tensor, "n 3 s s"]:
        """The photos' parts with their changes, clipped to [-1, 1]."""
        return self._seen(self.grids(state), looks or [self.look(index) for index in range(len(self.photos))])

    def lessons(self, state: Float[Tensor, " values"]) -> Float[Tensor, "m 3 s s"]:
        """The middle square of each photo, and then its faces, where steps see them."""
        grids, looks = [], []
        for index, (photo, grid) in enumerate(zip(self.photos, self.grids(state), strict=True)):
            faces = len(photo.faces) if self.views.close else 0
            parts = [self.views.part(photo, True, ((n + 0.5) / faces, 0.5, 0.5, 0.5)) for n in range(faces)]
            looks += [self.look(index), *(self.look(index, part) for part in parts)]
            grids += [grid] * (1 + faces)
        return self._seen(grids, looks)

    def gradient(self, gradient: Float[Tensor, "n 3 s s"], looks: Looks) -> Float[Tensor, " values"]:
        """That in the grids."""
        return torch.cat([part.flatten() for part in self.grid_gradients(gradient, looks)])

    def grid_gradients(self, gradient: Float[Tensor, "n 3 s s"], looks: Looks) -> list[Float[Tensor, "3 gh gw"]]:
        """Back through the matrices, to each photo's grid."""
        with full_precision(self.device):
            parts = [look.rows.T @ one @ look.columns for one, look in zip(gradient, looks, strict=True)]
        return [
            part.mean(dim=0).expand_as(part) if photo.grey else part
            for part, photo in zip(parts, self.photos, strict=True)
        ]

    def begin(self, rule: StepRule) -> Tensor:
        """What the rule remembers of each photo, one after the other."""
        return torch.cat([rule.begin(part[None]).flatten() for part in self.parts(self.blank)])

    def direction(self, rule: StepRule, gradient: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The rule's own, photo by photo."""
        gradients = [part[None] for part in self.parts(gradient)]
        shapes = [rule.begin(part).shape for part in gradients]
        memories = torch.split(memory, [shape.numel() for shape in shapes])
        made = [
            rule.direction(one, part.view(shape)) for one, part, shape in zip(gradients, memories, shapes, strict=True)
        ]
        steps, kept = ([part.flatten() for part in parts] for parts in zip(*made, strict=True))
        return torch.cat(steps), torch.cat(kept)

    def bound(self, index: int, budget: float) -> float | Tensor:
        """The budget of each of a photo's pixels (h w) in 8-bit steps: the same one everywhere."""
        return budget

    def change(self, state: Float[Tensor, " values"], index: int, budget: float) -> Integer[Tensor, "h w 3"]:
        """How much each value of a photo changes at its own size, in whole 8-bit steps; one channel at a time."""
        steps = whole_steps(self.bound(index, budget)).cpu()
        smallest = torch.int8 if steps.max() <= 127 else torch.int16  # of a large photo it is large, too
        channels = []
        for channel in self.grids(state)[index].cpu() / STEP:
            change = enlarged(channel, self.photos[index].size)
            channels.append(change.round_().clamp_(-steps, steps).to(smallest))
        return torch.stack(channels, dim=-1)

    def _allowed(self) -> Float[Tensor, " values"] | None:
        """1 where a value may change and 0 elsewhere; None where all may."""
        if all(photo.allowed is None for photo in self.photos):
            return None
        parts = [
            torch.ones(picture.numel(), dtype=torch.float32, device="cpu")
            if photo.allowed is None
            else photo.allowed.float().expand(picture.shape).flatten()
            for photo, picture in zip(self.photos, self.pictures, strict=True)
        ]
        return torch.cat(parts).to(self.device)

    def _seen(self, grids: Sequence[Tensor], looks: Looks) -> Float[Tensor, "m 3 s s"]:
        """Each look's part of a photo, with the grid's change."""
        with full_precision(self.device):
            pairs = zip(grids, looks, strict=True)
            pictures = [look.photo + look.rows @ grid @ look.columns.T for grid, look in pairs]
            return torch.stack(pictures).clamp(-1, 1)
