"""The command line: ``python cli.py fit -c configs/aspl.yaml``; the README says how to ask for each flag's meaning."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from launch.waiting import Meter, others, threads_beside, usable_cores
from page.command import main as open_page
from page.command import page

if __name__ == "__main__" and sys.argv[1:2] == ["page"]:  # it answers in a second; what follows takes several
    open_page(sys.argv[2:])
    sys.exit()

BEGUN = Meter.read()  # the seconds in which torch is loaded show what else the machine does

import torch
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import callbacks  # noqa: F401 (class names on the command line resolve to what is imported)
import datamodules  # noqa: F401
from antidreambooth.diffusion.layout import read_defaults
from antidreambooth.diffusion.precision import computes_in_bf16, usual_device
from antidreambooth.errors import DEBUG, InputError, causes, first_line
from launch.dry_run import Estimate, dry_run
from launch.flags import named, require_numbers
from launch.fragility.command import fragility
from launch.fsmg_surrogates import train_surrogates
from launch.help import FIT, TEST, USAGE, WELCOME, Help
from launch.parsing import OneLineOfLightning
from launch.people.command import people
from launch.runs import backbones_of
from launch.verdict.command import verdict
from lightning_modules import FSMG
from lightning_modules.backbone_module import BackboneModule
from lightning_modules.running.run_folder import begin_fit, begin_test, claimed
from lightning_modules.running.strategies import SUPPORTED

TRAINER = {
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "logger": {
        "class_path": "lightning_modules.TensorBoardLog",
        "init_args": {"save_dir": ".", "name": "", "version": "tensorboard"},
    },
    "plugins": [{"class_path": "lightning_modules.AtomicCheckpointIO"}],
    "use_distributed_sampler": False,  # every rank holds all photos
}
GRACE = 10.0  # seconds that other ranks have to end by themselves once one has failed
CHECKPOINT = {"filename": "last", "every_n_epochs": 10, "enable_version_counter": False}
# Commands that are not one run of Lightning's; the page is served without any of these.
COMMANDS = {"people": people, "verdict": verdict, "fragility": fragility}
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

    estimate: Estimate | None = None  # of a dry run

    built: ClassVar[dict[str, Any]] = {}  # what setup_parser makes, which depends on nothing but this file

    def setup_parser(self, *arguments: Any) -> None:
        """Once in a process: FSMG, a verdict and a dry run parse several command lines."""
        if not self.built:
            before = {*vars(self)}
            super().setup_parser(*arguments)
            self.built.update({name: value for name, value in vars(self).items() if name not in before})
        vars(self).update(self.built)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One checkpoint in a fixed place, one TensorBoard log, the resolution that the model asks for."""
        parser.add_argument(
            "--overwrite",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="replace the result that an earlier run left in the same folder, once the new one is whole",
        )
        parser.add_argument(
            "--dry_run",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="say how long a fit will take, and how much memory and disk, by running a moment of it; write nothing",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({f"checkpoint.{name}": value for name, value in CHECKPOINT.items()})
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=checkpoint_folder)
        parser.link_arguments("trainer.default_root_dir", "trainer.logger.init_args.save_dir", compute_fn=run_folder)
        parser.link_arguments("model.resolution", "data.init_args.resolution", apply_on="instantiate")
        parser.link_arguments("model.parametrisation", "data.init_args.parametrisation", apply_on="instantiate")
        parser.link_arguments("model.steps", "data.init_args.steps", apply_on="instantiate")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of Lightning's commands that mean something here: no module of ours validates or predicts."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "test")}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Also shows the terms of a model that has some, before anything else."""
        self.read(parser, args)
        if not self.config[self.config.subcommand].trainer.default_root_dir:
            raise InputError("--trainer.default_root_dir is empty: name a folder for what the run writes")
        require_numbers(self.config[self.config.subcommand])
        arguments = self.config.get(f"{self.config.subcommand}.model.init_args") or Namespace()
        for source in backbones_of(arguments):
            if notice := read_defaults(source).notice:
                show(notice)

    def read(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses; a parser that has refused something remembers part of it, and is not used again."""
        try:
            super().parse_arguments(parser, args)
        except (Exception, SystemExit):
            self.built.clear()
            raise

    def before_instantiate_classes(self) -> None:
        """Decides on the precision, where the user does not: the device that will run is known now."""
        chosen = self.config[self.config.subcommand].trainer
        device = device_of(chosen)
        if chosen.precision is None:
            able = computes_in_bf16(device)
            chosen.precision = "bf16-mixed" if able else "32-true"
            show(f"precision {chosen.precision}: {device} {'computes' if able else 'does not compute'} in bfloat16")
        if device.type == "cpu" and str(chosen.devices) in ("auto", "1") and chosen.num_nodes == 1:
            leave_busy_cores(bool(self.config[self.config.subcommand].ckpt_path))

    def instantiate_classes(self) -> None:
        """Calls a number out of range by its flag."""
        with named(self.config[self.config.subcommand]):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Says in one line what the trainer refuses, such as a GPU where there is none."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:  # Lightning's, for arguments of Trainer
            reason = first_line(error).partition(". ")[0]
            names = f"; --trainer.strategy is {SUPPORTED}" if "strategy" in reason else ""
            raise InputError(f"the trainer refuses its settings (--trainer.*): {reason}{names}") from error

    def before_fit(self) -> None:
        """Looks at what is in the folder; then, a method may need models that other fits train."""
        chosen = self.config.fit
        overwrite, chosen.overwrite = chosen.overwrite, False  # the config that is kept may be used again
        self.config_init.fit.ckpt_path = begin_fit(self.trainer, self.datamodule, chosen.ckpt_path, overwrite)
        if isinstance(self.model, FSMG):
            train_surrogates(self.trainer, self.model, self.config.fit, main, overwrite)

    def before_test(self) -> None:
        """Looks at what is in the folder."""
        begin_test(self.trainer, self.config.test.ckpt_path, self.config.test.overwrite)

    def _run_subcommand(self, subcommand: str) -> None:
        """One run at a time in a folder. Where the GPU's memory is full, says in one line what would help."""
        try:
            if self.config[subcommand].dry_run:
                self.try_a_moment(subcommand)
                return
            with claimed(self.trainer, self.datamodule, subcommand), named(self.config[subcommand]):
                super()._run_subcommand(subcommand)
        except Exception as error:
            end_other_ranks(self.trainer)
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            savers = self.model.memory_savers() if isinstance(self.model, BackboneModule) else []
            raise InputError(memory_is_full(error, savers)) from error

    def try_a_moment(self, subcommand: str) -> None:
        """Runs a moment of a fit, and says what all of it will take."""
        if subcommand != "fit":
            raise InputError("--dry_run is for fit: leave it out")
        show("trying a moment of the run; nothing is written to its folder")
        with named(self.config.fit):
            self.estimate = dry_run(self.trainer, self.model, self.datamodule, self.config.fit, parsed, estimated)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: a checkpoint's settings are compared with the given ones, they never replace them."""


def end_other_ranks(trainer: Trainer) -> None:
    """Those that this process started; they would wait for it, and Lightning ends them after Ctrl-C only.

    What is wrong on all of them, each says before it ends: they have a moment for it.
    """
    if (launcher := trainer.strategy.launcher) is None:
        return
    deadline = time.monotonic() + GRACE
    for process in launcher.procs:  # type: ignore[attr-defined]  # the one for processes of their own
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    launcher.kill(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


def leave_busy_cores(resumed: bool) -> None:
    """Computes with a thread for each idle core: a round waits for its slowest thread.

    What the user has chosen stays, and so does what a run that is resumed has begun with (its checkpoint says it), as
    another number of threads rounds differently.
    """
    busy, threads = others(BEGUN, Meter.read()), torch.get_num_threads()
    fewer = threads_beside(busy, threads)
    if resumed or fewer == threads or "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(fewer)
    show(
        f"threads {fewer}: other programs keep about {round(busy)} of {len(usable_cores())} cores busy, and a round "
        f"waits for its slowest thread (OMP_NUM_THREADS={threads} keeps {threads}, and the bytes of an idle machine)"
    )


def device_of(trainer: Namespace) -> torch.device:
    """The device, or the first of those, on which a trainer with these settings runs."""
    kinds = {"gpu": usual_device().type, "cuda": "cuda", "mps": "mps", "cpu": "cpu"}
    kind = kinds.get(trainer.accelerator, usual_device().type)
    several = kind == "cuda" and isinstance(trainer.devices, list) and trainer.devices
    return torch.device(f"cuda:{trainer.devices[0]}" if several else kind)


class Parsed(Exception):  # noqa: N818 (nothing is wrong)
    """Ends a command line as soon as it is parsed; carries the settings."""


class OnlyParsed(CommandLine):
    """A command line that is parsed and not run."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Ends here: LightningCLI's constructor would go on and run it. What is built finds numbers out of range."""
        self.read(parser, args)
        settings = self.config[self.config.subcommand]
        require_numbers(settings)
        with named(settings):
            parser.instantiate(self.config)
        raise Parsed(self.config)


def run_folder(root: str | None) -> str:
    """Where a run writes; a config that says nothing of it can be parsed, for a verdict that decides on it later."""
    return root or "."


def checkpoint_folder(root: str | None) -> str:
    """Where the checkpoint of a run is kept."""
    return str(Path(run_folder(root)) / "checkpoints")


@cache
@rank_zero_only
def show(line: str) -> None:
    """Prints a line, once, however many runs this one starts."""
    print(line, flush=True)


def no_advertisement(record: logging.LogRecord) -> bool:
    """Drops Lightning's tips about a cloud service."""
    return "Tip:" not in record.getMessage()


def main(args: ArgsType = None) -> None:
    """Runs a command; an error that is the user's to mend ends it with one line and how to see where it came from."""
    words = sys.argv[1:] if args is None else args
    if "" not in sys.path:
        sys.path.append("")  # the working directory, where a user's own classes are; Python itself adds cli.py's folder
    if isinstance(words, list) and (not words or words[0] in ("-h", "--help")):
        print(WELCOME, flush=True)
        return
    try:
        if isinstance(words, list) and words[0] == "page":
            page(words[1:])
        elif isinstance(words, list) and words[0] in COMMANDS:
            COMMANDS[words[0]](words[1:], main, parsed)
        else:
            if isinstance(words, list) and not words[0].startswith("-"):
                require_command(words[0])
            ran = one_run(args)
            if ran.estimate is not None and ran.trainer.is_global_zero:
                print("\n".join(ran.estimate.lines), flush=True)
    except Exception as error:
        message = users_to_mend(error)
        if message is None:
            raise
        if os.environ.get(DEBUG, "0") in ("", "0"):
            sys.exit(f"error: {message}\n({DEBUG}=1 shows where)")
        traceback.print_exception(error)
        sys.exit(f"error: {message}")


def require_command(name: str) -> None:
    """The parser of Lightning's commands does not know of the others.

    Raises:
        InputError: there is no such command.
    """
    known = [*CommandLine.subcommands(), *COMMANDS, "page"]
    if name not in known:
        raise InputError(f"there is no command {name!r}: choose {', '.join(known)}; `python cli.py` explains them")


def parsed(words: list[str]) -> Namespace:
    """All settings of the run that a command line of Lightning's commands asks for; nothing is built or run.

    Raises:
        SystemExit: it is wrong; the parser has printed why.
    """
    try:
        one_run(words, OnlyParsed)
    except Parsed as ended:
        (config,) = ended.args
    settings: Namespace = config[config.subcommand]
    return settings


def estimated(words: list[str]) -> Estimate:
    """What the run of a command line with ``--dry_run`` will take."""
    found = one_run(words).estimate
    assert found is not None
    return found


def one_run(args: ArgsType, command_line: type[CommandLine] = CommandLine) -> CommandLine:
    """Lightning's own commands: fit, test and so on."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(no_advertisement)
    options: dict[str, Any] = {"subclass_mode_model": True, "subclass_mode_data": True, "seed_everything_default": 0}
    with warnings.catch_warnings():
        for message in EXPECTED:
            warnings.filterwarnings("ignore", message)
        return command_line(
            LightningModule,
            LightningDataModule,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            parser_class=OneLineOfLightning,
            trainer_defaults=TRAINER,
            parser_kwargs={
                "formatter_class": Help,
                "fit": {"description": FIT, "usage": USAGE["fit"], "formatter_class": Help},
                "test": {"description": TEST, "usage": USAGE["test"], "formatter_class": Help},
            },
            args=args,
            **options,
        )


def users_to_mend(error: Exception) -> str | None:
    """What to tell the user, where an error is theirs to mend; jsonargparse raises its own from a constructor's."""
    for cause in causes(error):
        if isinstance(cause, InputError):
            return " ".join(str(cause).splitlines())
        if isinstance(cause, torch.OutOfMemoryError):  # outside a run, such as in an estimate
            return memory_is_full(cause, [])
    return None


def memory_is_full(error: torch.OutOfMemoryError, savers: list[str]) -> str:
    """What torch could not allocate on a GPU, and what would help."""
    tried = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    what = f"torch tried to allocate {tried[1]}" if tried else first_line(error)
    ways = ", ".join([*savers, "a smaller --model.resolution"])
    return f"the GPU's memory is full ({what}): use {ways} or a GPU with more memory"


if __name__ == "__main__":
    main()
