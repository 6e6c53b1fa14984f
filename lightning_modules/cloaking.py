"""What every cloaking method shares: the perturbation as state, checkpoints, settings, logging."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor

from antidreambooth.backbone import Backbone
from antidreambooth.errors import InputError
from antidreambooth.loading import load_backbone, resolution_of
from antidreambooth.objectives import Denoising, Objective
from antidreambooth.perturbation import PGD, STEP
from antidreambooth.records import describe, differences
from antidreambooth.rounds import Outcome, Photos
from antidreambooth.turns import Turn

PRECISIONS = ("32-true", "bf16-mixed")


class Cloaking(LightningModule):
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

    backbone: Backbone
    perturbation: Tensor

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
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not in checkpoints; on_load_checkpoint checks the rest
        self.attack = PGD(budget, step_size, pgd_steps, micro_batch, objective or Denoising(), self._average)
        self.resolution = resolution or resolution_of(backbone, revision)
        self.register_buffer("perturbation", torch.empty(0))

    def setup(self, stage: str) -> None:
        """Refuses half-true precision before any weight is loaded."""
        if self.trainer.precision not in PRECISIONS:
            raise InputError(
                f"{type(self).__name__} keeps fp32 weights: use --trainer.precision {' or '.join(PRECISIONS)}, "
                f"got {self.trainer.precision}"
            )

    def configure_model(self) -> None:
        """Loads the backbone onto the device that will run it."""
        if hasattr(self, "backbone"):
            return
        settings = self.hparams
        self.backbone = load_backbone(settings.backbone, settings.revision, settings.variant)
        self.backbone.to(self.trainer.strategy.root_device)
        self.fingerprint = self.backbone.fingerprint()

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
        return Turn(self.current_epoch, self.seed, self.global_rank, self.trainer.world_size)

    @property
    def seed(self) -> int:
        """The run's seed, where ``seed_everything`` leaves it."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def record(self) -> dict[str, Any]:
        """What determines the result, as plain values: for the manifest, and to refuse to go on with other settings."""
        effective = {
            "resolution": self.resolution,
            "step_size": self.attack.effective_step_size,
            "objective": self.attack.objective,
            "backbone_sha256": self.fingerprint,
        }
        model = {"class": type(self).__name__, **describe({**self.hparams, **effective})}
        settings = {"model": model, "precision": self.trainer.precision}
        data = getattr(self.trainer, "datamodule", None)
        return {"seed": self.seed, "settings": settings, **(data.record() if data is not None else {})}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was trained, and the settings that it belongs to."""
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad} | {"perturbation"}
        checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name in kept}
        checkpoint.pop(self.CHECKPOINT_HYPER_PARAMS_KEY, None)
        checkpoint["record"] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other settings; gives the perturbation its shape."""
        changed = differences(checkpoint.get("record", {}), self.record())
        if changed:
            raise InputError(
                "the checkpoint was made with other settings: "
                + "; ".join(changed)
                + ". Go on with the same ones, or start anew without --ckpt_path"
            )
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
