"""How far a run is, in a file: for a program that watches it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from torchvision.utils import make_grid

from antidreambooth.files import write_json
from antidreambooth.photos.delivery import write_png

SHOWN = 4  # photos in the picture


class ProgressFile(Callback):
    """Writes ``progress.json`` (phase, rounds done and wanted, seconds left) and ``so-far.png``, the photos so far.

    Args:
        folder: where; both files are whole whenever somebody reads them.
        seconds: between two pictures, at least.
    """

    def __init__(self, folder: str, seconds: float = 5.0) -> None:
        self.folder, self.seconds = Path(folder), seconds
        self.begun = self.drawn = 0.0
        self.first = 0  # rounds that were done when the clock was started

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is loaded."""
        self._write(trainer, "preparing", trainer.current_epoch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rounds begin, or go on."""
        self.begun, self.first = 0.0, trainer.current_epoch
        self._write(trainer, "working", trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A round further. The first one does what is done once, so that the clock starts after it."""
        done, now = trainer.current_epoch + 1, time.monotonic()
        left = None
        if not self.begun:
            self.begun, self.first = now, done
        else:
            left = (now - self.begun) / (done - self.first) * ((trainer.max_epochs or done) - done)
        if trainer.is_global_zero and now - self.drawn >= self.seconds:
            data, module = trainer.datamodule, cast(Any, pl_module)  # type: ignore[attr-defined]
            state = data.canvas.blank + module.perturbation.cpu()
            shown = data.parametrisation.shown(data.canvas, state, data.photos, module.attack.budget)
            write_png(self.folder / "so-far.png", make_grid(shown[:SHOWN], nrow=2, padding=2, pad_value=255))
            self.drawn = now
        self._write(trainer, "working", done, left)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is left is writing the photos, which may take minutes where they are large."""
        self._write(trainer, "writing", trainer.current_epoch)

    def _write(self, trainer: Trainer, phase: str, done: int, left: float | None = None) -> None:
        if trainer.is_global_zero:
            record = {"phase": phase, "step": done, "steps": trainer.max_epochs, "left": left}
            write_json(self.folder / "progress.json", record)
