"""What is random in a step of diffusion: the timestep, the noise, the sample from the posterior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.densities import TimestepSampler
from antidreambooth.diffusion.seeding import normal


@dataclass(frozen=True)
class Draw:
    """The random part of an objective, drawn for all images at once so that micro-batches do not change it."""

    timesteps: Int[Tensor, " n"]
    noise: Float[Tensor, "n c h w"]
    posterior_noise: Float[Tensor, "n c h w"]
    transforms: tuple[Float[Tensor, "n _"], ...] = ()  # one for each random transform

    @classmethod
    def sample(
        cls,
        backbone: Backbone,
        shape: Sequence[int],
        generator: torch.Generator,
        timesteps: TimestepSampler | None = None,
    ) -> Draw:
        """For latents of ``shape`` (n c h w), on the generator's device; timesteps as the base model wants them."""
        drawn = (timesteps or backbone.density)(shape[0], len(backbone.noising), generator)
        noise, posterior_noise = normal((2, *shape), generator)
        return cls(drawn, noise, posterior_noise)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, one after the other."""
        return self.timesteps, self.noise, self.posterior_noise, *self.transforms

    @classmethod
    def of_tensors(cls, drawn: Sequence[Tensor]) -> Draw:
        """What has these tensors."""
        timesteps, noise, posterior_noise, *transforms = drawn
        return cls(timesteps, noise, posterior_noise, tuple(transforms))

    def rows(self, index: slice) -> Draw:
        """The part that belongs to some of the images."""
        numbers = tuple(drawn[index] for drawn in self.transforms)
        return Draw(self.timesteps[index], self.noise[index], self.posterior_noise[index], numbers)
