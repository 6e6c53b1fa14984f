"""What a trainer makes of a photo: a square of it at the model's resolution, as one small matrix for each side.

Along one side, a resize is a matrix: ``enlarging`` from a grid to the photo's own size, ``viewing`` from there to the
square that a model sees. Their product has neither the grid's nor the photo's full size but (square x grid), and costs
the same for every photo.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import interpolate

FINE = 8  # points for each of the grid's that stand for a side that is longer than that


def enlarging(grid: int, full: int, device: torch.device) -> Float32[Tensor, "full grid"]:
    """Bilinear enlargement of one side, as torch's ``interpolate`` does it (align_corners=False)."""
    where = ((_middles(full, device) * (grid / full)) - 0.5).clamp(0, grid - 1)
    return _triangle(where[:, None] - torch.arange(grid, device=device, dtype=torch.float32))


def viewing(full: int, start: float, length: float, side: int, device: torch.device) -> Float32[Tensor, "side full"]:
    """A stretch of one side, resized with antialiasing by the bilinear kernel, as Pillow does with ``box``.

    Args:
        full: pixels of the side.
        start: where the stretch begins, in pixels.
        length: of the stretch, in pixels.
        side: pixels of the result.
        device: where the matrix is made; nothing is copied.
    """
    scale = length / side
    centres = start + _middles(side, device) * scale
    weights = _triangle((_middles(full, device) - centres[:, None]) / max(scale, 1.0))
    return weights / weights.sum(dim=1, keepdim=True)


def seeing(
    grid: int, full: int, start: float, length: float, side: int, device: torch.device
) -> Float32[Tensor, "side grid"]:
    """``viewing`` of what ``enlarging`` makes of a grid.

    A side of more than ``FINE`` times the grid's points is stood for by so many: the kernels are much wider than that,
    and the matrix differs by less than a hundredth (relative, in the Frobenius norm).
    """
    fine = min(full, FINE * grid)
    ratio = fine / full
    return viewing(fine, start * ratio, length * ratio, side, device) @ enlarging(grid, fine, device)


def along(
    grid: int, full: int, start: float, length: float, side: int, device: torch.device
) -> tuple[Float32[Tensor, "side grid"], Float32[Tensor, "side grid"]]:
    """What a step needs of one side: ``seeing`` for the change, which is enlarged, and ``viewing`` for the photo.

    The photo is known at the grid's size, too, but as what it was scaled down to and not as something to enlarge.
    """
    ratio = grid / full
    photo = viewing(grid, start * ratio, length * ratio, side, device)
    return seeing(grid, full, start, length, side, device), photo


def enlarged(grid: Float[Tensor, "gh gw"], size: tuple[int, int]) -> Float[Tensor, "h w"]:
    """One channel of a grid at a photo's own size (width and height), bilinearly: a mean of its points."""
    return interpolate(grid[None, None], size[::-1], mode="bilinear")[0, 0]


def grid_size(size: tuple[int, int], points: int, longest: int = 4) -> tuple[int, int]:
    """Width and height of a grid whose short side has ``points``, or the photo's own pixels where it has fewer.

    Args:
        size: of the photo, width and height.
        points: of the short side.
        longest: the long side has at most so many times the points of the short one: a panorama's grid is coarser
            along it.
    """
    short = min(points, *size)
    ratio = short / min(size)
    width, height = (min(length, short * longest, math.ceil(length * ratio)) for length in size)
    return width, height


def _middles(count: int, device: torch.device) -> Float32[Tensor, " count"]:
    return torch.arange(count, device=device, dtype=torch.float32) + 0.5


def _triangle(distance: Tensor) -> Tensor:
    """The bilinear kernel."""
    return (1 - distance.abs()).clamp(min=0)
