"""What runs will take: disk, counted from their settings, and time, known from runs of the same kind that finished.

Sizes are upper limits: pictures count as if they were not compressed.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from jsonargparse import Namespace

from antidreambooth.attack.objectives import LikelihoodRatio
from antidreambooth.attack.parametrisation import Square
from antidreambooth.diffusion.defaults import given
from antidreambooth.diffusion.layout import (
    bytes_of_networks,
    family_of,
    read_defaults,
    resolution_of,
    shared_resolution,
)
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError
from antidreambooth.files import cache_folder
from antidreambooth.finetuning.cross_attention import CrossAttention
from antidreambooth.photos.decoding import find_photos
from antidreambooth.photos.original import uncompressed
from launch.runs import Parse, backbones_of, command


class Footprint(NamedTuple):
    """What a run writes to disk, in bytes.

    Args:
        photo: what stays, for each photo that the run is given.
        run: what stays, whatever the number of photos.
        weights: what is there only while the run goes on.
        class_images: what stays in the user's cache for all runs, by what is drawn: (base model, prompt, resolution).
        own_size: whether the photos stay at their own size, too.
    """

    photo: int
    run: int
    weights: int
    class_images: Mapping[tuple[Source, str, int], int]
    own_size: bool = False


class Photos(NamedTuple):
    """The photos of a run.

    Args:
        number: how many.
        size: their bytes at their own size, not compressed; 0 where that does not matter.
    """

    number: int
    size: int = 0


class Kind(NamedTuple):
    """Runs that differ only in whose photos they are about, and so take about the same time.

    Args:
        name: such as ``a victim full``.
        photos: those of each run that is left to do.
        seconds: how long each finished run took.
        footprint: what one run writes, or why that is not known.
    """

    name: str
    photos: Sequence[Photos]
    seconds: Sequence[float]
    footprint: Footprint | str


def footprint_of_cloak(settings: Namespace, parse: Parse, keep_models: bool = False) -> Footprint:
    """What a cloaking run writes.

    Args:
        settings: of the run, as ``parse`` gives them.
        parse: gives the settings of FSMG's surrogate.
        keep_models: whether FSMG's surrogates stay.

    Raises:
        InputError: this is no cloaking run, or its base model cannot be found.
    """
    backbones, model, rounds = attacked(settings), settings.model.init_args, settings.trainer.max_epochs or 0
    side = shared_resolution(backbones, model.resolution)
    picture = picture_of(side)
    progress = rounds // every if (every := callback(settings, "CloakedPhotos").get("every_n_epochs")) else 0
    samples, grids = callback(settings, "SampleGrid"), 0
    if every := samples.get("every_n_epochs"):
        grids = rounds // every * len(samples["prompts"]) * samples["count"]
    sizes = [bytes_of_networks(source) for source in backbones]
    surrogate, kept, weights = model.get("surrogate"), 0, 0
    drawn: dict[tuple[Source, str, int], int] = {}
    if isinstance(surrogate, str):  # FSMG: a model is trained before the attack
        trained = sum(sum(size.values()) for size in sizes) * (2 if wants_decoy(model.get("objective")) else 1)
        kept, weights = (trained, 0) if keep_models else (0, trained)
        drawn = class_images(parse(command(surrogate, {})).model.init_args.training, backbones, side)
    elif surrogate is not None:  # ASPL: what learns is in the checkpoint, of which an old one and a new one exist
        weights = sum(2 * trained_bytes(source) for source in backbones) if learns_whole(model) else 0
        drawn = class_images(surrogate, backbones, side)
    # A cloaked square and three columns of comparison.png; photos so far and samples are files and in TensorBoard.
    own_size = comes_back_whole(model)
    squares = (3 if own_size else 4) + 2 * progress
    return Footprint(squares * picture, 2 * grids * picture + kept, weights, drawn, own_size)


def footprint_of_victim(settings: Namespace, trained: bool = True, keep_models: bool = False) -> Footprint:
    """What a victim writes that is trained on some photos, then asked for pictures, with the callbacks of a verdict.

    Args:
        settings: of the victim's test.
        trained: whether it is trained at all; the control is not.
        keep_models: whether the trained model stays.

    Raises:
        InputError: this is no victim, or its base model cannot be found.
    """
    model = settings.model.get("init_args")
    if model is None or "generation" not in model:
        raise InputError("a victim is the config file of a model that is trained on photos (configs/dreambooth.yaml)")
    (source,) = backbones_of(model)
    side = resolution_of(source, model.resolution)
    picture = picture_of(side)
    drawn = 3 * len(model.generation.prompts) * model.generation.images * picture  # images, grid.png, TensorBoard
    if not trained:
        return Footprint(0, drawn, 0, {})
    whole = sum(bytes_of_networks(source).values()) if saved_whole(model) else 0
    kept, weights = (whole, 0) if keep_models else (0, whole)
    images = class_images(model.training, [source], side)
    return Footprint(picture, drawn + kept, weights, images)


def trained_bytes(source: Source) -> int:
    """The size of what full fine-tuning may change: the denoiser, and the text encoders that may learn."""
    kind, sizes = family_of(source), bytes_of_networks(source)
    return sum(sizes[part] for part in (kind.denoiser_name(), *kind.text_lora))


def attacked(settings: Namespace) -> list[Source]:
    """The base models that a cloaking run attacks.

    Raises:
        InputError: this is no cloaking run.
    """
    model = settings.model.get("init_args")
    if model is None or "budget" not in model:
        raise InputError("--protection is the config file of a cloaking run, such as configs/aspl.yaml")
    return backbones_of(model)


def time_line(phases: Sequence[Sequence[Kind]], workers: int) -> str:
    """How long the runs that are left will take, as far as others of their kind have finished.

    Args:
        phases: follow each other; the runs in a phase are shared out over the workers.
        workers: runs at a time.
    """
    left = [kind for kinds in phases for kind in kinds if kind.photos]
    usual = {kind.name: median(kind.seconds) for kind in left if kind.seconds}
    if not usual:
        return "time: known after the first one"
    seconds = sum(
        len(kind.photos) * usual[kind.name] / at_a_time(kinds, workers)
        for kinds in phases
        for kind in kinds
        if kind.name in usual
    )
    medians = ", ".join(f"{name} {duration(one)}" for name, one in usual.items())
    line = f"time: about {duration(seconds)}, from the median of those that are finished ({medians})"
    unknown = [kind.name for kind in left if kind.name not in usual]
    return f"{line}; more for {', '.join(unknown)}: known after the first one" if unknown else line


def disk_line(root: Path, phases: Sequence[Sequence[Kind]], workers: int) -> str:
    """How much the runs that are left will write, at most, and how much is free.

    Args:
        root: folder of their results.
        phases: follow each other; the runs in a phase are shared out over the workers.
        workers: runs at a time.
    """
    stay, weights, images = 0, 0, dict[tuple[Source, str, int], int]()
    for kinds in phases:
        for _, photos, _, footprint in kinds:
            if photos and isinstance(footprint, Footprint):
                stay += sum(footprint.photo * one.number + footprint.own_size * one.size for one in photos)
                stay += footprint.run * len(photos)
                weights = max(weights, footprint.weights * at_a_time(kinds, workers))
                images |= {key: max(size, images.get(key, 0)) for key, size in footprint.class_images.items()}
    place = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    line = f"disk: at most {size_of(stay)} to stay in {root}, and on the way {size_of(weights)} for weights"
    if images:
        place_of_images, size = cache_folder("class-images"), size_of(sum(images.values()))
        line += f", and {size} for class images in {place_of_images} where they are not there"
    line += f"; {size_of(shutil.disk_usage(place).free)} are free"
    unknown = [k for kinds in phases for k in kinds if k.photos and not isinstance(k.footprint, Footprint)]
    return line + "".join(f"; without {kind.name} ({kind.footprint})" for kind in unknown)


def at_a_time(kinds: Sequence[Kind], workers: int) -> int:
    """How many runs of a phase go on side by side."""
    return max(1, min(workers, sum(len(kind.photos) for kind in kinds)))


def photos_in(folder: Path, own_size: bool = False) -> Photos:
    """The photos that a folder holds; says nothing about its other files, as the run itself does.

    Args:
        folder: of photos.
        own_size: whether to look at their sizes, in the files' headers.

    Raises:
        InputError: it holds none, is no folder, or one of them cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = find_photos(folder)
    return Photos(len(paths), sum(map(uncompressed, paths)) if own_size else 0)


