"""The photos that an attacker has, and those that tell whether the person is in a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from antidreambooth.errors import InputError, require
from antidreambooth.photos.decoding import Photo, load_photos
from antidreambooth.photos.readings import Reading, read_photos
from antidreambooth.provenance import describe


class Subject(LightningDataModule):
    """A person's photos, cloaked or not, to be trained on; clean photos of the person as the reference of a test.

    An epoch is the whole training. Every batch holds all photos: the module takes its share of them.

    Args:
        photos: folder (or single file) of photos to train on.
        reference_photos: folder, or several, of clean photos of the same person; needed for ``test``.
        resolution: side in pixels; taken from the model on the command line.
        steps: training steps; taken from the model on the command line.
        reading: how the attacker's program reads the photos to train on (diffusers, OneTrainer: random, bilinear;
            ai-toolkit: centre, bicubic; kohya: centre, area, not upright; SimpleTuner: centre, linear, not upright; all
            of them: profile false).
    """

    def __init__(
        self,
        photos: str = "examples/photos",
        reference_photos: str | list[str] | None = None,
        resolution: int = 512,
        steps: int = 1000,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        require("resolution", resolution, 1)
        require("steps", steps, 1)
        self.source, self.resolution, self.steps, self.reading = photos, resolution, steps, reading
        self.reference_sources = [reference_photos] if isinstance(reference_photos, str) else reference_photos
        self.photos: list[Photo] = []
        self.references: list[Photo] = []

    def setup(self, stage: str) -> None:
        """Decodes every photo that the stage needs, so that a bad one is found before a model is loaded."""
        if stage == "fit" and not self.photos:
            self.photos = read_photos(Path(self.source), self.resolution, self.reading)
        if stage == "test" and not self.references:
            if not self.reference_sources:
                raise InputError("a test compares with clean photos of the person: give --data.reference_photos FOLDER")
            self.references = [
                photo for source in self.reference_sources for photo in load_photos(Path(source), self.resolution)
            ]

    def train_dataloader(self) -> DataLoader[Tensor | list[Tensor]]:
        """All photos in 8 bits, once for each step: n 3 s s, or a list where the victim cuts squares from them."""
        pictures = [photo.pixels for photo in self.photos]
        square = all(picture.shape[1] == picture.shape[2] for picture in pictures)
        batch = torch.stack(pictures) if square else pictures
        return DataLoader([batch] * self.steps, batch_size=None, collate_fn=as_it_is)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[list[tuple[str, Tensor]]]:
        """One batch: name and pixels of each reference photo."""
        batch = [(photo.name, photo.pixels) for photo in self.references]
        return DataLoader([batch], batch_size=None, collate_fn=list)  # type: ignore[arg-type]

    @property
    def files(self) -> list[Path]:
        """What is read, and must never be written to."""
        return [photo.path for photo in (*self.photos, *self.references)]

    def record(self) -> dict[str, Any]:
        """Which photos these are, by content, as a folder may move; and how they are read, where that is not usual."""
        photos = {"photos": {photo.name: photo.sha256 for photo in self.photos}}
        return photos if self.reading == Reading() else {**photos, "reading": describe(self.reading)}


def as_it_is(batch: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """A batch that is one already."""
    return batch
