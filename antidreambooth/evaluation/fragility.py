"""How far an autoencoder can be fooled: what is left, behind it, of a change that was made to a picture."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.errors import InputError
from antidreambooth.evaluation.quality import lpips, lpips_available
from antidreambooth.photos.decoding import to_float


class Compression(NamedTuple):
    """How many numbers an autoencoder keeps of how many values of a picture."""

    numbers: int
    values: int

    def __str__(self) -> str:
        return f"{self.numbers} numbers for {self.values} values, 1 of {self.values / self.numbers:g}"


def compression(backbone: Backbone, side: int) -> Compression:
    """Of a square picture of ``side`` pixels; the embedded model's is 1 of 12, Stable Diffusion 1.5's 1 of 48."""
    channels, height, width = backbone.latent_shape(side, side)
    return Compression(channels * height * width, 3 * side**2)


class Remains(NamedTuple):
    """What is left of a change, one value for each picture.

    Args:
        shift: || E(changed) - E(clean) ||, of the latents' means, as a share of the mean distance between the latents
            of two clean pictures.
        left: || E(changed) - goal || as a share of || E(clean) - goal ||; NaN where there is no goal.
        moved: root mean square of D(E(changed)) - D(E(clean)), in 8-bit steps: what the decoder shows of the change.
        error: root mean square of D(E(changed)) - changed, in 8-bit steps: how unfaithfully the autoencoder gives back
            what went in.
        lpips: perceptual distance of the same two; None where its weights are not there.
        decoded: D(E(changed)) in 8 bits.
    """

    shift: Float[Tensor, " n"]
    left: Float[Tensor, " n"]
    moved: Float[Tensor, " n"]
    error: Float[Tensor, " n"]
    lpips: Float[Tensor, " n"] | None
    decoded: UInt8[Tensor, "n 3 h w"]


class Fragility:
    """Clean pictures and what an autoencoder makes of them, to compare with.

    Args:
        backbone: whose autoencoder it is; its decoder is asked, too.
        clean: the pictures, in 8 bits; two or more, as a shift is measured in the distance between two.
        goal: a picture, 1 3 h w in [-1, 1], that the changed ones are pulled to.
        micro_batch: pictures at a time.

    Raises:
        InputError: there are no two different pictures.
    """

    def __init__(
        self, backbone: Backbone, clean: UInt8[Tensor, "n 3 h w"], goal: Float[Tensor, "1 3 h w"], micro_batch: int = 4
    ) -> None:
        self.backbone, self.micro_batch = backbone, micro_batch
        self.latents = self._encode(to_float(clean))
        self.decoded, self.goal = self._decode(self.latents), self._encode(goal)
        self.apart = mean_distance(self.latents) if len(clean) > 1 else 0.0
        if not self.apart:
            raise InputError(
                "give two different photos or more: how far a latent moves is told as a share of the distance between "
                "two of them"
            )

    def __call__(self, changed: UInt8[Tensor, "n 3 h w"], pulled: bool = False) -> Remains:
        """What is left of a change.

        Args:
            changed: the pictures after the change, in 8 bits, in the order of the clean ones.
            pulled: whether they were pulled to the goal.
        """
        latents = self._encode(to_float(changed))
        decoded = self._decode(latents)
        left = norm(latents - self.goal) / norm(self.latents - self.goal)
        return Remains(
            shift=norm(latents - self.latents) / self.apart,
            left=left if pulled else torch.full_like(left, torch.nan),
            moved=root_mean_square(decoded, self.decoded),
            error=root_mean_square(decoded, changed),
            lpips=lpips(changed, decoded).cpu() if lpips_available() else None,
            decoded=decoded,
        )

    def _encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Means of the latents, on the CPU."""
        return self.backbone.encode_all(images.to(self.backbone.device), self.micro_batch).mean.cpu()

    @torch.no_grad()
    def _decode(self, latents: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n 3 H W"]:
        parts = [self.backbone.decode(part.to(self.backbone.device)) for part in torch.split(latents, self.micro_batch)]
        return ((torch.cat(parts).cpu() + 1) * 127.5).round().to(torch.uint8)


def norm(latents: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """The length of each latent."""
    lengths: Tensor = latents.flatten(1).norm(dim=1)
    return lengths


def mean_distance(latents: Float[Tensor, "n c h w"]) -> float:
    """The mean distance between two of them, over all pairs."""
    return float(torch.pdist(latents.flatten(1)).mean())


def root_mean_square(a: UInt8[Tensor, "n 3 h w"], b: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Of the difference of each two pictures, in 8-bit steps."""
    return (a.float() - b.float()).square().mean(dim=(1, 2, 3)).sqrt()
