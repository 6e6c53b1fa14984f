"""Models along one training run, of which each round attacks one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.surrogates import Alternating
from antidreambooth.diffusion.class_images import Progress
from antidreambooth.diffusion.defaults import given
from antidreambooth.diffusion.recording import uncounted
from antidreambooth.diffusion.seeding import Turn

BEFORE = 2**31  # number of the pool's first phase in the seed rule: no round has its noise


class Pooled(Alternating):
    """A pool of models along one DreamBooth run on the clean photos, each attacked in turn (MetaCloak).

    MetaCloak (arXiv:2311.13127) also trains each of them a few steps on the cloaked photos before every step of PGD
    and differentiates through that (meta-learning); here the pool stays as it is.

    The pool is trained when the first round of a process begins: from the base model, and so with the same result when
    a run is resumed. Its weights rest in main memory; with a LoRA these are small. Between the rounds the model's own
    weights are those of the base model.

    Args:
        args: those of ``Alternating``; the training's steps are those of the whole run.
        members: models of the pool, at equal distances along the run.
        progress: wraps the loop over the steps of the run.
    """

    def __init__(self, *args: Any, members: int, progress: Progress = iter) -> None:
        super().__init__(*args)
        self.number, self.progress = members, progress
        self.members: list[list[Tensor]] = []
        self.losses: list[Tensor] = []  # mean of the steps that lead to each

    def learn_clean(self, turn: Turn, generator: torch.Generator) -> Float[Tensor, ""]:
        """Takes the member whose turn it is; call it while borrowed. Returns the loss with which it was trained."""
        if not self.members:
            # A resumed run trains it again, which its first part has counted.
            with uncounted(self.backbone.denoiser) if turn.number else nullcontext():
                self._train(turn)
        chosen = turn.number % self.number
        self.weights.restore(self.members[chosen])
        torch.clear_autocast_cache()
        return self.losses[chosen]

    def learn_cloaked(
        self, images: Float[Tensor, "n 3 h w"], turn: Turn, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Learns nothing."""
        return torch.zeros((), device=generator.device, dtype=torch.float32)

    def _train(self, turn: Turn) -> None:
        """The run, with one AdamW from its beginning to its end; keeps each member's weights."""
        steps = given(self.training.steps, 0)
        length = steps // self.number
        self.weights.forget()
        losses: list[Tensor] = []
        for loss, step in zip(self._run(turn, length), self.progress(range(length * self.number)), strict=True):
            losses.append(loss)
            if (step + 1) % length == 0:
                self.members.append([weight.cpu() for weight in self.weights.snapshot()])
                self.losses.append(torch.stack(losses).mean())
                losses = []
        self.weights.forget()

    def _run(self, turn: Turn, length: int) -> Iterator[Float[Tensor, ""]]:
        """The losses of all steps; each phase has noise of its own."""
        for number in range(self.number):
            generator = replace(turn, number=BEFORE + number).generator(self.clean.mean.device)
            yield from self._steps(self.clean, length, replace(turn, number=number), generator)
