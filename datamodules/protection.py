"""The photos to protect and the clean ones that serve as reference."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader
from tqdm import tqdm

from antidreambooth.attack.canvas import Canvas
from antidreambooth.attack.parametrisation import OwnSize, Parametrisation
from antidreambooth.attack.rounds import Photos
from antidreambooth.errors import InputError, require
from antidreambooth.evaluation.faces import Dlib, belonging, reference
from antidreambooth.photos.decoding import Photo, find_photos
from antidreambooth.photos.delivery import Delivery
from antidreambooth.photos.regions import Person, Region, find_masks
from antidreambooth.provenance import describe, require_originals


class Protection(LightningDataModule):
    """A person's photos: set B, to be cloaked, and set A, the clean reference that the surrogate learns.

    How much of them is kept is up to the parametrisation. An epoch is one batch that holds them all.

    Args:
        photos: folder (or single file) of photos to protect.
        clean_photos: folder of other photos of the same person, for reference; the originals themselves when not given.
        region: where the photos may change: everywhere when not given.
        delivery: the format of the cloaked files, and what is kept in them.
        again: whether photos may be cloaked that a run of this project has cloaked already.
        resolution: side in pixels; taken from the model on the command line.
        parametrisation: of what size photos come back; taken from the model on the command line.
    """

    def __init__(
        self,
        photos: str = "examples/photos",
        clean_photos: str | None = None,
        region: Region = Region(),  # noqa: B008 (frozen)
        delivery: Delivery = Delivery(),  # noqa: B008 (frozen)
        again: bool = False,
        resolution: int = 512,
        parametrisation: Parametrisation | None = None,
    ) -> None:
        super().__init__()
        require("resolution", resolution, 1)
        self.source, self.clean_source, self.again, self.resolution = photos, clean_photos, again, resolution
        self.region, self.delivery = region, delivery
        self.parametrisation = parametrisation or OwnSize()
        self.photos: list[Photo] = []
        self.clean: list[Photo] = []

    def setup(self, stage: str) -> None:
        """Decodes every photo, so that a bad one is found before a model is loaded."""
        if self.photos:
            return
        others = self._read(self.clean_source) if self.clean_source else None
        if self.region.mask is not None:
            find_masks(Path(self.region.mask), find_photos(Path(self.source)))  # all of them, before any is read
        self.photos = self._read(self.source, self.region, self._person(others))
        self.clean = others or self.photos
        if not self.again:
            advice = "give the original, or cloak it once more with --data.again true"
            require_originals([(photo.path, photo.sha256) for photo in (*self.photos, *self.clean)], advice)

    def _read(self, source: str, *where: Any) -> list[Photo]:
        """Photos one by one, with a bar where they take a while: of a large one, faces are looked for."""
        silent, load = getattr(rank_zero_only, "rank", 0) > 0, self.parametrisation.load
        bar = tqdm(find_photos(Path(source)), "reading photos", leave=False, delay=2, disable=silent)
        return [photo for path in bar for photo in load(path, self.resolution, *where)]

    def _person(self, clean: list[Photo] | None) -> Person | None:
        """Tells the person's faces by those of the clean photos, where the region is about them.

        Raises:
            InputError: there are no clean photos, or none with a face.
        """
        if self.region.faces != "person":
            return None
        if clean is None:
            raise InputError("clean photos tell which faces are the person's: give --data.clean_photos FOLDER")
        model = Dlib()
        known = reference(model, [(photo.name, photo.pixels) for photo in clean])
        return lambda picture, boxes: belonging(model, picture, boxes, known)

    def train_dataloader(self) -> DataLoader[Photos]:
        """One batch: what PGD moves, and what the surrogate learns from."""
        clean = self.parametrisation.canvas(self.clean, self.resolution)
        batch = Photos(self.canvas, clean.lessons(clean.blank))
        return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]

    @cached_property
    def canvas(self) -> Canvas:
        """What PGD moves of the photos, on the CPU; call it after ``setup``."""
        return self.parametrisation.canvas(self.photos, self.resolution)

    @property
    def files(self) -> list[Path]:
        """What is read, and must never be written to."""
        return [photo.path for photo in (*self.photos, *self.clean)]

    def record(self) -> dict[str, Any]:
        """Which photos these are, by content: a folder may move."""
        return {
            "photos": {photo.name: photo.sha256 for photo in self.photos},
            "clean_photos": {photo.name: photo.sha256 for photo in self.clean},
            **({} if self.region == Region() else {"region": {**describe(self.region), "masks": self._masks()}}),
        }

    def _masks(self) -> list[str]:
        """SHA-256 of the user's masks."""
        if self.region.mask is None:
            return []
        masks = find_masks(Path(self.region.mask), [photo.path for photo in self.photos])
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in masks]
