"""What PGD moves instead of single values: weights of smooth patterns, of which the change of the pixels is a sum.

A basis is a linear map A from a free variable x to the change A x of a plane of pixels. The step rule works on x, and
the gradient in x is A^T times that in the pixels. ``project`` keeps every value of A x within the budget.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.diffusion.precision import full_precision
from antidreambooth.errors import require
from antidreambooth.photos.resampling import enlarging

SIZES = 32  # of photos whose matrices are kept
BLOCK = 8  # pixels of the side of a block, as JPEG's (ITU-T T.81)


class Basis(ABC):
    """How a free variable becomes the change of the pixels. Each photo is treated by itself."""

    @abstractmethod
    def shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Of the free variable of one photo, ``c a b``, whose change is 3 x rows x columns."""

    @abstractmethod
    def change(self, free: Float[Tensor, "n c a b"], rows: int, columns: int) -> Float[Tensor, "n 3 rows columns"]:
        """A x: what the pixels change by."""

    @abstractmethod
    def gradient(self, gradient: Float[Tensor, "n 3 rows columns"]) -> Float[Tensor, "n c a b"]:
        """A^T g: the gradient in the free variable, from that in the change."""

    def project(self, free: Float[Tensor, "n c a b"], radius: float) -> Float[Tensor, "n c a b"]:
        """A free variable whose change is within ``radius`` everywhere: the nearest one, unless a subclass says else.

        Right as it is for every basis whose change is a weighted mean of the free variable's values.
        """
        return free.clamp(-radius, radius)


class Pixels(Basis):
    """Each value of each pixel by itself, as published."""

    def shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Of the pixels."""
        return 3, rows, columns

    def change(self, free: Float[Tensor, "n 3 h w"], rows: int, columns: int) -> Float[Tensor, "n 3 h w"]:
        """As it is."""
        return free

    def gradient(self, gradient: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """As it is."""
        return gradient


class Means(Basis):
    """A change that is a weighted mean of the free variable along the rows, and then along the columns."""

    @abstractmethod
    def points(self, pixels: int) -> int:
        """How many values of the free variable stand for a side of so many pixels."""

    @abstractmethod
    def matrix(self, pixels: int, device: torch.device) -> Float[Tensor, "pixels points"]:
        """The weights along one side: none is negative, and each row sums to 1."""

    def shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Three channels of ``points``."""
        return 3, self.points(rows), self.points(columns)

    def change(self, free: Float[Tensor, "n 3 a b"], rows: int, columns: int) -> Float[Tensor, "n 3 rows columns"]:
        """Means along both sides."""
        with full_precision(free.device):
            return self.matrix(rows, free.device) @ free @ self.matrix(columns, free.device).T

    def gradient(self, gradient: Float[Tensor, "n 3 rows columns"]) -> Float[Tensor, "n 3 a b"]:
        """Back through both matrices."""
        rows, columns = (self.matrix(pixels, gradient.device) for pixels in gradient.shape[-2:])
        with full_precision(gradient.device):
            return rows.T @ gradient @ columns


class Coarse(Means):
    """One value for several pixels, enlarged bilinearly: a change at half the resolution when nothing is given.

    Args:
        factor: pixels along a side for each value; 2 is half the resolution.
    """

    def __init__(self, factor: float = 2.0) -> None:
        require("factor", factor, 1, 64)
        self.factor = factor

    def points(self, pixels: int) -> int:
        """Rounded up."""
        return math.ceil(pixels / self.factor)

    def matrix(self, pixels: int, device: torch.device) -> Float[Tensor, "pixels points"]:
        """Bilinear enlargement."""
        return _enlarging(self.points(pixels), pixels, device)


class Gaussian(Means):
    """The free variable blurred by a Gaussian: a change without fine detail, at the pixels' own resolution.

    Args:
        sigma: of the Gaussian, in pixels. At the photos' own size these are points of the grid.
    """

    def __init__(self, sigma: float = 1.5) -> None:
        require("sigma", sigma, above=0, most=64)
        self.sigma = sigma

    def points(self, pixels: int) -> int:
        """As many."""
        return pixels

    def matrix(self, pixels: int, device: torch.device) -> Float[Tensor, "pixels pixels"]:
        """The kernel; at the border, what of it lies inside counts for more."""
        return _blurring(pixels, self.sigma, device)


