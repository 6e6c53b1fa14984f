"""ASPL: alternating surrogate and perturbation learning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.optim import AdamW, Optimizer

from antidreambooth.attack.rounds import Photos
from antidreambooth.attack.surrogates import Alternating
from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.errors import InputError
from antidreambooth.finetuning.adaptation import Adaptation
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.finetuning.full import Full
from lightning_modules.cloaking import Cloaking
from lightning_modules.running.borrowing import weights_of


class ASPL(Cloaking):
    """Anti-DreamBooth's main method (arXiv:2303.15433, Section 4; https://arxiv.org/abs/2303.15433).

    Each round borrows the surrogate's weights, trains them on the clean photos, perturbs the photos against them, gives
    the weights back and trains them on the perturbed photos. With ``ensemble`` it is E-ASPL: every base model does so,
    and all of them train on the mean of their perturbed photos.

    Args:
        surrogate: how the surrogate trains.
        adaptation: what of it is trained: Full (when not given) or, for less memory, LoRA.
        kwargs: those of every cloaking method.
    """

    def __init__(
        self,
        *,
        surrogate: DreamBooth = DreamBooth(),  # noqa: B008 (frozen)
        adaptation: Adaptation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.adaptation = adaptation or Full()
        self.classes: list[Posterior | None] = []

    def setup(self, stage: str) -> None:
        """Refuses what would fail in the middle of a round."""
        super().setup(stage)
        strategy = self.trainer.strategy
        patient = type(strategy) is DDPStrategy and strategy._ddp_kwargs.get("find_unused_parameters")
        if len(self.sources) > 1 and not (patient or isinstance(strategy, SingleDeviceStrategy)):
            raise InputError(
                "only one base model of an ensemble learns at a time: use "
                "--trainer.strategy ddp_find_unused_parameters_true"
            )
        if self.hparams.ensemble.offload and self.trainer.world_size > 1:
            # A parameter that moves loses the hook by which DDP averages its gradient.
            raise InputError("several processes keep all models on their devices: leave out --model.ensemble.offload")

    def build(self) -> None:
        """Makes the base models surrogates and samples class images while they are untouched."""
        super().build()
        how = self.adaptation
        self.trainings = [
            how.surrogate_settings(self.hparams.surrogate, backbone.defaults) for backbone in self.backbones
        ]
        for backbone, training in zip(self.backbones, self.trainings, strict=True):
            self.classes.append(self.class_posterior(backbone, training.prior, self.attack.micro_batch))
            how.apply(backbone, training, self.seed)

    def configure_optimizers(self) -> Optimizer:
        """AdamW over what the surrogates train, each at its own learning rate."""
        groups = [
            {"params": backbone.learned(), "lr": training.learning_rate, "weight_decay": training.weight_decay}
            for backbone, training in zip(self.backbones, self.trainings, strict=True)
        ]
        return AdamW(groups, fused=True)

    def surrogate(self, backbone: Backbone, photos: Photos) -> Alternating:
        """DreamBooth on a base model, a few steps at a time."""
        number, micro_batch = self.backbones.index(backbone), self.attack.micro_batch
        weights = weights_of(self.trainer.strategy, backbone, self.optimizers(), self.manual_backward)
        clean = backbone.encode_all(photos.clean, micro_batch)
        return Alternating(backbone, self.trainings[number], weights, clean, self.classes[number], micro_batch)

    def memory_savers(self) -> list[str]:
        """Also checkpointing, and a LoRA as the surrogate."""
        whole = isinstance(self.hparams.adaptation or Full(), Full)
        checkpointing = self.hparams.surrogate.gradient_checkpointing
        return [
            *super().memory_savers(),
            *([] if checkpointing else ["--model.surrogate.gradient_checkpointing true"]),
            *(["-c configs/trainer/low-memory.yaml (a LoRA as the surrogate, too)"] if whole else []),
        ]

    def effective(self) -> dict[str, Any]:
        """Also how the surrogates train."""
        how = {"surrogate": self.trainings[0], "ensemble_surrogates": self.trainings[1:], "adaptation": self.adaptation}
        return {**super().effective(), **how}
