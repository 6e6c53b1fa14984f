"""Canvases of which PGD moves something else than values of pixels, or of which each pixel has a budget of its own.

The change of the pixels is W A x: x is the state, A the basis, and W says how the budget is spread. A x is kept within
the plain budget, and W is the pixel's own budget over that one: 1 everywhere for a plain one, and 0 where nothing may
change. A step is as large, in shares of its own budget, at each pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.basis import Basis
from antidreambooth.attack.canvas import Canvas, Looks, OwnSizeCanvas
from antidreambooth.attack.views import Views
from antidreambooth.photos.resampling import enlarged
from antidreambooth.photos.visibility import visible_bounds
from antidreambooth.photos.whole import Reduced


class OwnBudgets:
    """A budget for each pixel of each photo; see ``visible_bounds``. They are worked out when they are first needed.

    Args:
        pictures: 3 h w each, of 8 bits; they need not be of one size.
        plain: the budget that they are as visible as, in 8-bit steps.
    """

    def __init__(self, pictures: Sequence[Tensor], plain: float) -> None:
        self.pictures, self.plain = pictures, plain

    @cached_property
    def bounds(self) -> list[Tensor]:
        """Each h w, in whole 8-bit steps, on the CPU."""
        return [visible_bounds(picture, self.plain) for picture in self.pictures]

    @property
    def shares(self) -> list[Tensor]:
        """The same, in shares of the plain budget."""
        return [bound / self.plain for bound in self.bounds]


class ShapedSquares(Canvas):
    """Photos as squares of the model's resolution.

    Args:
        originals: the squares, n 3 h w in [-1, 1].
        basis: how the state becomes the change.
        budgets: each pixel's own; the same for all when not given.
    """

    def __init__(self, originals: Float[Tensor, "n 3 h w"], basis: Basis, budgets: OwnBudgets | None = None) -> None:
        self.originals, self.basis, self.budgets = originals, basis, budgets
        rows, columns = originals.shape[-2:]
        shape = (len(originals), *basis.shape(rows, columns))
        self.blank = torch.zeros(shape, device=originals.device, dtype=torch.float32)

    @cached_property
    def weights(self) -> Float[Tensor, "n 1 h w"] | None:
        """W; None for 1 everywhere."""
        if self.budgets is None:
            return None
        return torch.stack(self.budgets.shares)[:, None].to(self.originals.device)

    def to(self, device: torch.device) -> ShapedSquares:
        """The same on a device."""
        return ShapedSquares(self.originals.to(device), self.basis, self.budgets)

    def project(self, state: Float[Tensor, "n c a b"], radius: float) -> Float[Tensor, "n c a b"]:
        """The basis' own."""
        return self.basis.project(state, radius)

    def pixel_change(self, state: Float[Tensor, "n c a b"]) -> Float[Tensor, "n 3 h w"]:
        """W A x."""
        change = self.basis.change(state, *self.originals.shape[-2:])
        return change if self.weights is None else self.weights * change

    def images(self, state: Float[Tensor, "n c a b"], looks: Looks = ()) -> Float[Tensor, "n 3 h w"]:
        """The squares with their change, clipped to [-1, 1]; the gradient takes no notice of that."""
        return (self.originals + self.pixel_change(state)).clamp(-1, 1)

    def gradient(self, gradient: Float[Tensor, "n 3 h w"], looks: Looks) -> Float[Tensor, "n c a b"]:
        """A^T W g."""
        return self.basis.gradient(gradient if self.weights is None else self.weights * gradient)

    def bound(self, budget: float) -> float | Tensor:
        """The budget of each pixel, in 8-bit steps."""
        return budget if self.budgets is None else torch.stack(self.budgets.bounds)[:, None]


class ShapedGrids(OwnSizeCanvas):
    """A grid for each photo, which is enlarged to the photo's own size; the state is what all grids are made of.

    Args:
        photos: at the sizes of their grids.
        side: of the square that a model sees, in pixels.
        views: which parts of the photos the steps see.
        device: where the state lies.
        basis: how the state becomes the change of a grid.
        budgets: those of the grids' points; the same for all when not given.
    """

    def __init__(
        self,
        photos: Sequence[Reduced],
        side: int,
        views: Views | None = None,
        device: torch.device | None = None,
        *,
        basis: Basis,
        budgets: OwnBudgets | None = None,
    ) -> None:
        super().__init__(photos, side, views, device)
        self.basis, self.budgets = basis, budgets
        self.shapes = [basis.shape(*picture.shape[-2:]) for picture in self.pictures]
        self.sizes = [c * a * b for c, a, b in self.shapes]
        self.blank = torch.zeros(sum(self.sizes), device=self.device, dtype=torch.float32)

    @cached_property
    def weights(self) -> list[Tensor | None]:
        """W of each photo's grid; None for 1 everywhere."""
        return [self._weights(index) for index in range(len(self.photos))]

    def to(self, device: torch.device) -> ShapedGrids:
        """The same on a device."""
        if device == self.device:
            return self
        return ShapedGrids(self.photos, self.side, self.views, device, basis=self.basis, budgets=self.budgets)

    def grids(self, state: Float[Tensor, " values"]) -> list[Float[Tensor, "3 gh gw"]]:
        """W A x of each photo."""
        made = zip(self.parts(state), self.pictures, self.weights, strict=True)
        changes = ((self.basis.change(part[None], *picture.shape[-2:])[0], w) for part, picture, w in made)
        return [change if weights is None else weights * change for change, weights in changes]

    def project(self, state: Float[Tensor, " values"], radius: float) -> Float[Tensor, " values"]:
        """The basis' own, photo by photo."""
        return torch.cat([self.basis.project(part[None], radius).flatten() for part in self.parts(state)])

    def gradient(self, gradient: Float[Tensor, "n 3 s s"], looks: Looks) -> Float[Tensor, " values"]:
        """A^T W, of the gradient in the grids."""
        grids = zip(self.grid_gradients(gradient, looks), self.weights, strict=True)
        weighted = (grid if weights is None else weights * grid for grid, weights in grids)
        return torch.cat([self.basis.gradient(grid[None]).flatten() for grid in weighted])

    def pixel_change(self, state: Float[Tensor, " values"]) -> Float[Tensor, " points"]:
        """Of all grids, one after the other."""
        return torch.cat([grid.flatten() for grid in self.grids(state)])

    def bound(self, index: int, budget: float) -> float | Tensor:
        """The budget of each of a photo's pixels, h w in 8-bit steps: that of the grid's points, enlarged."""
        return budget if self.budgets is None else enlarged(self.budgets.bounds[index], self.photos[index].size)

    def _weights(self, index: int) -> Float[Tensor, "gh gw"] | None:
        """What a photo's grid is multiplied by."""
        allowed = self.photos[index].allowed
        mask = None if allowed is None else allowed.float()
        spread = None if self.budgets is None else self.budgets.shares[index]
        parts = [part.to(self.device) for part in (mask, spread) if part is not None]
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] * parts[1]
