"""What a fit will take, before it: a moment of the real run, in this process, of which nothing is left."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch
from jaxtyping import UInt8
from jsonargparse import Namespace
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from antidreambooth.attack.canvas import STEP
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.class_images import BATCH, files_of, folder_of, left_to_draw
from antidreambooth.diffusion.defaults import given
from antidreambooth.diffusion.sampling import noise_of, sample
from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import to_float
from antidreambooth.photos.delivery import cloaked_names, delivered_suffix
from antidreambooth.photos.original import uncompressed
from antidreambooth.photos.whole import WholePhoto
from callbacks.cloaked_photos import described
from datamodules import Protection
from launch.cost import (
    Footprint,
    Kind,
    Photos,
    callback,
    disk_line,
    duration,
    footprint_of_cloak,
    footprint_of_victim,
    size_of,
)
from launch.fsmg_surrogates import untrained
from launch.runs import Parse
from lightning_modules import FSMG, Victim
from lightning_modules.cloaking import Cloaking
from lightning_modules.running.run_folder import look_at, read_checkpoint, read_photos

ROUNDS, STEPS = 2, 6  # that are run, of cloaking and of a victim: the first one does what is done once
FEW = 4  # sampling steps that tell how long all of them take


class Estimate(NamedTuple):
    """What a run will take: seconds by what takes them, in the order of the run, and lines to print."""

    seconds: dict[str, float]
    lines: list[str]


def dry_run(
    trainer: Trainer,
    model: LightningModule,
    data: Any,
    settings: Namespace,
    parse: Parse,
    again: Callable[[list[str]], Estimate],
) -> Estimate:
    """Runs two rounds, or a few steps of a victim, without anything that writes; the rest is counted from there.

    Args:
        trainer: of the run; it loses its callbacks and its loggers.
        model: of the run, not set up yet.
        data: of the run, not set up yet.
        settings: of the run.
        parse: gives the settings of FSMG's surrogate.
        again: gives the estimate of another run, by its command line: FSMG's surrogate is trained first.

    Raises:
        InputError: the run itself would end with it, or it is one that this knows nothing of.
    """
    if not isinstance(model, Cloaking | Victim):
        raise InputError("--dry_run says what cloaking photos takes, or training a victim: leave it out")
    seconds, cloaking = {}, isinstance(model, Cloaking)
    started = time.monotonic()
    read_photos(trainer, data, "fit")
    seconds["reading photos"] = time.monotonic() - started
    found = look_at(trainer, data, settings.ckpt_path, settings.overwrite)
    done = read_checkpoint(Path(found))["epoch"] + 1 if found and Path(found).is_file() else 0
    if isinstance(model, FSMG):
        for surrogate in untrained(model, settings, settings.overwrite):
            seconds["training surrogates"] = seconds.get("training surrogates", 0.0)
            if surrogate.known:
                continue
            # Pictures of nobody are not drawn yet: the person's photos cost as much.
            there = [f"--data.photos={settings.data.init_args.photos}"] if surrogate.kept else []
            seconds["training surrogates"] += sum(again([*surrogate.words, *there, "--dry_run"]).seconds.values())
            gc.collect()  # its weights
        model.hparams.surrogate = None  # the base model in its place: of the same size, so that rounds cost the same
    watch, drawing = Stopwatch(callback(settings, "SampleGrid"), ROUNDS if cloaking else STEPS), Drawing()
    trainer.callbacks, trainer.loggers, model.draw = [watch], [], drawing  # type: ignore[attr-defined]
    started = time.monotonic()
    trainer.fit(model, datamodule=data)
    seconds["loading the model"] = watch.begun - started - drawing.spent
    seconds["class images"] = drawing.seconds
    first, usual = watch.laps[0], median(watch.laps[1:] or watch.laps)
    left = (trainer.max_epochs or 0) - done if isinstance(model, Cloaking) else model.steps or 0
    each = f"{usual:.2f} s" if usual < 10 else duration(usual)
    seconds[f"{left} {'rounds' if cloaking else 'steps'} of {each}"] = first - usual + left * usual
    every = watch.samples.get("every_n_epochs" if cloaking else "every_n_steps")
    seconds["sample pictures"] = watch.grid * (left // every if every else 0)
    if isinstance(model, Cloaking):
        seconds["writing photos"] = seconds_to_write(data, model.attack.budget)
    parts = ", ".join(f"{what} {duration(took)}" for what, took in seconds.items() if took >= 0.5)
    lines = [
        *photo_lines(data),
        f"time: about {duration(sum(seconds.values()))}{f' ({parts})' if parts else ''}",
        memory_line(trainer.strategy.root_device),
        disk_line(Path(trainer.default_root_dir), [[whole_run(data, footprint_of(model, settings, parse))]], 1),
    ]
    return Estimate(seconds, lines)


class Stopwatch(Callback):
    """Times rounds or steps, ends the run after a few, and then a grid of sample pictures, where the run has some.

    Args:
        samples: settings of the run's SampleGrid; empty where it has none.
        laps: rounds or steps.
    """

    def __init__(self, samples: dict[str, Any], laps: int) -> None:
        self.samples, self.number = samples, laps
        self.begun = self.started = self.grid = 0.0
        self.laps: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whatever the user has said about how long it is at least."""
        self.begun = now(pl_module.device)
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A round or a step."""
        self.started = now(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Was it the last one?"""
        self.laps.append(now(pl_module.device) - self.started)
        trainer.should_stop = len(self.laps) == self.number

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Sample pictures, in the precision in which they are drawn."""
        if not self.samples:
            return
        count, steps = self.samples["count"], self.samples["sampling_steps"]
        backbone = pl_module.backbone.to(pl_module.device)
        prompts = [pl_module.prompt(prompt) for prompt in self.samples["prompts"]]
        with trainer.precision_plugin.forward_context():
            self.grid = len(prompts) * seconds_to_draw(backbone, prompts[0], pl_module.resolution, count, steps)


class Drawing:
    """Stands in for ``class_images``: says how long it would take, and gives noise, with which rounds take as long.

    Attributes:
        seconds: that drawing and encoding all images that are missing takes, beside what the run itself sees of it.
        spent: seconds until that was known.
    """

    def __init__(self) -> None:
        self.seconds = self.spent = 0.0

    def __call__(
        self, backbone: Backbone, prompt: str, count: int, resolution: int, *, batch: int, fingerprint: str, **_: Any
    ) -> UInt8[Tensor, "n 3 h w"]:
        """A few pictures of the wanted size."""
        device, batch = backbone.device, min(batch, BATCH)
        begun = now(device)
        files = files_of(folder_of(backbone, prompt, resolution, batch=batch, fingerprint=fingerprint), count)
        if left := left_to_draw(files, batch):
            self.seconds += len(left) * seconds_to_draw(backbone, prompt, resolution, batch)
        pictures = torch.randint(256, (min(count, batch), 3, resolution, resolution), dtype=torch.uint8, device="cpu")
        started = now(device)
        backbone.encode_all(to_float(pictures).to(device), batch)
        self.seconds += (now(device) - started) * (count / len(pictures) - 1)  # the run itself encodes these
        self.spent += now(device) - begun
        return pictures


def now(device: torch.device) -> float:
    """The time at which a device has done all that it was told to do, in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.monotonic()


