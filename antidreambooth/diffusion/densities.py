"""How often each timestep is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Int
from torch import Tensor

from antidreambooth.diffusion.seeding import normal
from antidreambooth.errors import require


class TimestepSampler(ABC):
    """Draws one timestep per image from {0 .. total - 1}; the higher, the more noise."""

    @abstractmethod
    def __call__(self, count: int, total: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """``count`` timesteps on the generator's device."""


class Uniform(TimestepSampler):
    """Every timestep with equal chance, as DreamBooth and Anti-DreamBooth draw it."""

    def __call__(self, count: int, total: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """``count`` timesteps on the generator's device."""
        return torch.randint(total, (count,), generator=generator, device=generator.device)


class LogitNormal(TimestepSampler):
    """The middle more often: the logit of the share of noise is normal (arXiv:2403.03206, equation 19).

    Args:
        mean: of the logit; above 0 more noise is drawn. diffusers counts from the noisy end: there its sign is other.
        std: of the logit.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        require("std", std, above=0)
        self.mean, self.std = mean, std

    def __call__(self, count: int, total: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """``count`` timesteps on the generator's device."""
        share = torch.sigmoid(normal((count,), generator) * self.std + self.mean)
        return (share * total).long().clamp(max=total - 1)
