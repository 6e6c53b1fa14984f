"""The round: what every cloaking method repeats, written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.surrogates import Surrogate
from antidreambooth.diffusion.seeding import Turn


class Photos(NamedTuple):
    """What a round works on, in [-1, 1]; the one batch of an epoch."""

    originals: Float[Tensor, "n 3 h w"]  # to protect
    clean: Float[Tensor, "m 3 h w"]  # reference set A


class Outcome(NamedTuple):
    """What a round leaves behind; of several surrogates the means."""

    cloaked: Float[Tensor, "n 3 h w"]
    clean_loss: Float[Tensor, ""]
    objective: Float[Tensor, ""]
    cloaked_loss: Float[Tensor, ""]


def alternate(
    surrogates: Sequence[Surrogate],
    originals: Float[Tensor, "n 3 h w"],
    cloaked: Float[Tensor, "n 3 h w"],
    attack: PGD,
    turn: Turn,
) -> Outcome:
    """One round of ASPL (arXiv:2303.15433, Section 4: alternating surrogate and perturbation learning).

    With a surrogate that does not learn it is a round of FSMG or AdvDM; with several it is one of their ensembles:
    each moves the same photos on its own, and the mean of what comes out is what all of them then learn from, as it
    is what gets published.

    Args:
        surrogates: the models that the gradient is taken through; trained in place.
        originals: the photos to protect, in [-1, 1].
        cloaked: what they have become so far.
        attack: projected gradient descent with its objective and budget.
        turn: number, seed and rank of this round.

    Returns:
        The photos after this round, the mean losses of both surrogate phases and the mean objective.
    """
    generator = turn.generator(originals.device)
    moved: list[Tensor] = []
    clean_losses, objectives = [], []
    for surrogate in surrogates:
        with surrogate.borrowed():
            clean_losses.append(surrogate.learn_clean(turn, generator))
            images, objective = attack(surrogate, originals, cloaked, generator)
        moved.append(images)
        objectives.append(objective)
    cloaked = attack.project(torch.stack(moved).mean(dim=0), originals)
    cloaked_losses = [surrogate.learn_cloaked(cloaked, turn, generator) for surrogate in surrogates]
    return Outcome(cloaked, *(torch.stack(values).mean() for values in (clean_losses, objectives, cloaked_losses)))
