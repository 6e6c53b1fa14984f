"""What a verdict tries: people, protections, budgets, victims, conditions, seeds; and the cells that follow from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

from antidreambooth.diffusion.sampling import Generation
from antidreambooth.errors import InputError
from antidreambooth.evaluation.conditions import Condition
from antidreambooth.provenance import slug
from launch.jobs import Launcher
from launch.runs import is_config, located

BASE = "base"  # the control that is trained on nobody


@dataclass(frozen=True)
class Person:
    """Whose photos these are.

    Args:
        photos: folder of the photos to protect, the papers' set_B.
        clean_photos: folder of other photos, which a cloak may learn from and which tell whether it is them: set_A.
        extra_photos: folder of further clean photos, for reference and for mixing in: set_C.
    """

    photos: str
    clean_photos: str
    extra_photos: str | None = None

    @property
    def references(self) -> list[str]:
        """Folders of clean photos to compare with."""
        return [self.clean_photos, *([self.extra_photos] if self.extra_photos else [])]


@dataclass(frozen=True)
class Cloak:
    """One person's photos under one protection."""

    person: str
    protection: str
    budget: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return slug(f"{self.person}-{self.protection}-{self.budget:g}-s{self.seed}")


@dataclass(frozen=True)
class Cell:
    """One victim on one person's photos under one protection, after what happened to them on the way."""

    cloak: Cloak
    condition: str
    victim: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return slug(f"{self.cloak.name}-{self.condition}-{self.victim}-v{self.seed}")


@dataclass(frozen=True)
class Experiment:
    """A verdict: every victim on every person's photos under every protection and condition.

    Args:
        name: of the experiment; its results lie in ``folder``/``name``.
        folder: where the results of all experiments lie.
        people: names, each with the folders of their photos.
        people_folder: or a folder that holds one of each person, with set_A, set_B and set_C in it.
        people_names: those of its folders that are used; all when not given.
        protections: names, each with ``none``, ``noise`` (random, the whole budget in each value), a folder of photos
            that are protected already, or a config file of a cloaking run and its flags.
        budgets: largest changes, in 8-bit steps.
        victims: names, each with a config file of a victim and its flags.
        conditions: names, each with what happens to the photos on the way, in this order.
        cloak_seeds: of the protections.
        victim_seeds: of the victims.
        backbone: base model of protections and victims.
        generation: which pictures each victim is asked for.
        launcher: where it runs.
        keep_models: whether each victim's and fixed surrogate's weights are kept.
    """

    name: str = "mine"
    folder: str = "outputs/verdict"
    people: dict[str, Person] = field(default_factory=dict)
    people_folder: str | None = None
    people_names: list[str] | None = None
    protections: dict[str, str] = field(
        default_factory=lambda: {"none": "none", "noise": "noise", "aspl": "configs/aspl.yaml"}
    )
    budgets: list[float] = field(default_factory=lambda: [8.0])
    victims: dict[str, str] = field(default_factory=lambda: {"full": "configs/dreambooth.yaml"})
    conditions: dict[str, list[Condition]] = field(default_factory=lambda: {"nothing": []})
    cloak_seeds: list[int] = field(default_factory=lambda: [0])
    victim_seeds: list[int] = field(default_factory=lambda: [0])
    backbone: str = "embedded"
    generation: Generation = field(default_factory=lambda: Generation(images=8))
    launcher: Launcher = field(default_factory=Launcher)
    keep_models: bool = False

    @property
    def root(self) -> Path:
        """Where everything of it is written."""
        return Path(self.folder) / self.name

    def cloak_record(self, cloak: Cloak) -> Path:
        """The file that is there once a cloak is done; what it consists of lies beside it."""
        return self.root / "cloaks" / cloak.name / "done.json"

    def cell_record(self, cell: Cell) -> Path:
        """The same of a cell."""
        return self.root / "cells" / cell.name / "cell.json"

    def everyone(self) -> dict[str, Person]:
        """All people by name.

        Raises:
            InputError: there is nobody, or a folder is missing.
        """
        return self._everyone

    @cached_property
    def _everyone(self) -> dict[str, Person]:
        found = dict(self.people)
        if self.people_folder:
            parent = Path(self.people_folder).expanduser()
            names = self.people_names or sorted(p.name for p in parent.glob("*") if (p / "set_B").is_dir())
            for name in names:
                b, a, c = (parent / name / part for part in ("set_B", "set_A", "set_C"))
                found[name] = Person(str(b), str(a), str(c) if c.is_dir() else None)
        missing = [f for who in found.values() for f in (who.photos, *who.references) if not Path(f).exists()]
        if missing:
            raise InputError(f"{missing[0]} does not exist: check --people and --people_folder")
        if not found:
            raise InputError("there is nobody to try it on: give --people_folder or people, see --help")
        return found

    def cells(self) -> list[Cell]:
        """All cells; what cannot differ (no protection under another budget) once."""
        return list(dict.fromkeys(self._cells()))

    def cloaks(self) -> list[Cloak]:
        """What has to be cloaked before the cells can run, once for all of them."""
        made = [name for name, how in self.protections.items() if is_config(how.split()[0])]
        return list(dict.fromkeys(cell.cloak for cell in self.cells() if cell.cloak.protection in made))

    def check(self) -> None:
        """Finds out before any work what cannot work.

        Raises:
            InputError: it cannot.
        """
        for name in ("protections", "budgets", "victims", "conditions", "cloak_seeds", "victim_seeds"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: there is nothing to try")
        if BASE in self.protections:
            raise InputError(f"{BASE!r} is the name of the control that is always there: call that protection another")
        for name, how in self.protections.items():
            config = how.split()[0] if how.split() else ""
            folder = bool(config) and Path(how).is_dir()
            if how not in ("none", "noise") and not folder and not is_config(config):
                raise InputError(
                    f"protection {name}: {how!r} is neither none, noise, a folder of photos nor a config file"
                )
        for name, how in {**self.protections, **self.victims}.items():
            config = how.split()[0] if how.split() else ""
            if (is_config(config) or name in self.victims) and not Path(located(config)).is_file():
                raise InputError(f"{name}: there is no config file {config!r}, see configs/")
        twice = [name for name, count in Counter(cell.name for cell in self.cells()).items() if count > 1]
        if twice:
            raise InputError(f"two cells would be called {twice[0]}: name people, protections or conditions otherwise")

    def _cells(self) -> Iterator[Cell]:
        for person in self.everyone():
            yield Cell(Cloak(person, BASE, 0.0, 0), "nothing", "untrained", 0)
        # Everybody's first seed before anybody's second one: what there is of a stopped experiment can be read.
        for cloak_seed, seed in product(self.cloak_seeds, self.victim_seeds):
            for person, condition, victim in product(self.everyone(), self.conditions, self.victims):
                for (protection, how), budget in product(self.protections.items(), self.budgets):
                    fixed = how == "none" or Path(how).is_dir()
                    cloak = Cloak(person, protection, 0.0 if fixed else budget, 0 if fixed else cloak_seed)
                    yield Cell(cloak, condition, victim, seed)
