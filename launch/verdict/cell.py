"""One cell: photos as they arrive at the attacker, a victim trained on them, its pictures measured."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antidreambooth.attack.perturbation import random_noise
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.loading import load_backbone, read_defaults, resolution_of
from antidreambooth.errors import InputError
from antidreambooth.evaluation.conditions import Scene
from antidreambooth.files import write_json
from antidreambooth.photos.decoding import find_photos, load_photos
from antidreambooth.photos.delivery import cloaked_names, write_png
from antidreambooth.provenance import describe
from launch.runs import Fit, cloak_photos, contents, finished, located
from launch.verdict.experiment import BASE, Cell, Cloak, Experiment, Person

CALLBACKS = '[{"class_path": "TrainedModel"}, {"class_path": "Likeness"}]'


def make_cloak(experiment: Experiment, cloak: Cloak, fit: Fit) -> None:
    """Cloaks a person's photos, or goes on with it; does nothing where it is done."""
    person, settings = experiment.everyone()[cloak.person], cloak_settings(experiment, cloak)
    given = {
        "model.backbone": experiment.backbone,
        "model.budget": cloak.budget,
        "data.photos": person.photos,
        "data.clean_photos": person.clean_photos,
        "seed_everything": cloak.seed,
    }
    how, done = experiment.protections[cloak.protection], experiment.cloak_record(cloak)
    cloak_photos(done, settings, how, given, fit, experiment.keep_models)


def run_cell(experiment: Experiment, cell: Cell, fit: Fit) -> None:
    """Trains and measures one victim; does nothing where it is done."""
    done, settings = experiment.cell_record(cell), cell_settings(experiment, cell)
    root = done.parent
    if finished(done, settings):
        return
    shutil.rmtree(root, ignore_errors=True)  # half a cell is a cell to be started anew
    person, started = experiment.everyone()[cell.cloak.person], time.monotonic()
    common = [
        f"--model.backbone={experiment.backbone}",
        f"--seed_everything={cell.seed}",
        f"--trainer.default_root_dir={root}",
        f"--trainer.callbacks={CALLBACKS}",
        "--trainer.enable_progress_bar=false",
    ]
    control = cell.cloak.protection == BASE  # the first victim without its training: same faces, same flags
    config, *flags = shlex.split(experiment.victims[next(iter(experiment.victims)) if control else cell.victim])
    victim = [f"--config={located(config)}", *common]
    if control:
        flags.append("--model.adaptation=Untrained")
    else:
        published = given_folder(experiment, cell.cloak) or Path(person.photos)
        names = cloaked_names([path.name for path in find_photos(published)])
        for name, photo in zip(names, arriving(experiment, cell), strict=True):
            write_png(root / "photos" / name, photo)
        fit(["fit", *victim, f"--data.photos={root / 'photos'}", "--checkpoint.every_n_train_steps=0", *flags])
    generation = {key: value for key, value in vars(experiment.generation).items() if value is not None}
    asked = [f"--model.generation.{key}={json.dumps(value)}" for key, value in generation.items()]
    # A victim's own flags come last: it may ask for other pictures than the others.
    fit(["test", *victim, f"--data.reference_photos={json.dumps(person.references)}", *asked, *flags])
    if not experiment.keep_models:
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
    write_json(done, record)


def protected(experiment: Experiment, cloak: Cloak) -> Tensor:
    """A person's photos as they are published, n 3 h w in 8 bits."""
    how, photos = experiment.protections[cloak.protection], originals(experiment, cloak.person)
    if how == "none":
        return photos
    if how == "noise":
        return random_noise(photos, cloak.budget, cloak.seed)
    folder = given_folder(experiment, cloak)
    if folder is None:
        done = experiment.cloak_record(cloak)
        if not done.is_file():  # an interrupted one holds photos, too
            raise InputError(f"its cloak is not finished: {cloak.name}")
        folder = done.parent / "cloaked"
    return pixels(folder, resolution(experiment))


def given_folder(experiment: Experiment, cloak: Cloak) -> Path | None:
    """Where the photos lie that somebody else protected."""
    how = experiment.protections.get(cloak.protection, BASE)
    return Path(how) if how not in ("none", "noise", BASE) and Path(how).is_dir() else None


def arriving(experiment: Experiment, cell: Cell) -> Tensor:
    """The published photos after what happened to them on the way."""
    person, side = experiment.everyone()[cell.cloak.person], resolution(experiment)
    others = person.extra_photos or person.clean_photos
    scene = Scene(partial(untouched, experiment.backbone), pixels(Path(others), side), cell.cloak.seed)
    photos = protected(experiment, cell.cloak)
    for condition in experiment.conditions[cell.condition]:
        photos = condition(photos, scene)
    return photos


def originals(experiment: Experiment, person: str) -> Tensor:
    """A person's photos as they were, n 3 h w in 8 bits."""
    return pixels(Path(experiment.everyone()[person].photos), resolution(experiment))


def resolution(experiment: Experiment) -> int:
    """Side of all pictures."""
    return resolution_of(experiment.backbone)


def pixels(folder: Path, side: int) -> Tensor:
    """All photos of a folder."""
    return torch.stack([photo.pixels for photo in load_photos(folder, side)])


@cache
def untouched(name: str) -> Backbone:
    """The base model, loaded once for all cells of a worker."""
    return load_backbone(name)


def cloak_settings(experiment: Experiment, cloak: Cloak) -> dict[str, Any]:
    """What a cloak's pixels depend on."""
    person: Person = experiment.everyone()[cloak.person]
    given = given_folder(experiment, cloak)
    return {
        "backbone": experiment.backbone,
        "protection": experiment.protections.get(cloak.protection, BASE),
        "budget": cloak.budget,
        "seed": cloak.seed,
        "photos": contents(person.photos),
        "clean_photos": contents(person.clean_photos),
        **({"protected": contents(str(given))} if given else {}),
    }


def cell_settings(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """What a cell's figures depend on."""
    trained = cell.cloak.protection != BASE
    return {
        "cloak": cloak_settings(experiment, cell.cloak),
        "victim": experiment.victims[cell.victim] if trained else BASE,
        "condition": describe(experiment.conditions[cell.condition]) if trained else [],
        "seed": cell.seed,
        "generation": describe(experiment.generation),
        "defaults": describe(read_defaults(experiment.backbone)),
        "references": [contents(folder) for folder in experiment.everyone()[cell.cloak.person].references],
    }
