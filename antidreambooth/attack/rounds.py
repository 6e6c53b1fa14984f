"""The round: what every cloaking method repeats, written once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.canvas import Canvas
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.surrogates import Surrogate
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError


class Photos(NamedTuple):
    """What a round works on; the one batch of an epoch."""

    canvas: Canvas  # the photos to protect
    clean: Float[Tensor, "m 3 s s"]  # reference set A, in [-1, 1]


class Outcome(NamedTuple):
    """What a round leaves behind; of several surrogates the mean losses."""

    state: Tensor  # of the canvas
    clean_loss: Float[Tensor, ""]
    objective: Float[Tensor, ""]
    cloaked_loss: Float[Tensor, ""]
    slope: Float[Tensor, ""]  # mean absolute gradient of the objective in the pixels
    latents: Float[Tensor, ""]  # root mean square of the photos' latents
    weights: Float[Tensor, ""]  # norm of the weights that learn, 0 where none do
    memory: Sequence[Tensor] = ()  # of the step rule, for each surrogate

    @property
    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """On clean photos, the objective of PGD, on cloaked photos."""
        return self.clean_loss, self.objective, self.cloaked_loss

    @property
    def vital_signs(self) -> Float[Tensor, 6]:
        """What ``require_vital`` looks at, in one tensor, so that one copy from the device tells."""
        return torch.stack([*self.losses, self.slope, self.latents, self.weights])


def require_vital(signs: Sequence[float], turn: Turn) -> None:
    """Ends a run that does not work; to be called once a round, on every rank with the same values.

    Args:
        signs: ``Outcome.vital_signs``, over all ranks.
        turn: the round that they belong to.

    Raises:
        InputError: a number is not finite, or nothing moves the photos.
    """
    names = (
        "the surrogate's loss on clean photos",
        "the attack's objective",
        "the surrogate's loss on cloaked photos",
        "the gradient in the pixels",
        "the photos' latents",
        "a weight of the surrogate",
    )
    where = f"in round {turn.number + 1} of {turn.rounds}"
    for name, value in zip(names, signs, strict=True):
        if not math.isfinite(value):
            raise InputError(
                f"{name} is no finite number any more {where}, so the photos are not protected and not delivered: try "
                "a lower --model.surrogate.learning_rate, --trainer.precision 32-true or another base model"
            )
    if signs[3] == 0:
        raise InputError(
            f"the gradient in the pixels is 0 {where}, so nothing moves the photos and none is delivered: try another "
            "base model or --model.objective"
        )


def alternate(
    surrogates: Sequence[Surrogate],
    canvas: Canvas,
    state: Tensor,
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
        canvas: the photos to protect.
        state: of the canvas, what they have become so far.
        attack: projected gradient descent with its objective and budget.
        turn: number, seed and rank of this round.
        memory: what the step rule remembered of each surrogate in the round before; None before the first one.

    Returns:
        The photos after this round, the mean losses of both surrogate phases, the mean objective, and the memory.
    """
    generator = turn.generator(state.device)
    clean_losses, moved = [], []
    for number, surrogate in enumerate(surrogates):
        with surrogate.borrowed():
            clean_losses.append(surrogate.learn_clean(turn, generator))
            before = None if memory is None else memory[number]
            moved.append(attack(surrogate, canvas, state, turn, generator, before))
    state = attack.project(canvas, torch.stack([one.state for one in moved]).mean(dim=0))
    cloaked = canvas.lessons(state)
    cloaked_losses = [surrogate.learn_cloaked(cloaked, turn, generator) for surrogate in surrogates]
    return Outcome(
        state,
        clean_loss=torch.stack(clean_losses).mean(),
        objective=torch.stack([one.objective for one in moved]).mean(),
        cloaked_loss=torch.stack(cloaked_losses).mean(),
        slope=torch.stack([one.slope for one in moved]).mean(),
        latents=torch.stack([one.latents for one in moved]).mean(),
        weights=torch.stack([surrogate.weight_norm().to(state.device) for surrogate in surrogates]).mean(),
        memory=[one.memory for one in moved],
    )