def seconds_to_draw(backbone: Backbone, prompt: str, side: int, count: int, steps: int | None = None) -> float:
    """How long pictures that are drawn at once take, told from a few sampling steps."""
    steps, noise, took = given(steps, backbone.defaults.sampling_steps), noise_of(backbone, side, range(count), 0), []
    least, most = min(2, steps), min(FEW, steps)  # samplers that say where they end take no single step
    for number in (least, least, most):  # the very first time takes longer
        started = now(noise.device)
        sample(backbone, prompt, noise, steps=number)
        took.append(now(noise.device) - started)
    _, short, long = took
    return short + (steps - least) * max(0.0, long - short) / max(1, most - least)


def seconds_to_write(data: Protection, budget: float) -> float:
    """How long the cloaked photos take to be made, compared with the originals and packed: as the largest, by size."""
    photos = sorted(data.photos, key=lambda photo: photo.size[0] * photo.size[1])
    took = 0.0
    for photo in (photos[0], photos[-1]):  # the very first time takes longer
        canvas = data.parametrisation.canvas([photo], data.resolution)
        state = canvas.blank + budget * STEP * torch.randn_like(canvas.blank).sign()
        started = time.monotonic()
        described(next(iter(data.parametrisation.finish(canvas, state, [photo], budget, data.delivery))))
        took = time.monotonic() - started
    if not data.parametrisation.own_size:
        return took * len(photos)
    areas = [photo.size[0] * photo.size[1] for photo in photos]
    return took * sum(areas) / areas[-1]


def photo_lines(data: Any) -> list[str]:
    """How many photos, and for each its size, how many faces are found, and as what it comes back."""
    photos, square = data.photos, f"{data.resolution} x {data.resolution}"
    if not isinstance(data, Protection):
        return [f"{len(photos)} photos, as squares of {square}"]
    whole = [photo for photo in photos if isinstance(photo, WholePhoto)]
    suffixes = [delivered_suffix(photo.original(), data.delivery) for photo in whole]
    names = cloaked_names([photo.name for photo in photos], suffixes or None)
    lines = []
    for photo, name in zip(photos, names, strict=True):
        size, faces = f"{photo.size[0]} x {photo.size[1]}", ""
        if isinstance(photo, WholePhoto):
            number = len(photo.at_grid.faces)
            faces = f", {number or 'no'} face{'' if number == 1 else 's'}"
        lines.append(f"{photo.name}: {size}{faces}; comes back as {name}, {size if whole else square}")
    found = sum(bool(photo.at_grid.faces) for photo in whole)
    return [f"{len(photos)} photos{f', a face found in {found} of them' if whole else ''}", *lines]


def memory_line(device: torch.device) -> str:
    """The most memory that there was in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        most = torch.cuda.max_memory_allocated(device)
        return f"memory: {size_of(most)} of the {size_of(card.total_memory)} of {card.name}"
    return f"memory: {size_of(peak_of_process())} of the {size_of(psutil.virtual_memory().total)} of this machine"


def peak_of_process() -> int:
    """The most main memory that this process has had, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def footprint_of(model: LightningModule, settings: Namespace, parse: Parse) -> Footprint:
    """What a run that nobody cleans up after writes; its last checkpoint stays, and while it is written the one before.

    Args:
        model: of the run, with its weights.
        settings: of the run.
        parse: gives the settings of FSMG's surrogate.
    """
    if isinstance(model, Cloaking):
        found = footprint_of_cloak(settings, parse, keep_models=True)
        return found._replace(run=found.run + found.weights // 2, weights=found.weights // 2)
    found = footprint_of_victim(settings)
    learned = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    checkpoint = 3 * learned  # with AdamW's two moments
    return Footprint(0, (found.weights or learned) + checkpoint, checkpoint, found.class_images)


def whole_run(data: Any, footprint: Footprint) -> Kind:
    """The one run that there is to do."""
    size = sum(uncompressed(photo.path) for photo in data.photos) if footprint.own_size else 0
    return Kind("this run", [Photos(len(data.photos), size)], [], footprint)
