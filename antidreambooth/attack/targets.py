"""Pictures that a targeted attack moves photos toward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import load_photos, to_float

Coordinates = Float[Tensor, "side side"]


def checkerboard(y: Coordinates, x: Coordinates) -> Coordinates:
    """Eight by eight squares, black and white."""
    return ((y * 8).floor() + (x * 8).floor()) % 2


def stripes(y: Coordinates, x: Coordinates) -> Coordinates:
    """Sixteen diagonal waves."""
    return 0.5 + 0.5 * torch.sin((x + y) * 16 * torch.pi)


def rings(y: Coordinates, x: Coordinates) -> Coordinates:
    """Sixteen rings around the centre."""
    return 0.5 + 0.5 * torch.cos(((x - 0.5).square() + (y - 0.5).square()).sqrt() * 32 * torch.pi)


def grey(y: Coordinates, x: Coordinates) -> Coordinates:
    """Nothing: one grey all over."""
    return torch.full_like(x, 0.5)


PATTERNS: dict[str, Callable[[Coordinates, Coordinates], Coordinates]] = {
    "checkerboard": checkerboard,
    "rings": rings,
    "stripes": stripes,
    "grey": grey,
}


def require_target(name: str) -> None:
    """Finds out before any work whether there is such a target.

    Raises:
        InputError: there is not.
    """
    if name not in PATTERNS and not Path(name).expanduser().is_file():
        raise InputError(f"the target {name!r} is no picture's file and none of our patterns: {', '.join(PATTERNS)}")


def target_image(name: str, side: int) -> Float[Tensor, "1 3 side side"]:
    """A pattern of ours or a picture's centred square, in [-1, 1].

    Args:
        name: one of ``PATTERNS``, or a picture's file.
        side: in pixels.

    Raises:
        InputError: there is no such pattern or picture, or it cannot be decoded.
    """
    require_target(name)
    if name not in PATTERNS:
        (photo,) = load_photos(Path(name), side)
        return to_float(photo.pixels[None])
    middle = (torch.arange(side, device="cpu", dtype=torch.float32) + 0.5) / side  # of each pixel, from 0 to 1
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return (PATTERNS[name](y, x) * 2 - 1).expand(1, 3, side, side)


class Goal:
    """What the encoder makes of a target, computed once for each base model.

    Args:
        target: one of ``PATTERNS``, or a picture's file.

    Raises:
        InputError: there is no such target.
    """

    def __init__(self, target: str) -> None:
        require_target(target)
        self.target = target
        self._known: WeakKeyDictionary[Backbone, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without latents: they belong to models that are in memory."""
        return {**self.__dict__, "_known": None}

    def prepare(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> None:
        """Encodes the target at the size of images, where they are."""
        self._latent(backbone, images.shape[-1], images)

    def __call__(self, backbone: Backbone, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The target's latent beside each of the photos' latents."""
        return self._latent(backbone, latents.shape[-1] * backbone.downscale, latents).expand_as(latents)

    def _latent(self, backbone: Backbone, side: int, like: Tensor) -> Float[Tensor, "1 c h w"]:
        if self._known is None:
            self._known = WeakKeyDictionary()
        if backbone not in self._known:
            picture = target_image(self.target, side).to(like)
            self._known[backbone] = backbone.encode_all(picture, 1).mean
        return self._known[backbone]
