"""What a verdict tries: people, protections, budgets, victims, conditions, seeds; and the cells that follow from it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

from antidreambooth.diffusion.layout import family_of, resolution_of
from antidreambooth.diffusion.sampling import Generation
from antidreambooth.diffusion.seeding import require_seed
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError, require
from antidreambooth.evaluation.conditions import Condition
from antidreambooth.evaluation.judgement import BASELINE, CONTROLS
from launch.jobs import Launcher
from launch.runs import is_config, located
from launch.verdict.cell import BASE, Cell, Cloak, Origin, Person
from launch.verdict.elsewhere import folder_of, require_pairs, require_people

OWN = "you"  # who --photos are of: their cloaked photos need not be made of the clean ones


class Resolved(NamedTuple):
    """All tasks of an experiment.

    Args:
        cloaks: what has to be cloaked before the cells can run, once for all of them.
        cells: victims to be trained and measured.
    """

    cloaks: list[Cloak]
    cells: list[Cell]


@dataclass(frozen=True)
class Experiment:
    """A verdict: every victim on every person's photos under every protection and condition.

    Args:
        name: of the experiment; its results lie in ``folder``/``name``.
        folder: where the results of all experiments lie.
        people: names, each with the folders of their photos.
        people_folder: or a folder that holds one of each person, with set_A, set_B and set_C in it.
        people_names: those of its folders that are used; all when not given.
        protections: names, each with ``none``, ``noise`` (random, the whole budget in each value), a config file of a
            cloaking run and its flags, or a folder of photos that another tool has cloaked, with a folder for each
            person in it and the originals' file stems. NAME=FOLDER adds one to those of the config file.
        baseline: the protection that the others are compared with, as they are with none and noise.
        budgets: largest changes, in 8-bit steps.
        victims: names, each with a config file of a victim and its flags.
        conditions: names, each with what happens to the photos on the way, in this order.
        cloak_seeds: of the protections.
        victim_seeds: of the victims.
        backbone: base model of protections and victims.
        revision: branch, tag or commit of it, if it is a hub id.
        variant: variant of its weights' files, such as ``fp16``.
        components: where it is one ``.safetensors`` file, a folder in diffusers layout of the same kind of model.
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
    baseline: str = BASELINE
    budgets: list[float] = field(default_factory=lambda: [8.0])
    victims: dict[str, str] = field(default_factory=lambda: {"full": "configs/dreambooth.yaml"})
    conditions: dict[str, list[Condition]] = field(default_factory=lambda: {"nothing": []})
    cloak_seeds: list[int] = field(default_factory=lambda: [0])
    victim_seeds: list[int] = field(default_factory=lambda: [0])
    backbone: str = "embedded"
    revision: str | None = None
    variant: str | None = None
    components: str | None = None
    generation: Generation = field(default_factory=lambda: Generation(images=8))
    launcher: Launcher = field(default_factory=Launcher)
    keep_models: bool = False

    def __post_init__(self) -> None:
        for budget in self.budgets:
            require("budgets", budget, 1, 255, unit="in 8-bit steps")
        for name, seeds in (("cloak_seeds", self.cloak_seeds), ("victim_seeds", self.victim_seeds)):
            for seed in seeds:
                require_seed(name, seed)
        if self.people_names is not None and not self.people_names:
            raise InputError("--people_names is empty: leave it out for all people")

    @property
    def source(self) -> Source:
        """The base model."""
        return Source(self.backbone, self.revision, self.variant, self.components)

    @property
    def root(self) -> Path:
        """The folder of all of its results."""
        return Path(self.folder) / self.name

    def resolve(self) -> Resolved:
        """All cloaks and cells, each with all that it needs.

        What cannot differ is there once: photos without protection are the same under every budget and seed.

        Raises:
            InputError: something in this experiment cannot work.
        """
        self._check()
        everyone = self._everyone()
        origins = {name: self._origin(name, how, everyone) for name, how in self.protections.items()}
        for name in (name for name, origin in origins.items() if origin == "elsewhere"):
            require_people(name, self.protections[name], everyone)
        cells = list(dict.fromkeys(self._cells(everyone, origins)))
        for cloak in dict.fromkeys(cell.cloak for cell in cells if cell.cloak.origin == "elsewhere"):
            require_pairs(cloak.counterparts)
        twice = [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]
        if twice:
            raise InputError(f"two cells would be called {twice[0]}: name people, protections or conditions otherwise")
        return Resolved(list(dict.fromkeys(cell.cloak for cell in cells if cell.cloak.origin == "run")), cells)

    def _check(self) -> None:
        for name in ("protections", "budgets", "victims", "conditions", "cloak_seeds", "victim_seeds"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: there is nothing to try")
        if BASE in self.protections:
            raise InputError(f"{BASE!r} is the name of the control that is always there: call that protection another")
        others = [name for name in self.protections if name not in CONTROLS]
        if self.baseline not in (BASELINE, *others):
            known = ", ".join(others) or "there are controls alone"
            raise InputError(f"--baseline {self.baseline!r} is none of the protections: {known}")
        resolution_of(self.source)  # what is wrong with it is found before anybody's photos are cloaked
        family = family_of(self.source)
        for condition in (one for several in self.conditions.values() for one in several):
            condition.check(family)
        for name, how in self.protections.items():
            origin_of(name, how)
        for name, how in self.victims.items():
            require_config(name, how)

    def _everyone(self) -> dict[str, Person]:
        """All people by name."""
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

    def _origin(self, name: str, how: str, everyone: dict[str, Person]) -> Origin:
        origin = origin_of(name, how)
        if origin == "elsewhere" and set(everyone) == {OWN}:
            return "folder"
        return origin

    def _cells(self, everyone: dict[str, Person], origins: dict[str, Origin]) -> Iterator[Cell]:
        for person, folders in everyone.items():
            yield self._control(person, folders)
        # Everybody's first seed comes before anybody's second one, so that a stopped experiment can be evaluated.
        for cloak_seed, seed in product(self.cloak_seeds, self.victim_seeds):
            for person, condition, victim in product(everyone, self.conditions, self.victims):
                for protection, budget in product(self.protections, self.budgets):
                    fixed = origins[protection] in ("none", "folder", "elsewhere")
                    how = self.protections[protection]
                    cloak = Cloak(
                        person,
                        protection,
                        budget=0.0 if fixed else budget,
                        seed=0 if fixed else cloak_seed,
                        folders=everyone[person],
                        origin=origins[protection],
                        how=str(folder_of(how, person)) if origins[protection] == "elsewhere" else how,
                        backbone=self.source,
                        root=self.root,
                        keep_models=self.keep_models,
                    )
                    yield Cell(
                        cloak,
                        condition,
                        victim,
                        seed,
                        conditions=tuple(self.conditions[condition]),
                        how=self.victims[victim],
                        trained=True,
                        generation=self.generation,
                        keep_models=self.keep_models,
                    )

    def _control(self, person: str, folders: Person) -> Cell:
        """The first victim without its training: the same faces and the same flags on the untouched base model."""
        return Cell(
            Cloak(person, BASE, 0.0, 0, folders, "none", BASE, self.source, self.root, self.keep_models),
            "nothing",
            "untrained",
            seed=0,
            conditions=(),
            how=next(iter(self.victims.values())),
            trained=False,
            generation=self.generation,
            keep_models=self.keep_models,
        )


def origin_of(name: str, how: str) -> Origin:
    """Where the photos under the protection ``name`` come from.

    Raises:
        InputError: ``how`` says nothing that can be done.
    """
    if how == "none":
        return "none"
    if how == "noise":
        return "noise"
    if is_folder(how):
        if name in CONTROLS:
            raise InputError(f"{name!r} is the name of a control: call the protection of {how} another")
        return "elsewhere"
    if not is_config(first_word(how)):
        raise InputError(f"protection {name}: {how!r} is neither none, noise, a folder of photos nor a config file")
    require_config(name, how)
    return "run"


def is_folder(how: str) -> bool:
    """Whether this is the path of a folder; flags are often longer than any file's name may be."""
    try:
        return bool(how) and Path(how).expanduser().is_dir()
    except OSError:
        return False


def require_config(name: str, how: str) -> None:
    """Looks for the config file of a protection or a victim.

    Raises:
        InputError: it is not there, or its flags cannot be told apart.
    """
    try:
        shlex.split(how)
    except ValueError as error:
        raise InputError(f"{name}: {how!r} is no command line: {error}") from error
    if not Path(located(first_word(how))).is_file():
        raise InputError(f"{name}: there is no config file {first_word(how)!r}, see configs/")


def first_word(how: str) -> str:
    """The config file in front of its flags."""
    return how.split()[0] if how.split() else ""
