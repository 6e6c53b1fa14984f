"""FSMG's surrogates: victims of our own, trained on the clean photos before the attack and reused after it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from antidreambooth.adaptations import Full
from antidreambooth.errors import InputError
from antidreambooth.photos import write_json
from launch.cell import Fit, contents, finished
from launch.experiment import is_config, located
from lightning_modules.fsmg import FSMG, surrogate_folder

SHARED = ("accelerator", "precision")  # of the trainer: surrogates are trained as they are attacked


def train_surrogates(config: Namespace, fit: Fit) -> None:
    """Trains the surrogates that a run attacks, where they are not there yet; does nothing for other methods.

    Args:
        config: of the run.
        fit: runs a command line of this project.

    Raises:
        InputError: one that is there was trained otherwise, or it would have to be trained by several processes.
    """
    if config.model.class_path.rpartition(".")[2] != FSMG.__name__ or config.model.init_args.surrogate is None:
        return
    model, data, root = config.model.init_args, config.data.init_args, Path(config.trainer.default_root_dir or ".")
    victim, *flags = shlex.split(model.surrogate) or [""]
    if not is_config(victim) or not Path(located(victim)).is_file():
        raise InputError(
            f"--model.surrogate {model.surrogate!r} is no config file of a victim (see configs/), nor null"
        )
    photos = data.clean_photos or data.photos
    for backbone in [model.backbone, *model.ensemble.backbones]:
        folder = surrogate_folder(root, backbone)
        settings: dict[str, Any] = {
            "victim": model.surrogate,
            "backbone": backbone,
            "photos": contents(photos),
            "seed": config.seed_everything,
        }
        record = folder / "surrogate.json"
        if finished(record, settings):
            continue
        if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1:
            raise InputError(
                f"the surrogate {folder} is not trained yet, and several processes were started at once: run this "
                "command with one process first (--trainer.max_epochs 1 is enough)"
            )
        fit(
            [
                "fit",
                f"--config={located(victim)}",
                f"--model.backbone={backbone}",
                f"--data.photos={photos}",
                f"--seed_everything={config.seed_everything}",
                f"--trainer.default_root_dir={folder}",
                *(f"--trainer.{name}={config.trainer[name]}" for name in SHARED),
                "--trainer.devices=1",
                "--checkpoint.every_n_train_steps=0",
                *flags,
            ]
        )
        if not (folder / Full.folder).is_dir():
            raise InputError(f"--model.surrogate {model.surrogate!r} trains no whole model: FSMG attacks one")
        write_json(record, {"settings": settings})
