"""A verdict's tasks: cloaks, and cells (a victim trained on photos as they reach the attacker, its pictures measured).

Both hold all that they need; ``experiment.py`` makes them.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from antidreambooth.attack.perturbation import random_noise
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.layout import read_defaults, resolution_of
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.sampling import Generation
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError
from antidreambooth.evaluation.conditions import Condition, Scene
from antidreambooth.files import write_json
from antidreambooth.photos.decoding import find_photos, load_photos
from antidreambooth.photos.delivery import cloaked_names, write_png
from antidreambooth.provenance import describe, slug
from launch.runs import Fit, cloak_photos, contents, finished, located, of_base_model
from launch.verdict.elsewhere import counterparts

BASE = "base"  # the protection of the control, a base model that is trained on nobody
CALLBACKS = '[{"class_path": "TrainedModel"}, {"class_path": "Likeness"}]'
FORM = {"model.parametrisation": "Square"}  # of all cloaks: in which figures are comparable, old ones and new
# Published photos: as they were, noisy, one's own cloaked ones, cloaked by another tool, cloaked by a run of ours.
Origin = Literal["none", "noise", "folder", "elsewhere", "run"]
ELSEWHERE = "made elsewhere"  # in a record: what counts is the photos, wherever they lie


@dataclass(frozen=True)
class Person:
    """Whose photos these are.

    Args:
        photos: folder of the photos to protect, the papers' set_B.
        clean_photos: folder of other photos, which a cloak may learn from and which tell whether it is them: set_A.
        extra_photos: folder of further clean photos, for reference and for mixing in: set_C.
    """

    photos: str
    clean_photos: str
    extra_photos: str | None = None

    @property
    def references(self) -> list[str]:
        """Folders of clean photos to compare with."""
        return [self.clean_photos, *([self.extra_photos] if self.extra_photos else [])]


@dataclass(frozen=True)
class Cloak:
    """One person's photos under one protection. The first four values tell one cloak from another.

    Args:
        person: their name.
        protection: its name.
        budget: largest change of a pixel's value, in 8-bit steps; 0 where we have no choice of it.
        seed: of whatever is random in it.
        folders: the person's photos.
        origin: where the published photos come from.
        how: as the experiment says it: ``none``, ``noise``, a config file and its flags, or a folder of this person's
            photos.
        backbone: the base model that is attacked.
        root: folder of the experiment's results.
        keep_models: whether the weights of FSMG's surrogates are kept.
    """

    person: str
    protection: str
    budget: float
    seed: int
    folders: Person = field(compare=False)
    origin: Origin = field(compare=False)
    how: str = field(compare=False)
    backbone: Source = field(compare=False)
    root: Path = field(compare=False)
    keep_models: bool = field(compare=False)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return slug(f"{self.person}-{self.protection}-{self.budget:g}-s{self.seed}")

    @property
    def record(self) -> Path:
        """The file that exists once a run has made this cloak; the results lie in the same folder."""
        return self.root / "cloaks" / self.name / "done.json"

    @property
    def source(self) -> Path:
        """The folder of the photos that this starts from: the person's, or those that somebody else protected."""
        return Path(self.how if self.origin == "folder" else self.folders.photos)

    @property
    def counterparts(self) -> dict[Path, Path]:
        """Each original with what another tool has made of it.

        Raises:
            InputError: the folders do not fit each other.
        """
        return counterparts(Path(self.folders.photos), Path(self.how))

    @property
    def settings(self) -> dict[str, Any]:
        """All that the pixels depend on. A finished cloak is recognised by it, so its keys are a file format.

        Raises:
            InputError: a photo cannot be decoded, or one that should be an original is cloaked.
        """
        return {
            **self.backbone.given,
            "protection": ELSEWHERE if self.origin == "elsewhere" else self.how,
            "budget": self.budget,
            "seed": self.seed,
            "photos": contents(self.folders.photos, originals=True),
            "clean_photos": contents(self.folders.clean_photos, originals=True),
            **self._given(),
        }

    def _given(self) -> dict[str, Any]:
        """SHA-256 of the photos that no run of ours has made."""
        if self.origin == "folder":
            return {"protected": contents(self.how)}
        if self.origin == "elsewhere":
            return {"protected": [contents(str(path))[0] for path in self.counterparts.values()]}
        return {}


