"""From cells to an answer: does a protection hold against a victim, with something done to the photos on the way?

Nothing here says that a photo is safe: what counts as holding was held against what was tried.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from antidreambooth.evaluation.results import MEASURES, Result, percent
from antidreambooth.evaluation.statistics import RESAMPLES, Interval, Sample, Values, bootstrap, paired

CONTROLS = ("none", "noise", "base")
BASELINE = "aspl"  # the published protection that others are compared with, where it was tried
RECOGNISED = 0.8  # a victim that draws the unprotected person in fewer of its pictures can judge no protection
LOW = 0.2  # a face that is recognised in more of the pictures is not protected: the mirror image of RECOGNISED
DECISIVE = ("acceptance", "joint_ism")  # of both, a fall must be shown


class Setting(NamedTuple):
    """One protection against one victim, with one thing done to the photos on the way."""

    victim: str
    condition: str
    protection: str
    budget: float

    @property
    def label(self) -> str:
        """Protection and budget."""
        return f"{self.protection} {self.budget:g}" if self.budget else self.protection

    @property
    def order(self) -> tuple[object, ...]:
        """Controls first, the untouched condition first, else by name."""
        control = CONTROLS.index(self.protection) if self.protection in CONTROLS else len(CONTROLS)
        return (self.victim, self.condition != "nothing", self.condition, control, self.protection, self.budget)

    def __str__(self) -> str:
        way = "" if self.condition == "nothing" else f" after {self.condition}"
        return f"{self.label}{way} against {self.victim}"


class Status(StrEnum):
    """What the numbers say about a protection in one setting."""

    FAILS = "does not hold"
    UNJUDGED = "cannot be judged"
    HELD = "held here"


@dataclass(frozen=True)
class Group:
    """The figures of one setting over all its people and seeds."""

    setting: Setting
    figures: dict[str, Interval]  # measure -> mean
    against: dict[str, dict[str, Interval]]  # none, noise, baseline -> measure -> paired difference to it
    unprotected: Interval | None  # acceptance of none, same victim and condition

    @property
    def is_control(self) -> bool:
        """Whether it protects nothing, and is there to compare with."""
        return self.setting.protection in CONTROLS

    @property
    def n(self) -> str:
        """People / cells / pictures of the measure that most pictures have."""
        most = max(self.figures.values(), key=lambda interval: interval.images, default=None)
        return f"{most.people} / {most.cells} / {most.images}" if most else "0"

    @property
    def weak(self) -> bool:
        """Whether its victim draws even the unprotected person too rarely."""
        return self.unprotected is not None and self.unprotected.mean < RECOGNISED

    @property
    def status(self) -> Status:
        """Still recognised is a failure whatever the victim; a fall counts only where the victim is strong."""
        if self._still_recognised:
            return Status.FAILS
        if self.lacking:
            return Status.UNJUDGED
        return Status.FAILS if self._not_fallen else Status.HELD

    @property
    def reasons(self) -> list[str]:
        """Why, in words; where it held, what weakens that."""
        still = []
        if self._still_recognised:
            still.append(f"still recognised in more than {percent(LOW)} of pictures")
        fallen = [f"no fall of {MEASURES[name].title} against none shown" for name in self._not_fallen]
        return [*still, *self.lacking, *fallen, *self._remarks]

    @property
    def lacking(self) -> list[str]:
        """What keeps it from being judged."""
        if "acceptance" not in self.figures:
            return ["acceptance was not measured"]
        if "acceptance" not in self.against.get("none", {}):
            return ["the control none is missing for the same people and seeds"]
        if self.weak:
            assert self.unprotected is not None
            return [f"too weak a victim: unprotected, the face is recognised in only {percent(self.unprotected.mean)}"]
        return []

    @property
    def _still_recognised(self) -> bool:
        return "acceptance" in self.figures and self.figures["acceptance"].mean > LOW

    @property
    def _not_fallen(self) -> list[str]:
        differences = self.against.get("none", {})
        return [name for name in DECISIVE if name in differences and not differences[name].below_zero]

    @property
    def _remarks(self) -> list[str]:
        noise = self.against.get("noise", {})
        if "acceptance" not in noise:
            return ["not compared with noise of the same budget"]
        level = [MEASURES[name].title for name in DECISIVE if name in noise and not noise[name].below_zero]
        return [f"not shown to be better than noise of the same budget in {' and '.join(level)}"] if level else []


def summarise(
    cells: Sequence[Result], *, baseline: str = BASELINE, resamples: int = RESAMPLES, seed: int = 0
) -> list[Group]:
    """One group for each setting, controls first; ``baseline`` is a protection that the others are compared with."""
    settings: dict[Setting, list[Result]] = defaultdict(list)
    for cell in cells:
        settings[setting_of(cell)].append(cell)

    def mean(setting: Setting, measure: str) -> Interval | None:
        sample = _sample(settings.get(setting, []), measure)
        return bootstrap(sample, resamples=resamples, seed=seed) if sample else None

    def difference(setting: Setting, other: Setting, measure: str) -> Interval | None:
        ours, theirs = _pairs(settings[setting], settings.get(other, []), measure)
        return paired(ours, theirs, resamples=resamples, seed=seed) if ours else None

    def group(setting: Setting) -> Group:
        none = setting._replace(protection="none", budget=0.0)
        names = ["noise"] if setting.protection in CONTROLS else ["noise", baseline]
        others = {"none": none, **{name: setting._replace(protection=name) for name in names}}
        figures = _defined({name: mean(setting, name) for name in MEASURES})
        against = {
            name: _defined({measure: difference(setting, other, measure) for measure in figures})
            for name, other in others.items()
            if other != setting and other in settings
        }
        return Group(setting, figures, against, mean(none, "acceptance"))

    return [group(setting) for setting in sorted(settings, key=lambda setting: setting.order)]


def setting_of(cell: Result) -> Setting:
    """Setting that a cell belongs to."""
    return Setting(cell.victim, cell.condition, cell.protection, cell.budget)


def _sample(cells: Iterable[Result], measure: str) -> Sample:
    sample: dict[str, list[Values]] = defaultdict(list)
    for cell in cells:
        if measure in cell.values:
            sample[cell.person].append(cell.values[measure])
    return sample


def _pairs(method: Iterable[Result], other: Iterable[Result], measure: str) -> tuple[Sample, Sample]:
    """Pictures of both for every person and victim's seed that both have; cloaks of several seeds count as one cell."""
    ours, theirs = _by_seed(method, measure), _by_seed(other, measure)
    shared = sorted(ours.keys() & theirs.keys())
    people = sorted({person for person, _ in shared})
    pooled, others = (
        {name: [np.concatenate(values[key]) for key in shared if key[0] == name] for name in people}
        for values in (ours, theirs)
    )
    return pooled, others


def _by_seed(cells: Iterable[Result], measure: str) -> dict[tuple[str, int], list[Values]]:
    values: dict[tuple[str, int], list[Values]] = defaultdict(list)
    for cell in cells:
        if measure in cell.values:
            values[cell.person, cell.victim_seed].append(cell.values[measure])
    return values


def _defined(intervals: dict[str, Interval | None]) -> dict[str, Interval]:
    return {name: interval for name, interval in intervals.items() if interval and interval.defined}
