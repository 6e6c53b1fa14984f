"""The command line: ``python cli.py fit -c configs/aspl.yaml``; the README says how to ask for each flag's meaning."""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import callbacks  # noqa: F401 (class names on the command line resolve to what is imported)
import datamodules  # noqa: F401
from antidreambooth.diffusion.loading import read_defaults
from antidreambooth.diffusion.precision import computes_in_bf16
from antidreambooth.errors import InputError
from launch.fsmg_surrogates import train_surrogates
from launch.people.command import people
from launch.verdict.command import verdict
from lightning_modules import FSMG
from lightning_modules.running.strategies import SUPPORTED

TRAINER = {
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": ".", "name": "", "version": "tensorboard"},
    },
    "precision": "bf16-mixed" if computes_in_bf16() else "32-true",
    "plugins": [{"class_path": "lightning_modules.AtomicCheckpointIO"}],
    "use_distributed_sampler": False,  # every rank holds all photos
}
CHECKPOINT = {"filename": "last", "every_n_epochs": 10, "enable_version_counter": False}
HELP = (
    "Cloaks photos and trains on cloaked photos: `fit -c configs/aspl.yaml`, `fit -c configs/dreambooth.yaml`, then "
    "`test` with the same config. Photos of many people: `people --help`. Many victims, compared: `verdict --help`."
)
COMMANDS = {"people": people, "verdict": verdict}  # which start runs; all others are one run
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
EXPECTED = (  # warnings about what is meant to be so
    ".*in eval mode at the start of training.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*LeafSpec.*is deprecated.*",
    ".*not recommended to provide both args and command line arguments.*",  # a run that starts another one
    ".*ended before the epoch ended and your dataloader is not resumable.*",  # all batches of a victim are the same
)


class CommandLine(LightningCLI):
    """LightningCLI that keeps all of a run in its folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One checkpoint in a fixed place, one TensorBoard log, the resolution that the model asks for."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({f"checkpoint.{name}": value for name, value in CHECKPOINT.items()})
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=checkpoint_folder)
        parser.link_arguments("trainer.default_root_dir", "trainer.logger.init_args.save_dir")
        parser.link_arguments("model.resolution", "data.init_args.resolution", apply_on="instantiate")
        parser.link_arguments("model.steps", "data.init_args.steps", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Also shows the terms of a model that has some, before anything else."""
        super().parse_arguments(parser, args)
        arguments = self.config.get(f"{self.config.subcommand}.model.init_args") or Namespace()
        for backbone in (arguments.get("backbone"), *(arguments.get("ensemble.backbones") or [])):
            if backbone is not None and (notice := read_defaults(backbone).notice):
                show(notice)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Says in one line what the trainer refuses, such as a GPU where there is none."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            if users_to_mend(error):
                raise
            reason = str(error).splitlines()[0].partition(". ")[0]
            names = f"; --trainer.strategy is {SUPPORTED}" if "strategy" in reason else ""
            raise InputError(f"the trainer refuses its settings (--trainer.*): {reason}{names}") from error

    def before_fit(self) -> None:
        """A method may need models that other fits train."""
        if isinstance(self.model, FSMG):
            train_surrogates(self.model, self.config.fit, main)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: a checkpoint's settings are compared with the given ones, they never replace them."""


def checkpoint_folder(root: str | None) -> str:
    """Where the checkpoint of a run is kept."""
    return str(Path(root or ".") / "checkpoints")


@cache
@rank_zero_only
def show(line: str) -> None:
    """Prints a line, once, however many runs this one starts."""
    print(line, flush=True)


def no_advertisement(record: logging.LogRecord) -> bool:
    """Drops Lightning's tips about a cloud service."""
    return "Tip:" not in record.getMessage()


def main(args: ArgsType = None) -> None:
    """Runs a command; an error that is the user's to mend ends it with one line."""
    words = sys.argv[1:] if args is None else args
    if "" not in sys.path:
        sys.path.append("")  # the working directory, where a user's own classes are; Python itself adds cli.py's folder
    try:
        if isinstance(words, list) and words and words[0] in COMMANDS:
            COMMANDS[words[0]](words[1:], main)
        else:
            one_run(args)
    except Exception as error:
        message = users_to_mend(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")


def one_run(args: ArgsType) -> None:
    """Lightning's own commands: fit, test and so on."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(no_advertisement)
    options: dict[str, Any] = {"subclass_mode_model": True, "subclass_mode_data": True, "seed_everything_default": 0}
    with warnings.catch_warnings():
        for message in EXPECTED:
            warnings.filterwarnings("ignore", message)
        CommandLine(
            LightningModule,
            LightningDataModule,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=TRAINER,
            parser_kwargs={"description": HELP},
            args=args,
            **options,
        )


def users_to_mend(error: BaseException | None) -> str | None:
    """What to tell the user, where an error is theirs to mend; jsonargparse wraps the errors of constructors."""
    while error is not None:
        if isinstance(error, InputError):
            return str(error)
        if isinstance(error, OSError) and error.errno in NO_PLACE:
            return f"{error.filename or 'a file'} cannot be written: {error.strerror}; older files are untouched"
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    main()
