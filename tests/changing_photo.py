"""Somebody edits a photo while it is being cloaked."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from PIL import Image


class ChangingPhoto(Callback):
    """Writes another picture into the first photo's file after the first round."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Each round; the first one is enough."""
        path: Path = trainer.datamodule.photos[0].path  # type: ignore[attr-defined]
        Image.new("RGB", (90, 60), "red").save(path)
