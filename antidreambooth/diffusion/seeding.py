"""Which round it is and for whom: the one seed rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from antidreambooth.errors import require

LARGEST = 2**32 - 1  # seed that NumPy and Lightning take


def require_seed(name: str, seed: int) -> None:
    """Refuses what is no seed; ``name`` is what its owner calls it.

    Raises:
        OutOfRangeError: it is not from 0 to ``LARGEST``.
    """
    require(name, seed, 0, LARGEST)


def uniform(shape: Sequence[int], generator: torch.Generator) -> Float32[Tensor, "*shape"]:
    """Numbers in [0, 1), where the generator is; all noise says where and in what, as defaults belong to the caller."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)


def normal(shape: Sequence[int], generator: torch.Generator) -> Float32[Tensor, "*shape"]:
    """Standard normal numbers, where the generator is."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


@dataclass(frozen=True)
class Turn:
    """All that a round's randomness and its choice of images depend on, so that resuming needs no saved random state.

    Args:
        number: rounds done before this one.
        seed: the run's seed.
        rank: this process among ``ranks``.
        ranks: processes that work on the same photos.
        rounds: of the whole run, which a falling step size has to know.
    """

    number: int
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    rounds: int = 1

    def generator(self, device: torch.device) -> torch.Generator:
        """A fresh source of noise for this round."""
        (word,) = np.random.SeedSequence([self.seed, self.rank, self.number]).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(word))

    def numbers(self, step: int, rows: int, columns: int) -> list[list[float]]:
        """Numbers in [0, 1) that the host has to know, for a step of this round.

        Args:
            step: its number.
            rows: of numbers.
            columns: numbers in a row.
        """
        # 1 keeps them apart from the noise: SeedSequence takes a shorter list as one that ends in zeros.
        source = np.random.default_rng(np.random.SeedSequence([self.seed, self.rank, self.number, 1, step]))
        drawn: list[list[float]] = source.random((rows, columns)).tolist()
        return drawn

    def progress(self, share: float) -> float:
        """How much of the run is done, from 0 to 1, after ``share`` (0 to 1) of this round."""
        return (self.number + share) / self.rounds

    def batches(self, steps: int, size: int, count: int, device: torch.device) -> list[Int[Tensor, " size"]]:
        """Which of ``count`` images this rank trains on in each step of a phase.

        The index goes on from round to round and from rank to rank, so that every image gets its turn; the
        published code starts every phase at image 0.
        """
        first = self.number * steps
        starts = [((first + step) * self.ranks + self.rank) * size for step in range(steps)]
        # Made on the device: an index that comes from the CPU makes the host wait in each step.
        return [torch.arange(start, start + size, device=device) % count for start in starts]
