"""How often each timestep is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from antidreambooth.diffusion.seeding import normal, uniform
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


class Range(TimestepSampler):
    """Every timestep of a part of the schedule with equal chance.

    Args:
        low: where the part begins, as a share of the schedule: 0 is its clean end.
        high: where it ends: 1 is the end of pure noise.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        require("low", low, 0, 1)
        require("high", high, above=low, most=1)
        self.low, self.high = low, high

    def __call__(self, count: int, total: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """``count`` timesteps on the generator's device."""
        first = min(round(self.low * total), total - 1)
        end = max(round(self.high * total), first + 1)
        return torch.randint(first, end, (count,), generator=generator, device=generator.device)


class LargestGradient(TimestepSampler):
    """For each image the part of the schedule in which its gradient in the pixels is largest.

    SimAC's greedy choice of timesteps (arXiv:2312.07865), without its search before the attack. The attack's own
    gradients are what is measured, so that it takes no more passes than ``Uniform``: each image first visits all parts
    of the schedule, and then stays in the one of the largest mean gradient, but for a few steps that look elsewhere.
    What is known is the same on every rank, belongs in checkpoints, and is shared by the models of an ensemble.

    Args:
        windows: equal parts of the schedule to choose from.
        visits: steps that each image first spends in each part.
        explore: share of the later steps whose part is drawn from all of them, from 0 to 1.
    """

    def __init__(self, windows: int = 10, visits: int = 2, explore: float = 0.1) -> None:
        require("windows", windows, 2)
        require("visits", visits, 1)
        require("explore", explore, 0, 1)
        self.windows, self.visits, self.explore = windows, visits, explore
        self.begin()

    def begin(self) -> None:
        """Nothing is known yet."""
        self.table: Tensor | None = None  # 2 n windows: sums of magnitudes, and of how many
        self.drawn: Tensor | None = None  # n: the parts of the last step

    def known(self, count: int, device: torch.device) -> Float[Tensor, "2 n windows"]:
        """What is known of so many images."""
        if self.table is None:
            self.table = torch.zeros((2, count, self.windows), device=device, dtype=torch.float32)
        return self.table.to(device)

    def __call__(self, count: int, total: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """A timestep for each of ``count`` images, always the same ones, on the generator's device."""
        sums, visits = self.known(count, generator.device)
        rare = visits < self.visits
        best = self._marked((sums / visits.clamp(min=1e-12)).argmax(dim=1))
        chance, *numbers, place = uniform((self.windows + 2, count), generator)
        wanted = torch.where(rare.any(dim=1, keepdim=True), rare, best | (chance < self.explore)[:, None])
        self.drawn = (torch.stack(numbers, dim=1) - 2 * ~wanted).argmax(dim=1)  # one of the wanted, with equal chance
        timesteps: Tensor = ((self.drawn + place) * (total / self.windows)).long()
        return timesteps.clamp(max=total - 1)

    def observe(self, magnitudes: Float[Tensor, " n"], reduce: Callable[[Tensor], Tensor]) -> None:
        """Takes note of how large each image's gradient was at the timesteps that were drawn last.

        Args:
            magnitudes: mean absolute value of the gradient in an image's pixels.
            reduce: averages over processes.
        """
        assert self.drawn is not None  # a gradient comes after its draw
        here = self._marked(self.drawn).to(magnitudes)
        self.table = self.known(len(here), here.device) + reduce(torch.stack([here * magnitudes[:, None], here]))

    def _marked(self, windows: Int[Tensor, " n"]) -> Bool[Tensor, "n windows"]:
        marked: Tensor = windows[:, None] == torch.arange(self.windows, device=windows.device)
        return marked
