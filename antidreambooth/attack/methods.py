"""The published methods by name: which surrogate, which objective, how many steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from antidreambooth.attack.objectives import Denoising, Objective, Targeted


@dataclass(frozen=True)
class Method:
    """A method as its paper runs it; the files in ``configs/`` say the same.

    Args:
        rounds: how many.
        pgd_steps: in a round.
        objective: what the perturbation maximises.
        alternating: whether the surrogate learns in every round (ASPL) or is fixed.
        untouched: whether a fixed surrogate is the base model itself.
        several: whether it wants more than one base model.
    """

    rounds: int
    pgd_steps: int
    objective: Callable[[], Objective] = Denoising
    alternating: bool = False
    untouched: bool = False
    several: bool = False


METHODS = {
    "aspl": Method(50, 6, alternating=True),
    "t-aspl": Method(50, 6, Targeted, alternating=True),
    "e-aspl": Method(50, 6, alternating=True, several=True),
    "fsmg": Method(10, 10),
    "t-fsmg": Method(10, 10, Targeted),
    "e-fsmg": Method(10, 10, several=True),
    "advdm": Method(10, 10, untouched=True),
}
