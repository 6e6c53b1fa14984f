"""The round: what every cloaking method repeats, written once."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from antidreambooth.backbone import Posterior
from antidreambooth.perturbation import PGD
from antidreambooth.surrogates import Surrogate
from antidreambooth.turns import Turn


class Photos(NamedTuple):
    """What a round works on, in [-1, 1]; the one batch of an epoch."""

    originals: Float[Tensor, "n 3 h w"]  # to protect
    clean: Float[Tensor, "m 3 h w"]  # reference set A


class Outcome(NamedTuple):
    """What a round leaves behind."""

    cloaked: Float[Tensor, "n 3 h w"]
    clean_loss: Float[Tensor, ""]
    objective: Float[Tensor, ""]
    cloaked_loss: Float[Tensor, ""]


def alternate(
    surrogate: Surrogate,
    clean: Posterior,
    originals: Float[Tensor, "n 3 h w"],
    cloaked: Float[Tensor, "n 3 h w"],
    attack: PGD,
    turn: Turn,
) -> Outcome:
    """One round of ASPL (arXiv:2303.15433, Section 4: alternating surrogate and perturbation learning).

    Args:
        surrogate: the model that the gradient is taken through; trained in place.
        clean: latents of the reference set A.
        originals: the photos to protect, in [-1, 1].
        cloaked: what they have become so far.
        attack: projected gradient descent with its objective and budget.
        turn: number, seed and rank of this round.

    Returns:
        The photos after this round, the mean losses of both surrogate phases and the mean objective.
    """
    generator = turn.generator(originals.device)
    with surrogate.borrowed():
        clean_loss = surrogate.learn(clean, turn, generator)
        cloaked, objective = attack(surrogate, originals, cloaked, generator)
    posterior = surrogate.backbone.encode_all(cloaked, attack.micro_batch)
    cloaked_loss = surrogate.learn(posterior, turn, generator)
    return Outcome(cloaked, clean_loss, objective, cloaked_loss)
