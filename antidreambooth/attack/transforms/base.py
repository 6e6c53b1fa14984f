"""What every transform has to say, and several of them as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.diffusion.seeding import uniform
from antidreambooth.errors import InputError, require


class Transform(ABC):
    """A differentiable change of pictures that depends on a few random numbers, drawn for all pictures at once."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n numbers"]:
        """The randomness of ``count`` pictures, on the generator's device."""

    @abstractmethod
    def __call__(self, images: Float[Tensor, "n 3 h w"], drawn: Float[Tensor, "n numbers"]) -> Float[Tensor, "n 3 h w"]:
        """Each picture in [-1, 1], changed; differentiable in the pixels, of the same size."""


class Chain(Transform):
    """Several transforms, one after the other, that happen to a picture together or not at all.

    Args:
        transforms: in the order in which a picture goes through them.
        chance: that they happen to a picture, from 0 to 1; else it stays as it is.
    """

    def __init__(self, transforms: Sequence[Transform], chance: float = 1.0) -> None:
        if not transforms:
            raise InputError("transforms is empty: leave out Chain, or give some, such as Rescale and JPEG")
        require("chance", chance, 0, 1)
        self.transforms, self.chance = list(transforms), chance
        self.widths = [transform.draw(0, torch.Generator("cpu")).shape[1] for transform in self.transforms]

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n numbers"]:
        """Whether they happen, a number in [0, 1), then the randomness of each."""
        own = uniform((count, 1), generator)
        return torch.cat([own, *(transform.draw(count, generator) for transform in self.transforms)], dim=1)

    def __call__(self, images: Float[Tensor, "n 3 h w"], drawn: Float[Tensor, "n numbers"]) -> Float[Tensor, "n 3 h w"]:
        """The pictures, those that are not left alone after all transforms."""
        chosen, *parts = torch.split(drawn, [1, *self.widths], dim=1)
        changed = images
        for transform, numbers in zip(self.transforms, parts, strict=True):
            changed = transform(changed, numbers)
        return torch.where(chosen[:, :, None, None] < self.chance, changed, images)
