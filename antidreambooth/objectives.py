"""What PGD climbs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from antidreambooth.backbone import Backbone
from antidreambooth.timesteps import TimestepSampler, Uniform


@dataclass(frozen=True)
class Draw:
    """The random part of a denoising loss, drawn for all images at once so that micro-batches do not change it."""

    timesteps: Int[Tensor, " n"]
    noise: Float[Tensor, "n c h w"]
    posterior_noise: Float[Tensor, "n c h w"]

    @classmethod
    def sample(
        cls, backbone: Backbone, shape: torch.Size, timesteps: TimestepSampler, generator: torch.Generator
    ) -> Draw:
        """For latents of ``shape`` (n c h w), on the generator's device."""
        drawn = timesteps(shape[0], backbone.timesteps, generator)
        noise, posterior_noise = torch.randn((2, *shape), generator=generator, device=generator.device)
        return cls(drawn, noise, posterior_noise)

    def rows(self, index: slice) -> Draw:
        """The part that belongs to some of the images."""
        return Draw(self.timesteps[index], self.noise[index], self.posterior_noise[index])


class Objective(ABC):
    """A number per image that PGD makes larger."""

    @abstractmethod
    def draw(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Draw:
        """The randomness of one evaluation, for all images."""

    @abstractmethod
    def __call__(
        self,
        backbone: Backbone,
        images: Float[Tensor, "n 3 h w"],
        embedding: Float[Tensor, "1 length width"],
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The objective of each image in [-1, 1], differentiable in the pixels."""


class Denoising(Objective):
    """The model's own loss L(x; w, c) (arXiv:2303.15433, Section 4): what DreamBooth makes smaller.

    For v-prediction the gradient also flows through the latents inside the target, as published.

    Args:
        timesteps: how t is drawn; uniformly when not given.
    """

    def __init__(self, timesteps: TimestepSampler | None = None) -> None:
        self.timesteps = timesteps or Uniform()

    def draw(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Draw:
        """The timestep, the noise and the posterior's noise of each image."""
        n, _, height, width = images.shape
        shape = torch.Size((n, backbone.latent_channels, height // backbone.downscale, width // backbone.downscale))
        return Draw.sample(backbone, shape, self.timesteps, generator)

    def __call__(
        self,
        backbone: Backbone,
        images: Float[Tensor, "n 3 h w"],
        embedding: Float[Tensor, "1 length width"],
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The denoising loss of each image."""
        latents = backbone.encode(images).sample(draw.posterior_noise)
        return backbone.denoising_loss(latents, draw.timesteps, draw.noise, embedding.expand(len(images), -1, -1))
