"""Many small pictures with captions, to train a base model on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from antidreambooth.errors import InputError, require
from antidreambooth.photos.captioned import FILES, Pictures, read_pictures


class Captioned(LightningDataModule):
    """``pictures.npy`` (n side side 3, 8 bits) and ``captions.json`` (n strings such as "a photo of a person").

    An epoch is the whole training. Every batch holds all pictures: the module takes its share of them.

    Args:
        folder: where both files lie.
        resolution: side of the pictures in pixels; taken from the model on the command line.
        steps: training steps; taken from the model on the command line.
    """

    def __init__(self, folder: str = "pictures", resolution: int = 512, steps: int = 1000) -> None:
        super().__init__()
        require("resolution", resolution, 1)
        require("steps", steps, 1)
        self.folder, self.resolution, self.steps = folder, resolution, steps
        self.pictures: Pictures | None = None

    def setup(self, stage: str) -> None:
        """Finds out before any model is loaded whether they can be used."""
        self.pictures = self.pictures or read_pictures(Path(self.folder))
        if self.pictures.side != self.resolution:
            raise InputError(
                f"the pictures of {self.folder} are {self.pictures.side} pixels wide, the model wants {self.resolution}"
            )

    def train_dataloader(self) -> DataLoader[Pictures]:
        """All pictures, once for each step."""
        return DataLoader([self.pictures] * self.steps, batch_size=None)  # type: ignore[arg-type]

    @property
    def files(self) -> list[Path]:
        """What is read, and must never be written to."""
        return [Path(self.folder).expanduser() / name for name in FILES]

    def record(self) -> dict[str, Any]:
        """Which they are, and what is said of them."""
        assert self.pictures is not None
        return {"pictures": self.pictures.sha256, "captions": sorted(set(self.pictures.captions))}
