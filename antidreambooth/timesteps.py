"""How the diffusion timestep t is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Int
from torch import Tensor


class TimestepSampler(ABC):
    """Draws one timestep per image from {0 .. total - 1}."""

    @abstractmethod
    def __call__(self, count: int, total: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """``count`` timesteps on the generator's device."""


class Uniform(TimestepSampler):
    """Every timestep with equal chance, as DreamBooth and Anti-DreamBooth draw it."""

    def __call__(self, count: int, total: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """``count`` timesteps on the generator's device."""
        return torch.randint(total, (count,), generator=generator, device=generator.device)
