"""What PGD does with a gradient: which way a step goes, how long it is, and where the first one starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.errors import InputError, require

Schedule = Literal["constant", "linear"]


class StepRule(ABC):
    """Turns gradients into steps. Each photo is treated by itself, so that micro-batches and ranks change nothing.

    A subclass says which way a step goes (``direction``) and, if it remembers something, what it starts from
    (``begin``) and whether that outlives a round (``lasting``).

    Args:
        schedule: of the step size over the whole run: ``constant`` as published, or ``linear``: it falls in equal
            parts from the whole step size at the first step to nothing after the last one.
        random_start: whether the perturbation starts at uniform noise within the budget (arXiv:1706.06083, Section 2.1)
            and not at nothing, as published (arXiv:2303.15433, Section 4).
    """

    lasting: bool = False  # whether the memory is handed from round to round, and kept in checkpoints

    def __init__(self, schedule: str = "constant", random_start: bool = False) -> None:
        if schedule not in ("constant", "linear"):
            raise InputError(f"the step size's schedule is constant or linear, got {schedule!r}")
        self.schedule, self.random_start = schedule, random_start

    def begin(self, images: Float[Tensor, "n c h w"]) -> Tensor:
        """What is remembered before the first step on such images: nothing, unless a subclass says otherwise."""
        return images.new_zeros(0)

    @abstractmethod
    def direction(self, gradient: Float[Tensor, "n c h w"], memory: Tensor) -> tuple[Float[Tensor, "n c h w"], Tensor]:
        """Which way a step goes, and what is remembered for the next one.

        Args:
            gradient: of the objective, in the pixels.
            memory: from ``begin``, or from the step before.

        Returns:
            The change of the pixels in units of the step size, and the new memory.
        """

    def factor(self, progress: float) -> float:
        """The step size, as a share of the whole one, after ``progress`` (0 to 1) of the run."""
        return max(0.0, 1 - progress) if self.schedule == "linear" else 1.0


class Sign(StepRule):
    """The gradient's sign: each value of each pixel changes by the step size (arXiv:1706.06083; as published).

    Args:
        schedule: of the step size: ``constant`` (as published) or ``linear``, down to nothing.
        random_start: whether the perturbation starts at noise within the budget.
    """

    def __init__(self, schedule: Schedule = "constant", random_start: bool = False) -> None:
        super().__init__(schedule, random_start)

    def direction(self, gradient: Float[Tensor, "n c h w"], memory: Tensor) -> tuple[Float[Tensor, "n c h w"], Tensor]:
        """The sign."""
        return gradient.sign(), memory


class Momentum(StepRule):
    """MI-FGSM (arXiv:1710.06081, Algorithm 1): the sign of a decaying sum of gradients, each of L1 norm 1.

    g <- decay g + gradient / || gradient ||_1; a step goes along sign(g). Each photo has a norm of its own.

    Args:
        decay: of the sum, from 0 to 1; the paper's mu. With 0 it is the plain sign.
        across_rounds: whether the sum goes on from round to round; it starts at nothing in each one otherwise.
        schedule: of the step size: ``constant`` or ``linear``, down to nothing.
        random_start: whether the perturbation starts at noise within the budget.
    """

    def __init__(
        self,
        decay: float = 1.0,
        across_rounds: bool = True,
        schedule: Schedule = "constant",
        random_start: bool = False,
    ) -> None:
        super().__init__(schedule, random_start)
        require("decay", decay, 0, 1)
        self.decay, self.across_rounds = decay, across_rounds
        self.lasting = across_rounds

    def begin(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """No gradient so far."""
        return torch.zeros_like(images)

    def direction(self, gradient: Float[Tensor, "n c h w"], memory: Tensor) -> tuple[Float[Tensor, "n c h w"], Tensor]:
        """The sign of the sum, and the sum."""
        total = self.decay * memory + gradient / _positive(gradient.abs().sum(dim=(1, 2, 3), keepdim=True))
        return total.sign(), total


class NormalizedL2(StepRule):
    """The gradient itself, at a fixed length: strong where the gradient is, not the same everywhere (arXiv:1706.06083).

    A photo's step has a root mean square of one step size over all values, so that it is as long (in L2) as a step of
    ``Sign``. The budget stays a bound of each value.

    Args:
        schedule: of the step size: ``constant`` or ``linear``, down to nothing.
        random_start: whether the perturbation starts at noise within the budget.
    """

    def __init__(self, schedule: Schedule = "constant", random_start: bool = False) -> None:
        super().__init__(schedule, random_start)

    def direction(self, gradient: Float[Tensor, "n c h w"], memory: Tensor) -> tuple[Float[Tensor, "n c h w"], Tensor]:
        """The gradient over its root mean square."""
        return gradient / _positive(gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()), memory


def _positive(norm: Tensor) -> Tensor:
    """A norm to divide by: a gradient of zero gives no step, not NaN; one of NaN stays what it is."""
    return torch.where(norm == 0, 1.0, norm)
