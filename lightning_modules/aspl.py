"""ASPL: alternating surrogate and perturbation learning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import AdamW, Optimizer

from antidreambooth.attack.methods import METHODS, Method, Settings
from antidreambooth.errors import InputError
from antidreambooth.finetuning.adaptation import Adaptation
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.finetuning.full import Full
from lightning_modules.cloaking import Cloaking
from lightning_modules.running.strategies import tolerates_unused


class ASPL(Cloaking):
    """Anti-DreamBooth's main method (arXiv:2303.15433, Section 4; https://arxiv.org/abs/2303.15433).

    Each round borrows the surrogate's weights, trains them on the clean photos, perturbs the photos against them, gives
    the weights back and trains them on the perturbed photos. With ``ensemble`` it is E-ASPL: every base model does so,
    and all of them train on the mean of their perturbed photos.

    Args:
        surrogate: how the surrogate trains.
        adaptation: what of it is trained: Full (when not given), CrossAttention or, for less memory, LoRA.
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

    def method(self) -> Method:
        """ASPL, whatever its numbers."""
        return METHODS["aspl"]

    def completed(self, settings: Settings) -> Settings:
        """Also how the surrogates learn."""
        return replace(settings, training=self.hparams.surrogate, adaptation=self.hparams.adaptation or Full())

    def setup(self, stage: str) -> None:
        """Refuses what would fail in the middle of a round."""
        super().setup(stage)
        strategy = self.trainer.strategy
        if len(self.sources) > 1 and not (tolerates_unused(strategy) or isinstance(strategy, SingleDeviceStrategy)):
            raise InputError(
                "only one base model of an ensemble learns at a time: use "
                "--trainer.strategy ddp_find_unused_parameters_true"
            )
        if self.hparams.ensemble.offload and self.trainer.world_size > 1:
            # A parameter that moves loses the hook by which DDP averages its gradient.
            raise InputError("several processes keep all models on their devices: leave out --model.ensemble.offload")

    def configure_optimizers(self) -> Optimizer:
        """AdamW over what the surrogates train, each at its own learning rate."""
        return AdamW(self.assembly.groups(), fused=True)

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
        first, *others = self.assembly.trainings
        how = {"surrogate": first, "ensemble_surrogates": others, "adaptation": self.assembly.adaptation}
        return {**super().effective(), **how}
