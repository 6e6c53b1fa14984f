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
    """What a round leaves behind; of several surrogates the mean losses."""

    cloaked: Float[Tensor, "n 3 h w"]
    clean_loss: Float[Tensor, ""]
    objective: Float[Tensor, ""]
    cloaked_loss: Float[Tensor, ""]
    memory: Sequence[Tensor] = ()  # of the step rule, for each surrogate

    @property
    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """On clean photos, the objective of PGD, on cloaked photos."""
        return self.clean_loss, self.objective, self.cloaked_loss


def alternate(
    surrogates: Sequence[Surrogate],
    originals: Float[Tensor, "n 3 h w"],
    cloaked: Float[Tensor, "n 3 h w"],
    attack: PGD,
    turn: Turn,
    memory: Sequence[Tensor] | None = None,
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
        memory: what the step rule remembered of each surrogate in the round before; None before the first one.

    Returns:
        The photos after this round, the mean losses of both surrogate phases, the mean objective, and the memory.
    """
    generator = turn.generator(originals.device)
    clean_losses, moved = [], []
    for number, surrogate in enumerate(surrogates):
        with surrogate.borrowed():
            clean_losses.append(surrogate.learn_clean(turn, generator))
            before = None if memory is None else memory[number]
            moved.append(attack(surrogate, originals, cloaked, turn, generator, before))
    cloaked = attack.project(torch.stack([one.images for one in moved]).mean(dim=0), originals)
    cloaked_losses = [surrogate.learn_cloaked(cloaked, turn, generator) for surrogate in surrogates]
    return Outcome(
        cloaked,
        clean_loss=torch.stack(clean_losses).mean(),
        objective=torch.stack([one.objective for one in moved]).mean(),
        cloaked_loss=torch.stack(cloaked_losses).mean(),
        memory=[one.memory for one in moved],
    )
