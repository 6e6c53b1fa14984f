"""What a folder of people will take: who is to be done, time, disk. Nothing is written."""

from __future__ import annotations

import shutil
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from antidreambooth.attack.methods import Method
from antidreambooth.diffusion.defaults import Defaults, Recipe, given
from antidreambooth.diffusion.loading import read_defaults, resolution_of
from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import find_photos
from launch.cost import Measured, cloak_passes, device, drawing, measure
from launch.jobs import workers_of
from launch.people.folders import People
from launch.runs import Fit

OVERHEAD = 3.0  # seconds a person: reading photos, copying the base model, writing


class State(NamedTuple):
    """How far a person is; a line of summary.jsonl."""

    person: str
    state: str  # done, failed or waiting
    seconds: float | None
    error: str | None


@dataclass(frozen=True)
class Run:
    """What everybody's run does.

    Args:
        config: all of its settings.
    """

    config: dict[str, Any]

    def __post_init__(self) -> None:
        if not {"budget", "pgd_steps"} <= {*self.model}:
            raise InputError("--protection is the config file of a cloaking run, such as configs/aspl.yaml")

    @property
    def model(self) -> dict[str, Any]:
        """Arguments of the LightningModule."""
        arguments: dict[str, Any] = self.config["model"].get("init_args") or {}
        return arguments

    @property
    def backbones(self) -> list[str]:
        """The base models that are attacked."""
        return [self.model["backbone"], *self.model["ensemble"]["backbones"]]

    @property
    def terms(self) -> list[str]:
        """Of the base models that have some."""
        return list(dict.fromkeys(terms for name in self.backbones if (terms := read_defaults(name).notice)))

    @property
    def method(self) -> Method:
        """The method with this run's numbers."""
        surrogate, rounds = self.model.get("surrogate"), self.config["trainer"]["max_epochs"] or 0
        kind = "alternating" if isinstance(surrogate, dict) else "untouched" if surrogate is None else "trained"
        return Method(cast(Any, kind), rounds, self.model["pgd_steps"])

    @property
    def defaults(self) -> Defaults:
        """The base model's, with what the run was told about its surrogate."""
        defaults = read_defaults(self.backbones[0])
        told = self.model.get("surrogate")
        if not isinstance(told, dict):
            return defaults
        usual = defaults.surrogate
        steps, batch = given(told["steps"], usual.steps), given(told["batch_size"], usual.batch_size)
        recipe = Recipe(usual.learning_rate, batch, steps, usual.train_text_encoder)
        return replace(defaults, surrogate=recipe, prior_weight=given(told["prior"]["weight"], defaults.prior_weight))

    def every(self, callback: str) -> int:
        """How often something that looks at the run every few rounds does so."""
        for entry in self.config["trainer"]["callbacks"] or []:
            if entry["class_path"].rpartition(".")[2] == callback:
                epochs = entry.get("init_args", {}).get("every_n_epochs", 0)
                return self.method.rounds // epochs if epochs else 0
        return 0


def configuration(words: list[str], fit: Fit) -> Run:
    """All settings of a command line that is not run; a wrong one ends here, and not once for each person.

    Raises:
        InputError: it cloaks nothing.
    """
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            fit([*words, "--print_config"])
    except SystemExit as stopped:
        if stopped.code:
            raise
    return Run(yaml.safe_load(printed.getvalue()))


def plan(job: People, found: list[State], run: Run) -> list[str]:
    """A line for each person, and what all who are not done will take."""
    counted = {one.person: photos_of(job.everyone[one.person].photos) for one in found}
    left = [one for one in found if one.seconds is None]
    able = [count for one in left if isinstance(count := counted[one.person], int)]
    at_a_time = max(1, min(workers_of(job.launcher), len(able)))
    width = max(len(one.person) for one in found)
    lines = [f"{one.person:<{width}}  {described(one, counted[one.person])}" for one in found]
    done, before = sum(one.state == "done" for one in found), sum(one.state == "failed" for one in left)
    other = len(found) - len(left) - done
    lines.append(
        f"{len(found)} people: {done} done, {f'{other} done with other settings, ' if other else ''}{len(left)} to do "
        f"({before} of them failed before), {at_a_time} at a time ({job.launcher.cluster})"
    )
    if able:
        name, revision = run.backbones[0], run.model["revision"]
        side = run.model["resolution"] or resolution_of(name, revision)
        measured = measure(name, at_a_time, side, revision, run.model["variant"])
        lines += [time_line(run, able, at_a_time, measured), disk_line(job, run, able, at_a_time, measured, side)]
    return lines


def photos_of(folder: Path) -> int | str:
    """How many photos a folder holds, or what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return len(find_photos(folder))
    except InputError as error:
        return str(error)


def described(one: State, photos: int | str) -> str:
    """A person in the plan."""
    if isinstance(photos, str):
        return f"fails: {photos}"
    return f"{photos} photos, {'to do' if one.state == 'waiting' else one.state}{f': {one.error}' if one.error else ''}"


def time_line(run: Run, photos: list[int], at_a_time: int, measured: Measured) -> str:
    """How long it takes, give or take a half."""
    defaults = run.defaults
    grids = run.every("SampleGrid") * 4 * drawing(defaults.sampling_steps)
    passes = sum(cloak_passes(run.method, defaults, count, len(run.backbones)) + grids for count in photos)
    seconds = (passes * measured.seconds + len(photos) * OVERHEAD) / at_a_time
    line = f"time: about {duration(seconds)}, from passes timed on this machine's {device().type}"
    if run.method.surrogate == "untouched" or not defaults.prior_weight:
        return line
    images = run.model["surrogate"]["prior"]["images"] if run.method.surrogate == "alternating" else 200
    once = images * drawing(defaults.sampling_steps) * measured.seconds * len(run.backbones)
    return f"{line}; {duration(once)} more for class images where these are not there from earlier runs"


def disk_line(job: People, run: Run, photos: list[int], at_a_time: int, measured: Measured, side: int) -> str:
    """Pictures that stay, all of them PNG (their size before it is an upper limit), and weights while a run goes on."""
    # Cloaked and three columns of the comparison; the photos so far and samples on disk and in TensorBoard's log.
    pictures = sum((4 + 2 * run.every("CloakedPhotos")) * count + 8 * run.every("SampleGrid") for count in photos)
    weights = len(run.backbones) * at_a_time * bytes_of_weights(run, measured)
    place = next(path for path in (job.root.absolute(), *job.root.absolute().parents) if path.exists())
    return (
        f"disk: at most {size(pictures * 3 * side**2)} to stay in {job.root}, and on the way "
        f"{size(weights)} for weights; {size(shutil.disk_usage(place).free)} are free"
    )


def bytes_of_weights(run: Run, measured: Measured) -> int:
    """Bytes that a run writes for each model: checkpoints of what learns, the old and the new one, or a surrogate."""
    if run.method.surrogate == "untouched" or run.model.get("adaptation"):  # a LoRA is small
        return 0
    return 2 * measured.learned if run.method.surrogate == "alternating" else measured.all


def duration(seconds: float) -> str:
    """Minutes, or hours where these are many."""
    return f"{seconds / 60:.0f} min" if seconds < 2 * 60 * 60 else f"{seconds / 60 / 60:.1f} h"


def size(count: float) -> str:
    """Bytes as MB, or GB where these are many."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
