"""The command line: ``python cli.py fit -c configs/aspl.yaml``; ``--help`` explains the rest."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import callbacks
import datamodules
import lightning_modules  # noqa: F401 (class names on the command line resolve to what is imported)
from antidreambooth.errors import InputError
from antidreambooth.loading import read_defaults


def below(folder: str) -> object:
    return lambda root: str(Path(root) / folder)


class CommandLine(LightningCLI):
    """LightningCLI that keeps everything of a run in its folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One checkpoint in a fixed place, one TensorBoard log, the resolution that the model asks for."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.filename": "last", "checkpoint.every_n_epochs": 10, "checkpoint.enable_version_counter": False})
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=below("checkpoints"))
        parser.link_arguments("trainer.default_root_dir", "trainer.logger.init_args.save_dir")
        parser.link_arguments("model.resolution", "data.init_args.resolution", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint's settings are compared with the given ones, they never replace them."""


def main(args: ArgsType = None) -> None:
    """Runs a command; an error that is the user's to mend ends it in one line."""
    try:
        CommandLine(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": ".", "name": "", "version": "tensorboard"}},
                "use_distributed_sampler": False,
                "log_every_n_steps": 1,
            },
            args=args,
        )
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
