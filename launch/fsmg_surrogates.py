"""FSMG's surrogates: victims of our own, trained before the attack and reused after it.

One learns the person from the clean photos. Where the objective is a likelihood ratio, another one learns a nobody from
a few pictures that the untouched base model draws. As that depends on no person, it is kept for the next one.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from jsonargparse import Namespace
from lightning import Trainer
from tqdm import tqdm

from antidreambooth.attack.objectives.ratio import decoys
from antidreambooth.diffusion.class_images import BATCH, class_images
from antidreambooth.diffusion.layout import read_defaults
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import has_own_memory, usual_device
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError
from antidreambooth.files import cache_folder, replacing, write_json, writing
from antidreambooth.finetuning.full import Full
from antidreambooth.photos.delivery import write_png
from antidreambooth.provenance import MANIFEST, versions
from launch.runs import Fit, contents, finished, is_config, located
from lightning_modules.fsmg import FSMG, nobody_folder, surrogate_folder

PICTURES = 4  # of nobody
RECORD = "surrogate.json"  # in the folder of a surrogate that is there


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
        if one.kept is None:
            _train(one, fit)
            continue
        with writing(one.kept, "make room and make it writable, or name another cache folder with XDG_CACHE_HOME"):
            one.kept.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(one.kept.with_suffix(".lock")).acquire()
        with lock:  # whoever else wants the same nobody waits for it
            if one.known:
                _copy(one.kept, one.folder)
                write_json(one.folder / RECORD, {"settings": one.settings, "passes": {}})
            else:
                draw_nobody(trainer, module, pictures_of(one.folder))
                _train(one, fit)
                _copy(one.folder, one.kept)


class Untrained(NamedTuple):
    """A surrogate that is not there yet.

    Args:
        folder: where it is trained.
        settings: what it depends on.
        words: the command line that trains it.
        kept: where a nobody is kept for other runs; None of the person's.
    """

    folder: Path
    settings: dict[str, Any]
    words: list[str]
    kept: Path | None

    @property
    def known(self) -> bool:
        """Whether it is a nobody that an earlier run has trained."""
        return self.kept is not None and self.kept.is_dir()


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
    everybody: list[tuple[Source, Path, Any]] = [
        (source, surrogate_folder(root, source), seen)
        for source in [module.source, *Source.several(wanted.ensemble.backbones)]
    ]
    nobody = nobody_folder(root, module.source) if decoys(module.attack.objective) else None
    if nobody:
        drawn = {"drawn": PICTURES, "class_prompt": read_defaults(module.source).class_prompt}
        everybody.append((module.source, nobody, drawn))
    for source, folder, learned in everybody:
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
            if finished(folder / RECORD, settings):
                continue
        except InputError:
            if not overwrite:
                raise
        arguments = {
            **{f"model.{name}": value for name, value in model.items() if value is not None},
            "data.photos": pictures_of(folder) if folder == nobody else photos,
            "seed_everything": config.seed_everything,
            "trainer.default_root_dir": folder,
            "trainer.accelerator": trainer.accelerator,
            "trainer.devices": trainer.devices[:1] if isinstance(trainer.devices, list) else 1,
            "trainer.precision": trainer.precision,
            "checkpoint.every_n_train_steps": 0,
            "overwrite": "true",  # what an interrupted start left there
        }
        words = ["fit", f"--config={located(victim)}", *(f"--{k}={v}" for k, v in arguments.items()), *flags]
        kept = _kept(source, settings, located(victim), trainer) if folder == nobody else None
        yield Untrained(folder, settings, words, kept)


def pictures_of(nobody: Path) -> Path:
    """The folder of the pictures that the model in a folder learns nobody from."""
    return nobody.with_name(f"{nobody.name}-pictures")


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


def _kept(source: Source, settings: dict[str, Any], victim: str, trainer: Namespace) -> Path:
    """Where a nobody is kept: a name made of all that its weights depend on, so that no other one is taken for it."""
    made_by = {
        **settings,
        "backbone": load_backbone(source).fingerprint(),
        "config": hashlib.sha256(Path(victim).read_bytes()).hexdigest(),
        "device": f"{trainer.accelerator} {usual_device().type}",
        "versions": versions(),
    }
    return cache_folder("nobodies") / hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


def _train(one: Untrained, fit: Fit) -> None:
    with _same_seed_afterwards():
        fit(one.words)
    gc.collect()  # its weights and moments
    if not (one.folder / Full.folder).is_dir():
        raise InputError(f"--model.surrogate {one.settings['victim']!r} trains no whole model: FSMG attacks one")
    write_json(one.folder / RECORD, {"settings": one.settings, "passes": _passes(one.folder)})


def _copy(nobody: Path, to: Path) -> None:
    """The model and what says how it was made; takes no room where the file system can link."""

    def link(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, copy)

    with replacing(to) as fresh:
        shutil.copytree(nobody / Full.folder, fresh / Full.folder, copy_function=link)
        shutil.copy2(nobody / MANIFEST, fresh)


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
    record: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    training = record["settings"]["model"]["training"]
    images = training["batch_size"] * (2 if training["prior"]["weight"] else 1)
    return {"denoiser": record["steps"] * images}
