"""Transforms that move or mix pixels: mirror, crop, blur, resize."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

from antidreambooth.attack.transforms.base import Transform
from antidreambooth.diffusion.precision import full_precision
from antidreambooth.diffusion.seeding import uniform
from antidreambooth.errors import require
from antidreambooth.photos.resampling import enlarging, viewing


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


class Blur(Transform):
    """A Gaussian, as wide as is drawn for each picture.

    Near an edge the weights of the pixels that are there are scaled to a sum of one.

    Args:
        smallest: the least standard deviation, in pixels of the model's square.
        largest: the greatest.
    """

    def __init__(self, smallest: float = 0.1, largest: float = 2.0) -> None:
        require("smallest", smallest, above=0)
        require("largest", largest, smallest)
        self.smallest, self.largest = smallest, largest

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n numbers"]:
        """One number in [0, 1) a picture."""
        return uniform((count, 1), generator)

    def __call__(self, images: Float[Tensor, "n 3 h w"], drawn: Float[Tensor, "n numbers"]) -> Float[Tensor, "n 3 h w"]:
        """The pictures, blurred."""
        sigma = self.smallest + (self.largest - self.smallest) * drawn[:, :, None]
        rows, columns = (_gaussian(size, sigma) for size in images.shape[2:])
        return _both_ways(images, rows[:, None], columns[:, None])


class Rescale(Transform):
    """Scaled down and back up, as on the web (bilinear both ways, with antialiasing); in ``Chain`` with a chance.

    Args:
        factor: of the small size to the full one.
    """

    def __init__(self, factor: float = 0.5) -> None:
        require("factor", factor, above=0, most=1)
        self.factor = factor

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n numbers"]:
        """Nothing is random."""
        return uniform((count, 0), generator)

    def __call__(self, images: Float[Tensor, "n 3 h w"], drawn: Float[Tensor, "n numbers"]) -> Float[Tensor, "n 3 h w"]:
        """The pictures without their finest details."""
        rows, columns = (self._along(size, images.device) for size in images.shape[2:])
        return _both_ways(images, rows, columns)

    def _along(self, full: int, device: torch.device) -> Float[Tensor, "full full"]:
        small = max(1, round(full * self.factor))
        with full_precision(device):
            return enlarging(small, full, device) @ viewing(full, 0.0, float(full), small, device)


def _both_ways(images: Tensor, rows: Tensor, columns: Tensor) -> Float[Tensor, "n 3 h w"]:
    """Pictures after a matrix for each side: on a GPU as deterministic as their gradient, which a resize's is not."""
    with full_precision(images.device):
        return rows @ images.float() @ columns.mT


def _gaussian(count: int, sigma: Float[Tensor, "n 1 1"]) -> Float[Tensor, "n count count"]:
    """A blur along a side of ``count`` pixels, for each standard deviation."""
    place = torch.arange(count, device=sigma.device, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((place[:, None] - place) / sigma).square())
    return weights / weights.sum(dim=2, keepdim=True)


def _middles(count: int, like: Tensor) -> Float[Tensor, " count"]:
    """Middles of pixels along a side, from -1 to 1; affine_grid's matrix product would round them under autocast."""
    return (2 * torch.arange(count, device=like.device, dtype=torch.float32) + 1) / count - 1