@dataclass(frozen=True)
class Cell:
    """One victim, trained on photos after what happened to them on the way. The first four values tell cells apart.

    Args:
        cloak: the photos as they are published.
        condition: name of what happens to them on the way.
        victim: its name.
        seed: of the victim's training.
        conditions: what happens to the photos, in this order.
        how: the victim's config file and its flags.
        trained: whether the victim is trained on the photos; the control is not trained at all.
        generation: which pictures the victim is asked for.
        keep_models: whether the victim's weights are kept.
    """

    cloak: Cloak
    condition: str
    victim: str
    seed: int
    conditions: tuple[Condition, ...] = field(compare=False)
    how: str = field(compare=False)
    trained: bool = field(compare=False)
    generation: Generation = field(compare=False)
    keep_models: bool = field(compare=False)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return slug(f"{self.cloak.name}-{self.condition}-{self.victim}-v{self.seed}")

    @property
    def record(self) -> Path:
        """The file that exists once the cell is done; the results lie in the same folder."""
        return self.cloak.root / "cells" / self.name / "cell.json"

    @property
    def settings(self) -> dict[str, Any]:
        """All that the figures depend on. A finished cell is recognised by it, so its keys are a file format.

        Raises:
            InputError: a photo cannot be decoded, or one that should be an original is cloaked.
        """
        return {
            "cloak": self.cloak.settings,
            "victim": self.how if self.trained else BASE,
            "condition": describe(self.conditions),
            "seed": self.seed,
            "generation": describe(self.generation),
            "defaults": describe(read_defaults(self.cloak.backbone)),
            "references": [contents(folder, originals=True) for folder in self.cloak.folders.references],
        }

    @property
    def training(self) -> list[str]:
        """The command line that trains the victim."""
        photos = self.record.parent / "photos"
        own = [f"--data.photos={photos}", "--checkpoint.every_n_train_steps=0"]
        return ["fit", *self._words(), *own, *self._flags()]

    @property
    def test(self) -> list[str]:
        """The command line that has the victim draw and measures the pictures."""
        asked = {name: value for name, value in vars(self.generation).items() if value is not None}
        own = [f"--data.reference_photos={json.dumps(self.cloak.folders.references)}"]
        own += [f"--model.generation.{name}={json.dumps(value)}" for name, value in asked.items()]
        return ["test", *self._words(), *own, *self._flags()]

    def _words(self) -> list[str]:
        return [
            f"--config={located(shlex.split(self.how)[0])}",
            *(f"--{name}={value}" for name, value in of_base_model(self.cloak.backbone, self.how).items()),
            f"--seed_everything={self.seed}",
            f"--trainer.default_root_dir={self.record.parent}",
            f"--trainer.callbacks={CALLBACKS}",
            "--trainer.enable_progress_bar=false",
        ]

    def _flags(self) -> list[str]:
        """A victim's own flags come last: it may ask for other pictures than the others, or use another base model."""
        return [*shlex.split(self.how)[1:], *([] if self.trained else ["--model.adaptation=Untrained"])]


def make_cloak(cloak: Cloak, fit: Fit) -> None:
    """Cloaks a person's photos, or resumes an interrupted run; does nothing where the photos are cloaked already."""
    given = {
        **of_base_model(cloak.backbone, cloak.how),
        **FORM,
        "model.budget": cloak.budget,
        "data.photos": cloak.folders.photos,
        "data.clean_photos": cloak.folders.clean_photos,
        "seed_everything": cloak.seed,
    }
    cloak_photos(cloak.record, cloak.settings, cloak.how, given, fit, cloak.keep_models)


def run_cell(cell: Cell, fit: Fit) -> None:
    """Trains one victim and measures its pictures; does nothing where that is done.

    Raises:
        InputError: the photos' cloak is not finished, or the cell was made with other settings.
    """
    root, settings = cell.record.parent, cell.settings
    if finished(cell.record, settings):
        return
    shutil.rmtree(root, ignore_errors=True)  # a cell cannot be resumed
    started = time.monotonic()
    if cell.trained:
        names = cloaked_names([path.name for path in find_photos(cell.cloak.source)])
        for name, photo in zip(names, arriving(cell), strict=True):
            write_png(root / "photos" / name, photo)
        fit(cell.training)
    fit(cell.test)
    if not cell.keep_models:
        for folder in ("model", "lora", "textual_inversion", "checkpoints"):
            shutil.rmtree(root / folder, ignore_errors=True)
    record = {
        "person": cell.cloak.person,
        "protection": cell.cloak.protection,
        "budget": cell.cloak.budget,
        "victim": cell.victim,
        "condition": cell.condition,
        "cloak_seed": cell.cloak.seed,
        "victim_seed": cell.seed,
        "seconds": time.monotonic() - started,
        "complete": True,
        "settings": settings,
    }
    write_json(cell.record, record)


def arriving(cell: Cell) -> Tensor:
    """The published photos after what happened to them on the way, n 3 h w in 8 bits."""
    cloak = cell.cloak
    others = cloak.folders.extra_photos or cloak.folders.clean_photos
    scene = Scene(partial(untouched, cloak.backbone), pixels(others, resolution_of(cloak.backbone)), cloak.seed)
    photos = protected(cloak)
    for condition in cell.conditions:
        photos = condition(photos, scene)
    return photos


def protected(cloak: Cloak) -> Tensor:
    """A person's photos as they are published, n 3 h w in 8 bits.

    Raises:
        InputError: they have to be cloaked first.
    """
    if cloak.origin == "none":
        return originals(cloak)
    if cloak.origin == "noise":
        return random_noise(originals(cloak), cloak.budget, cloak.seed)
    if cloak.origin == "folder":
        return pixels(cloak.how, resolution_of(cloak.backbone))
    if cloak.origin == "elsewhere":
        side = resolution_of(cloak.backbone)
        return torch.cat([pixels(str(path), side) for path in cloak.counterparts.values()])
    if not cloak.record.is_file():  # the folder of an interrupted run holds photos, too
        raise InputError(f"its cloak is not finished: {cloak.name}")
    return pixels(str(cloak.record.parent / "cloaked"), resolution_of(cloak.backbone))


def originals(cloak: Cloak) -> Tensor:
    """A person's photos as they were, n 3 h w in 8 bits."""
    return pixels(cloak.folders.photos, resolution_of(cloak.backbone))


def pixels(folder: str, side: int) -> Tensor:
    """All photos of a folder, or the one photo, n 3 side side in 8 bits."""
    return torch.stack([photo.pixels for photo in load_photos(Path(folder), side)])


@cache
def untouched(source: Source) -> Backbone:
    """The base model, loaded once for all cells of a worker."""
    return load_backbone(source)
