"""Random image transforms that an attack sees photos through: expectation over transforms (arXiv:1707.07397)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

from antidreambooth.diffusion.seeding import uniform
from antidreambooth.errors import require


class Transform(ABC):
    """A differentiable change of pictures that depends on a few random numbers, drawn for all pictures at once."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n numbers"]:
        """The randomness of ``count`` pictures, on the generator's device."""

    @abstractmethod
    def __call__(self, images: Float[Tensor, "n 3 h w"], drawn: Float[Tensor, "n numbers"]) -> Float[Tensor, "n 3 h w"]:
        """Each picture in [-1, 1], changed; differentiable in the pixels, of the same size."""


class Flip(Transform):
    """Left becomes right in every second picture, as attackers' pipelines do it."""

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n numbers"]:
        """One number in [0, 1) a picture."""
        return uniform((count, 1), generator)

    def __call__(self, images: Float[Tensor, "n 3 h w"], drawn: Float[Tensor, "n numbers"]) -> Float[Tensor, "n 3 h w"]:
        """The pictures, some of them mirrored."""
        return torch.where(drawn[:, :, None, None] < 0.5, images.flip(-1), images)


class Crop(Transform):
    """A random square of each picture, scaled up to the picture's size (bilinear).

    Args:
        smallest: side of the smallest square, as a share of the picture's.
    """

    def __init__(self, smallest: float = 0.8) -> None:
        require("smallest", smallest, above=0, most=1)
        self.smallest = smallest

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n numbers"]:
        """Three numbers in [0, 1) a picture: side, left, top."""
        return uniform((count, 3), generator)

    def __call__(self, images: Float[Tensor, "n 3 h w"], drawn: Float[Tensor, "n numbers"]) -> Float[Tensor, "n 3 h w"]:
        """The squares."""
        side = self.smallest + (1 - self.smallest) * drawn[:, :1]
        x, y = (
            (1 - side) * (2 * place[:, None] - 1) + side * _middles(size, images)
            for place, size in zip(drawn[:, 1:].T, (images.shape[3], images.shape[2]), strict=True)
        )
        size = (len(images), *images.shape[2:])
        where = torch.stack([x[:, None, :].expand(size), y[:, :, None].expand(size)], dim=3)
        return grid_sample(images, where.to(images), padding_mode="border", align_corners=False)


def _middles(count: int, like: Tensor) -> Float[Tensor, " count"]:
    """Middles of pixels along a side, from -1 to 1; affine_grid's matrix product would round them under autocast."""
    return (2 * torch.arange(count, device=like.device, dtype=torch.float32) + 1) / count - 1
