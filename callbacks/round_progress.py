"""A progress bar over rounds."""

from __future__ import annotations

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class RoundProgress(ProgressBar):
    """One bar for the whole run, with time left: Lightning's own counts batches, of which a round has one.

    Args:
        unit: what an epoch is called.
    """

    def __init__(self, unit: str = "round") -> None:
        super().__init__()
        self.unit = unit
        self.enabled = True
        self.bar: tqdm[Any] | None = None

    def disable(self) -> None:
        """Shows nothing: Lightning calls this on every rank but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Shows the bar."""
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar where a resumed run stands."""
        self.bar = tqdm(
            total=trainer.max_epochs,
            initial=trainer.current_epoch,
            desc=type(pl_module).__name__,
            unit=self.unit,
            disable=not self.enabled,
            file=sys.stdout,
            dynamic_ncols=True,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One round further."""
        if self.bar is not None:
            metrics = self.get_metrics(trainer, pl_module)
            metrics.pop("v_num", None)
            self.bar.set_postfix(metrics, refresh=False)
            self.bar.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the finished bar on the screen."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the line in peace for what the exception has to say."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