def picture_of(side: int) -> int:
    """Bytes of a square picture of ``side`` pixels, not compressed."""
    return 3 * side**2


def callback(settings: Namespace, name: str) -> dict[str, Any]:
    """The arguments of a run's callback of the given class; empty where the run has no such callback."""
    chosen: Any = settings.trainer.callbacks or []
    for entry in chosen if isinstance(chosen, list) else [chosen]:
        if entry.class_path.rpartition(".")[2] == name:
            return vars(entry.init_args) if "init_args" in entry else {}
    return {}


def comes_back_whole(model: Namespace) -> bool:
    """Whether a cloaking run gives photos back at their own size."""
    chosen = model.get("parametrisation")
    return chosen is None or chosen.class_path.rpartition(".")[2] != Square.__name__


def learns_whole(model: Namespace) -> bool:
    """Whether whole networks are trained; what else there is, such as a LoRA, is too small to be counted here."""
    adaptation = model.get("adaptation")
    return adaptation is None or adaptation.class_path.rpartition(".")[2] == "Full"


def saved_whole(model: Namespace) -> bool:
    """Whether a victim is saved as a whole pipeline."""
    return learns_whole(model) or model.adaptation.class_path.rpartition(".")[2] == CrossAttention.__name__


def class_images(training: Namespace, backbones: Sequence[Source], side: int) -> dict[tuple[Source, str, int], int]:
    """Bytes of the class images for prior preservation, if there is any, by what is drawn."""
    found = {}
    for source in backbones:
        prior, defaults = training.prior, read_defaults(source)
        if given(prior.weight, defaults.prior_weight):
            prompt = given(prior.class_prompt, defaults.class_prompt)
            found[source, prompt, side] = prior.images * picture_of(side)
    return found


def wants_decoy(objective: Any) -> bool:
    """Whether settings of an objective, at whatever depth, have a likelihood ratio for which a model is trained."""
    if isinstance(objective, list):
        return any(map(wants_decoy, objective))
    if not isinstance(objective, Namespace):
        return False
    values = vars(objective)
    ratio = str(values.get("class_path", "")).rpartition(".")[2] == LikelihoodRatio.__name__
    if ratio and objective.get("init_args.decoy") is None:
        return True
    return any(map(wants_decoy, values.values()))


def duration(seconds: float) -> str:
    """Seconds, minutes where these are many, or hours."""
    if seconds < 2 * 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 60 * 60 else f"{seconds / 60 / 60:.1f} h"


def size_of(count: float) -> str:
    """Bytes as MB, or as GB where these are many."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
