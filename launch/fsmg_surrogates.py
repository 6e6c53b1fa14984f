"""FSMG's surrogates: victims of our own, trained before the attack and reused after it.

One learns the person from the clean photos. Where the objective is a likelihood ratio, another one learns a nobody from
a few pictures that the untouched base model draws.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning import Trainer
from tqdm import tqdm

from antidreambooth.attack.objectives.ratio import decoys
from antidreambooth.diffusion.class_images import BATCH, class_images
from antidreambooth.diffusion.layout import read_defaults
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import has_own_memory
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError
from antidreambooth.files import write_json
from antidreambooth.finetuning.full import Full
from antidreambooth.photos.delivery import write_png
from launch.runs import Fit, contents, finished, is_config, located
from lightning_modules.fsmg import FSMG, nobody_folder, surrogate_folder

PICTURES = 4  # of nobody


def train_surrogates(trainer: Trainer, module: FSMG, config: Namespace, fit: Fit, overwrite: bool) -> None:
    """Trains the surrogates that a run attacks, where they are not there yet.

    Args:
        trainer: of the run.
        module: of the run.
        config: of the run.
        fit: runs a command line of this project.
        overwrite: whether one that was trained otherwise is replaced.

    Raises:
        InputError: one that is there was trained otherwise, or several processes would have to train one.
    """
    for one in untrained(module, config, overwrite):
        _refuse_several(config.trainer, one.folder)
        if one.pictures is not None:
            draw_nobody(trainer, module, one.pictures)
        with _same_seed_afterwards():
            fit(one.words)
        gc.collect()  # its weights and moments
        if not (one.folder / Full.folder).is_dir():
            how = module.hparams.surrogate
            raise InputError(f"--model.surrogate {how!r} trains no whole model: FSMG attacks one")
        write_json(one.folder / "surrogate.json", {"settings": one.settings, "passes": _passes(one.folder)})


class Untrained(NamedTuple):
    """A surrogate that is not there yet.

    Args:
        folder: where it is trained.
        settings: what it depends on.
        words: the command line that trains it.
        pictures: folder of the pictures of nobody that it learns, which have to be drawn first; None of the person's.
    """

    folder: Path
    settings: dict[str, Any]
    words: list[str]
    pictures: Path | None = None


def untrained(module: FSMG, config: Namespace, overwrite: bool) -> Iterator[Untrained]:
    """The surrogates that a run still has to train; see ``train_surrogates``."""
    wanted, data, trainer = module.hparams, config.data.init_args, config.trainer
    if wanted.surrogate is None:
        return
    victim, *flags = shlex.split(wanted.surrogate) or [""]
    if not is_config(victim) or not Path(located(victim)).is_file():
        raise InputError(f"--model.surrogate {wanted.surrogate!r} is no config file of a victim (configs/), nor null")
    photos, root = data.clean_photos or data.photos, Path(trainer.default_root_dir or ".").expanduser()
    seen = contents(photos)
    everybody: list[tuple[Source, Path, Any, Path | None]] = [
        (source, surrogate_folder(root, source), seen, None)
        for source in [module.source, *Source.several(wanted.ensemble.backbones)]
    ]
    if decoys(module.attack.objective):
        folder, prompt = nobody_folder(root, module.source), read_defaults(module.source).class_prompt
        drawn = {"drawn": PICTURES, "class_prompt": prompt}
        everybody.append((module.source, folder, drawn, folder.with_name(f"{folder.name}-pictures")))
    for source, folder, learned, pictures in everybody:
        # What older runs have recorded: of the first model also what was not given.
        own = {"revision": source.revision, "variant": source.variant} if source == module.source else {}
        model = {"backbone": source.name, "resolution": module.resolution, **own, **source.given}
        settings = {
            "victim": wanted.surrogate,
            "model": model,
            "photos": learned,
            "seed": config.seed_everything,
            "precision": str(trainer.precision),
        }
        try:
            if finished(folder / "surrogate.json", settings):
                continue
        except InputError:
            if not overwrite:
                raise
        arguments = {
            **{f"model.{name}": value for name, value in model.items() if value is not None},
            "data.photos": pictures or photos,
            "seed_everything": config.seed_everything,
            "trainer.default_root_dir": folder,
            "trainer.accelerator": trainer.accelerator,
            "trainer.devices": trainer.devices[:1] if isinstance(trainer.devices, list) else 1,
            "trainer.precision": trainer.precision,
            "checkpoint.every_n_train_steps": 0,
            "overwrite": "true",  # what an interrupted start left there
        }
        words = ["fit", f"--config={located(victim)}", *(f"--{k}={v}" for k, v in arguments.items()), *flags]
        yield Untrained(folder, settings, words, pictures)


def draw_nobody(trainer: Trainer, module: FSMG, folder: Path) -> None:
    """A few pictures of the class prompt by the untouched base model: of people who do not exist.

    Args:
        trainer: of the run.
        module: of the run.
        folder: where they are written.
    """
    device, prompt = trainer.strategy.root_device, read_defaults(module.source).class_prompt
    backbone, shown = load_backbone(module.source), partial(tqdm, desc="pictures of nobody")
    # Class images, which both models know, have seed 0; a run's seed is never below it.
    with trainer.precision_plugin.forward_context():
        if has_own_memory(device):
            backbone.rest_text_encoders(device, [[prompt] * BATCH])
        pictures = class_images(
            backbone.to(device), prompt, PICTURES, module.resolution, seed=module.seed + 1, progress=shown
        )
    for number, picture in enumerate(pictures):
        write_png(folder / f"{number}.png", picture)


def _refuse_several(trainer: Namespace, folder: Path) -> None:
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    if started > 1 or trainer.num_nodes > 1:
        raise InputError(
            f"the surrogate {folder} is not trained yet, and several processes were started at once: run this "
            "command with one process first (--trainer.max_epochs 1 is enough)"
        )


@contextmanager
def _same_seed_afterwards() -> Iterator[None]:
    """A fit leaves its seed in the environment, where every round of this one looks for its own."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    try:
        yield
    finally:
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed


def _passes(folder: Path) -> dict[str, int]:
    """Images that went through the U-Net in training."""
    record: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    training = record["settings"]["model"]["training"]
    images = training["batch_size"] * (2 if training["prior"]["weight"] else 1)
    return {"denoiser": record["steps"] * images}