class LowFrequencies(Basis):
    """The lowest frequencies of the brightness, in blocks of 8 x 8 as in JPEG, which keeps these best of all.

    The free variable holds the coefficients of each block's DCT (ITU-T T.81, A.3.3), in JPEG's order from the lowest
    on. All three channels change alike, which is a change of luma alone (ITU-T T.871: Cb and Cr are differences). The
    coefficients are scaled so that a step of ``Sign`` has the root mean square of one in single pixels.

    Args:
        coefficients: of each block, 1 to 64.
    """

    def __init__(self, coefficients: int = 10) -> None:
        require("coefficients", coefficients, 1, BLOCK**2)
        self.coefficients = coefficients

    def shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Coefficients, rows of blocks, blocks in a row; the last ones may reach beyond the photo."""
        return self.coefficients, -(-rows // BLOCK), -(-columns // BLOCK)

    def change(self, free: Float[Tensor, "n k r c"], rows: int, columns: int) -> Float[Tensor, "n 3 rows columns"]:
        """The blocks side by side, cut to the photo's size, in each channel."""
        plane = self._blocks(free).permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2, 3)
        return plane[:, None, :rows, :columns].expand(-1, 3, -1, -1)

    def gradient(self, gradient: Float[Tensor, "n 3 rows columns"]) -> Float[Tensor, "n k r c"]:
        """The transform of each block of the channels' sum, which is nothing beyond the photo."""
        rows, columns = gradient.shape[-2:]
        plane = torch.nn.functional.pad(gradient.sum(dim=1), (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = plane.view(len(plane), plane.shape[1] // BLOCK, BLOCK, -1, BLOCK).permute(0, 1, 3, 2, 4)
        return self._coefficients(blocks)

    def project(self, free: Float[Tensor, "n k r c"], radius: float) -> Float[Tensor, "n k r c"]:
        """Within the budget, and near by.

        What of each block is over is cut off, and what that does to the kept coefficients is taken (one pass of
        alternating projections, Cheney and Goldstein, 1959). A block that is still over is scaled down.
        """
        blocks = self._blocks(free)
        scale = self.coefficients / BLOCK**2  # A^T A = 1 / scale
        nearer = free + scale * self._coefficients(blocks.clamp(-radius, radius) - blocks)
        largest = self._blocks(nearer).abs().amax(dim=(3, 4))
        return nearer * (radius / largest).clamp(max=1)[:, None]

    def _blocks(self, free: Float[Tensor, "n k r c"]) -> Float[Tensor, "n r c 8 8"]:
        with full_precision(free.device):
            return torch.einsum("nkrc,kuv->nrcuv", free, _waves(self.coefficients, free.device))

    def _coefficients(self, blocks: Float[Tensor, "n r c 8 8"]) -> Float[Tensor, "n k r c"]:
        with full_precision(blocks.device):
            return torch.einsum("nrcuv,kuv->nkrc", blocks, _waves(self.coefficients, blocks.device))


def in_order() -> list[tuple[int, int]]:
    """Row and column of each coefficient of a block in JPEG's order, from the lowest on (ITU-T T.81, figure A.6)."""
    every = [(row, column) for row in range(BLOCK) for column in range(BLOCK)]
    return sorted(every, key=lambda at: (sum(at), at[0] if sum(at) % 2 else at[1]))


@lru_cache(SIZES)
def _enlarging(points: int, pixels: int, device: torch.device) -> Float[Tensor, "pixels points"]:
    return enlarging(points, pixels, device)


@lru_cache(SIZES)
def _blurring(pixels: int, sigma: float, device: torch.device) -> Float[Tensor, "pixels pixels"]:
    places = torch.arange(pixels, device=device, dtype=torch.float32)
    weights = torch.exp(-((places[:, None] - places) ** 2) / (2 * sigma**2))
    return weights / weights.sum(dim=1, keepdim=True)


@lru_cache(SIZES)
def _waves(count: int, device: torch.device) -> Float[Tensor, "count 8 8"]:
    """The patterns: each has a root mean square of 1 / sqrt(count)."""
    places = torch.arange(BLOCK, device="cpu", dtype=torch.float64)
    cosines = torch.cos((2 * places + 1) * places[:, None] * math.pi / (2 * BLOCK)) * math.sqrt(2)
    cosines[0] = 1.0
    patterns = [cosines[row][:, None] * cosines[column] for row, column in in_order()[:count]]
    return (torch.stack(patterns) / math.sqrt(count)).float().to(device)
