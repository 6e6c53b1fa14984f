"""ASPL: alternating surrogate and perturbation learning."""

from __future__ import annotations

from torch import Tensor
from torch.optim import AdamW, Optimizer

from antidreambooth.backbone import Posterior
from antidreambooth.dreambooth import DreamBooth, trainable
from antidreambooth.objectives import Objective
from antidreambooth.rounds import Outcome, Photos, alternate
from antidreambooth.surrogates import Alternating
from antidreambooth.weights import Weights
from lightning_modules.cloaking import Cloaking


class ASPL(Cloaking):
    """Anti-DreamBooth's main method (arXiv:2303.15433, Section 4; https://arxiv.org/abs/2303.15433).

    Each round borrows the surrogate's weights, trains them on the clean photos, perturbs the photos against them, gives
    the weights back and trains them on the perturbed photos.

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
        surrogate: how the surrogate trains.
    """

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
        surrogate: DreamBooth = DreamBooth(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(
            backbone=backbone,
            revision=revision,
            variant=variant,
            resolution=resolution,
            budget=budget,
            step_size=step_size,
            pgd_steps=pgd_steps,
            micro_batch=micro_batch,
            objective=objective,
        )
        self.save_hyperparameters(logger=False)
        self.clean: Posterior | None = None
        self.classes: Posterior | None = None

    def configure_model(self) -> None:
        """Loads the backbone, makes it a surrogate, samples class images while it is untouched."""
        if hasattr(self, "backbone"):
            return
        super().configure_model()
        self.training_settings = self.hparams.surrogate.completed(self.backbone.defaults)
        self.hparams.surrogate = self.training_settings
        for part in trainable(self.backbone, self.training_settings):
            part.requires_grad_(True)
        if self.training_settings.gradient_checkpointing:
            self.backbone.enable_gradient_checkpointing()
        if self.training_settings.prior.weight:
            self.classes = self.class_posterior(self.training_settings.prior, self.attack.micro_batch)

    def configure_optimizers(self) -> Optimizer:
        """AdamW over what the surrogate trains."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        settings = self.training_settings
        return AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)

    def round(self, photos: Photos, cloaked: Tensor) -> Outcome:
        """One alternation."""
        if self.clean is None:
            self.clean = self.backbone.encode_all(photos.clean, self.attack.micro_batch)
        parameters = [p for p in self.parameters() if p.requires_grad]
        weights = Weights(parameters, self.optimizers(), self.manual_backward)
        surrogate = Alternating(self.backbone, self.training_settings, weights, self.classes)
        return alternate(surrogate, self.clean, photos.originals, cloaked, self.attack, self.turn)
