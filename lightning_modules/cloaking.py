"""What every cloaking method shares: the perturbation as state, the round, logging."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from antidreambooth.attack.cost import counted
from antidreambooth.attack.objectives import Denoising, Objective
from antidreambooth.attack.perturbation import PGD, STEP
from antidreambooth.attack.rounds import Outcome, Photos, alternate
from antidreambooth.attack.surrogates import Offloaded, Surrogate
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.loading import locate
from antidreambooth.diffusion.seeding import Turn
from lightning_modules.backbone_module import BackboneModule


@dataclass(frozen=True)
class Ensemble:
    """Further base models to attack beside the first (arXiv:2303.15433, Section 4: ensemble-based variants).

    Args:
        backbones: ``embedded``, folders in diffusers layout, or hub ids.
        offload: whether from the first round on only the one at work is on the device, and the others rest in main
            memory; for a single process.
    """

    backbones: list[str] = field(default_factory=list)
    offload: bool = False


class Cloaking(BackboneModule):
    """A run that perturbs photos; one ``training_step``, one epoch, is one round of a method.

    Subclasses say what the surrogates are. The perturbation (n 3 h w, in units of [-1, 1]) is a buffer: saved in
    checkpoints and, since gradients are averaged over ranks, identical on all of them.

    Args:
        backbone: base model: ``embedded``, a folder in diffusers layout, or a hub id.
        revision: branch, tag or commit of a hub id.
        variant: variant of the weights' files, such as ``fp16``; computed in fp32 all the same.
        resolution: side in pixels at which photos are cloaked; what the backbone was made for when not given.
        budget: largest change of any pixel's value, in 8-bit steps.
        step_size: change per PGD step, in 8-bit steps; a tenth of the budget when not given.
        pgd_steps: PGD steps in a round.
        micro_batch: photos whose gradient is taken at a time; memory grows with it, the result does not change.
        objective: what the perturbation maximises: Denoising (when not given), Targeted, Transformed.
        ensemble: further base models to attack at the same time.
    """

    perturbation: Tensor
    passes: Tensor  # images through U-Nets and through encoders in all rounds, on this rank
    buffers_kept = ("perturbation", "passes")

    def __init__(
        self,
        *,
        backbone: str = "embedded",
        revision: str | None = None,
        variant: str | None = None,
        resolution: int | None = None,
        budget: float = 8.0,
        step_size: float | None = None,
        pgd_steps: int = 6,
        micro_batch: int = 4,
        objective: Objective | None = None,
        ensemble: Ensemble = Ensemble(),
    ) -> None:
        super().__init__(backbone=backbone, revision=revision, variant=variant, resolution=resolution)
        for name in ensemble.backbones:
            locate(name)  # a wrong one is found before the others are loaded, or trained on
        self.save_hyperparameters(logger=False)  # a subclass's own, too
        self.automatic_optimization = False
        self.attack = PGD(budget, step_size, pgd_steps, micro_batch, objective or Denoising(), self._average)
        self.register_buffer("perturbation", torch.empty(0))
        self.register_buffer("passes", torch.zeros(2, dtype=torch.int64))
        self.surrogates: list[Surrogate] = []
        self.rounds = 0  # after the last one in this process; Lightning counts an epoch only after all hooks

    @property
    def sources(self) -> list[str]:
        """The base models, the first one first."""
        return [self.hparams.backbone, *self.hparams.ensemble.backbones]

    @property
    def backbones(self) -> list[Backbone]:
        """The base models, as loaded."""
        return [self.backbone, *cast(list[Backbone], list(self.others))]

    def build(self) -> None:
        """Loads all base models; the perturbation starts at nothing."""
        super().build()
        photos = len(self.trainer.datamodule.photos)
        self.perturbation = torch.zeros(photos, 3, self.resolution, self.resolution, device=self.place)
        self.others = nn.ModuleList(self.load(name) for name in self.sources[1:])
        self.fingerprints = [other.fingerprint() for other in self.others]  # before they learn anything

    def surrogate(self, backbone: Backbone, photos: Photos) -> Surrogate:
        """What the method makes of a base model."""
        raise NotImplementedError

    def training_step(self, batch: Photos, batch_idx: int) -> None:
        """One round."""
        if not self.surrogates:
            self.surrogates = [self._made(backbone, batch) for backbone in self.backbones]
        with counted(self.backbones) as passes:
            cloaked = batch.originals + self.perturbation
            outcome = alternate(self.surrogates, batch.originals, cloaked, self.attack, self.turn)
        self.passes += torch.tensor([passes.unet, passes.encoder], device=self.device)
        self.perturbation = outcome.cloaked - batch.originals
        self.rounds = self.current_epoch + 1
        self._log(outcome)

    def memory_savers(self) -> list[str]:
        """Photos one at a time; base models one at a time."""
        chosen, alone = self.hparams, self.trainer.world_size == 1
        several = bool(chosen.ensemble.backbones)
        return [
            *(["--model.micro_batch 1"] if chosen.micro_batch > 1 else []),
            *(["--model.ensemble.offload true"] if several and alone and not chosen.ensemble.offload else []),
        ]

    def on_train_epoch_end(self) -> None:
        """The round is whole."""
        self.preemption.leave_if_asked(self.trainer)

    @property
    def turn(self) -> Turn:
        """The round that is under way."""
        return self.turn_of(self.current_epoch)

    def effective(self) -> dict[str, Any]:
        """Also how the attack goes."""
        return {
            **super().effective(),
            "ensemble_sha256": self.fingerprints,
            "step_size": self.attack.effective_step_size,
            "objective": self.attack.objective,
        }

    def _made(self, backbone: Backbone, photos: Photos) -> Surrogate:
        """A surrogate, with what is computed once, where it waits for its turn."""
        surrogate = self.surrogate(backbone, photos)
        self.attack.objective.prepare(backbone, photos.originals)
        return Offloaded(surrogate, self.device) if self.hparams.ensemble.offload else surrogate

    def _average(self, gradient: Tensor) -> Tensor:
        """Over ranks, in place; ``Strategy.reduce`` would have the host wait at a barrier first, six times a round."""
        if self.trainer.world_size > 1:
            dist.all_reduce(gradient)
            gradient /= self.trainer.world_size
        return gradient

    def _log(self, outcome: Outcome) -> None:
        # One message for all of them. Lightning's sync_dist takes four for each, and a bar that only the first rank has
        # sends some of them by itself.
        losses = torch.stack([outcome.clean_loss, outcome.cloaked_loss, outcome.objective])
        names = ("surrogate/clean_loss", "surrogate/cloaked_loss", "pgd/objective")
        values = {
            **dict(zip(names, self._average(losses), strict=True)),
            "perturbation/largest": self.perturbation.abs().max() / STEP,
            "perturbation/mean": self.perturbation.abs().mean() / STEP,
        }
        # A metric named "step" is Lightning's x-axis; its own counts optimizer steps, six a round.
        values["step"] = torch.tensor(float(self.current_epoch + 1))
        self.log_dict(values, batch_size=1)
