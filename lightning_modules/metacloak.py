"""MetaCloak: a pool of surrogates along one training run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from lightning.pytorch.core.optimizer import LightningOptimizer

from antidreambooth.attack.methods import METHODS, Method, Settings
from antidreambooth.attack.rounds import Photos
from antidreambooth.errors import InputError
from lightning_modules.aspl import ASPL
from lightning_modules.running.strategies import replicates


class MetaCloak(ASPL):
    """PGD through random transforms against models along one DreamBooth run on the clean photos (arXiv:2311.13127).

    The pool is trained when the run begins, and again when it is resumed. It rests in main memory: with a LoRA as the
    adaptation it is small.

    Args:
        members: models of the pool, at equal distances along the run; each round attacks the next one.
        kwargs: those of ASPL. The surrogate learns as a victim of the same adaptation does, in as many steps, unless
            ``surrogate`` says otherwise: its steps are those of the whole run.
    """

    def __init__(self, *, members: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def method(self) -> Method:
        """MetaCloak, whatever its numbers."""
        return METHODS["metacloak"]

    def completed(self, settings: Settings) -> Settings:
        """Also how many models there are."""
        return replace(super().completed(settings), members=self.hparams.members)

    def setup(self, stage: str) -> None:
        """Refuses what keeps no whole weights in a process."""
        super().setup(stage)
        if not replicates(self.trainer.strategy):
            raise InputError("a pool keeps whole weights in each process: use --trainer.strategy ddp")

    def training_step(self, batch: Photos, batch_idx: int) -> None:
        """One round, and a step that changes nothing: without one Lightning writes no checkpoint (see FSMG's clock)."""
        super().training_step(batch, batch_idx)
        cast(LightningOptimizer, self.optimizers()).step()

    def effective(self) -> dict[str, Any]:
        """Also how many models there are."""
        return {**super().effective(), "members": self.hparams.members}
