"""What every cloaking method shares: the perturbation as state, the round, logging."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from antidreambooth.objectives import Denoising, Objective
from antidreambooth.perturbation import PGD, STEP
from antidreambooth.rounds import Outcome, Photos
from antidreambooth.turns import Turn
from lightning_modules.backbone_module import BackboneModule


class Cloaking(BackboneModule):
    """A run that perturbs photos; one ``training_step``, one epoch, is one round of a method.

    Subclasses say what a round is. The perturbation (n 3 h w, in units of [-1, 1]) is a buffer: saved in checkpoints
    and, since gradients are averaged over ranks, identical on all of them.

    Args:
        backbone: base model: ``embedded``, a folder in diffusers layout, or a hub id.
        revision: branch, tag or commit of a hub id.
        variant: variant of the weights' files, such as ``fp16``; computed in fp32 all the same.
        resolution: side in pixels at which photos are cloaked; what the backbone was made for when not given.
        budget: largest change of any pixel's value, in 8-bit steps.
        step_size: change per PGD step, in 8-bit steps; a tenth of the budget when not given.
        pgd_steps: PGD steps in a round.
        micro_batch: photos whose gradient is taken at a time; memory grows with it, the result does not change.
        objective: what the perturbation maximises; Denoising when not given.
    """

    perturbation: Tensor
    buffers_kept = ("perturbation",)

    def __init__(
        self,
        *,
        backbone: str,
        revision: str | None,
        variant: str | None,
        resolution: int | None,
        budget: float,
        step_size: float | None,
        pgd_steps: int,
        micro_batch: int,
        objective: Objective | None,
    ) -> None:
        super().__init__(backbone=backbone, revision=revision, variant=variant, resolution=resolution)
        self.automatic_optimization = False
        self.attack = PGD(budget, step_size, pgd_steps, micro_batch, objective or Denoising(), self._average)
        self.register_buffer("perturbation", torch.empty(0))

    def training_step(self, batch: Photos, batch_idx: int) -> None:
        """One round."""
        if self.perturbation.numel() == 0:
            self.perturbation = torch.zeros_like(batch.originals)
        outcome = self.round(batch, batch.originals + self.perturbation)
        self.perturbation = outcome.cloaked - batch.originals
        self._log(outcome)

    def round(self, photos: Photos, cloaked: Tensor) -> Outcome:
        """What the method does in a round, given the photos as they are cloaked so far."""
        raise NotImplementedError

    @property
    def turn(self) -> Turn:
        """The round that is under way."""
        return self.turn_of(self.current_epoch)

    def effective(self) -> dict[str, Any]:
        """Also how the attack goes."""
        return {
            **super().effective(),
            "step_size": self.attack.effective_step_size,
            "objective": self.attack.objective,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also gives the perturbation its shape."""
        super().on_load_checkpoint(checkpoint)
        self.perturbation = torch.zeros_like(checkpoint["state_dict"]["perturbation"], device=self.device)

    def _average(self, gradient: Tensor) -> Tensor:
        return cast(Tensor, self.trainer.strategy.reduce(gradient, reduce_op="mean"))

    def _log(self, outcome: Outcome) -> None:
        values = {
            "surrogate/clean_loss": outcome.clean_loss,
            "surrogate/cloaked_loss": outcome.cloaked_loss,
            "pgd/objective": outcome.objective,
            "perturbation/largest": self.perturbation.abs().max() / STEP,
            "perturbation/mean": self.perturbation.abs().mean() / STEP,
        }
        # A metric named "step" is Lightning's x-axis; its own counts optimizer steps, six a round.
        values["step"] = torch.tensor(float(self.current_epoch + 1))
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=1)
