"""Whose photos are cloaked, and how: a folder of people, as options of a command."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from antidreambooth.diffusion.seeding import require_seed
from antidreambooth.errors import InputError
from launch.jobs import Launcher
from launch.runs import hashes, is_config, located

OURS = ("jobs", "summary.jsonl", "table.md")  # in the output folder, beside people
# Our files' suffix, what a command line takes for a YAML mapping, what no terminal or UTF-8 file can show.
ODD = re.compile(r"\.failed$|:( |$)|[\x00-\x1f\x7f\ud800-\udfff]")
EACH = ("data.photos", "data.clean_photos", "seed_everything", "trainer.default_root_dir", "ckpt_path", "overwrite")


class Folders(NamedTuple):
    """Where a person's photos lie."""

    photos: Path  # to protect
    clean_photos: Path | None  # for reference; the photos themselves where there are none


@dataclass(frozen=True)
class People:
    """Who is protected, how, and where that runs.

    Args:
        folder: of people: each folder in it is a person, with photos in it, or with the photos to protect in set_B and
            (where there are some) others of the person in set_A, for reference.
        output: where each person gets a run's folder, with table.md and summary.jsonl beside them.
        protection: config file of a cloaking run, and its flags.
        names: of the people who are protected; all when not given.
        seed: of every run.
        launcher: where they run, through submitit.
    """

    folder: str
    output: str = "outputs/people"
    protection: str = "configs/aspl.yaml"
    names: list[str] | None = None
    seed: int = 0
    launcher: Launcher = field(default_factory=Launcher)

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        if self.names is not None and not self.names:
            raise InputError("--names is empty: leave it out for all people")

    @property
    def root(self) -> Path:
        """Where everything is written."""
        return Path(self.output).expanduser()

    @property
    def logs(self) -> Path:
        """Where what the jobs print is kept."""
        return self.root / "jobs"

    def record(self, name: str) -> Path:
        """The file that is there once a person is done; what it consists of lies beside it."""
        return self.root / name / "done.json"

    @cached_property
    def everyone(self) -> dict[str, Folders]:
        """All people by name.

        Raises:
            InputError: there is nobody, or somebody who was asked for is missing.
        """
        parent = Path(self.folder).expanduser()
        if not parent.is_dir():
            raise InputError(f"{self.folder} is no folder: --folder holds a folder of photos for each person")
        found = sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
        if missing := [name for name in self.names or [] if name not in found]:
            raise InputError(f"{self.folder} holds no folder {missing[0]!r}: check --names")
        if not found:
            raise InputError(
                f"{self.folder} holds nobody: each folder in it is a person; one person's photos are cloaked by "
                f"`fit -c {self.protection} --data.photos {self.folder}`"
            )
        return {name: _folders(parent / name) for name in dict.fromkeys(self.names or found)}

    def settings(self, name: str) -> dict[str, Any]:
        """What a person's cloaked photos depend on."""
        photos, clean = self.everyone[name]
        config = located(shlex.split(self.protection)[0])
        return {
            "protection": self.protection,
            "config": yaml.safe_load(Path(config).read_text(encoding="utf-8")),
            "seed": self.seed,
            "photos": hashes(photos),
            "clean_photos": hashes(clean) if clean else None,
        }

    def flags(self, name: str) -> dict[str, Any]:
        """What a person's run is told beside the protection."""
        photos, clean = self.everyone[name]
        return {"data.photos": photos, **({"data.clean_photos": clean} if clean else {}), "seed_everything": self.seed}

    def check(self) -> None:
        """Finds out before any work what cannot work.

        Raises:
            InputError: it cannot.
        """
        config, *flags = shlex.split(self.protection) or [""]
        if not is_config(config) or not Path(located(config)).is_file():
            raise InputError(f"--protection: there is no config file {config!r}, see configs/")
        for flag in flags:
            if flag.lstrip("-").partition("=")[0] in EACH:
                raise InputError(f"--protection: leave out {flag}, people have their own; there is --seed, --output")
        if self.root.resolve().is_relative_to(Path(self.folder).expanduser().resolve()):
            raise InputError(f"--output {self.output} lies in --folder, among the people: choose another folder")
        for name in self.everyone:
            if name in OURS or ODD.search(name):
                raise InputError(f"no person can be called {name!r} here: rename that folder")


def _folders(person: Path) -> Folders:
    protected, clean = person / "set_B", person / "set_A"
    if not protected.is_dir():
        return Folders(person, None)
    return Folders(protected, clean if clean.is_dir() else None)
