"""What is left of a verdict: whose photos, how many cloaks and victims, time and disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from antidreambooth.errors import InputError
from launch.cost import Footprint, Kind, disk_line, footprint_of_cloak, footprint_of_victim, photos_in, time_line
from launch.jobs import Launcher, workers_of
from launch.runs import Parse, command, of_base_model
from launch.verdict.cell import FORM, Cell, Cloak
from launch.verdict.experiment import Resolved


class Run(NamedTuple):
    """A cloak or a cell, as far as its costs are concerned.

    Args:
        kind: name of its ``Kind``.
        record: the file that exists once it is done.
        photos: folder of the photos that it is about.
        footprint: finds out what it writes to disk.
    """

    kind: str
    record: Path
    photos: Path
    footprint: Callable[[], Footprint]


def estimate(tasks: Resolved, launcher: Launcher, root: Path, parse: Parse) -> list[str]:
    """A line for each person, then what all that is left needs together.

    Args:
        tasks: of the experiment, done or not.
        launcher: where they run.
        root: folder of their results.
        parse: gives the settings of a command line of this project.
    """
    cloaks = [cloak for cloak in tasks.cloaks if not cloak.record.is_file()]
    cells = [cell for cell in tasks.cells if not cell.record.is_file()]
    victims = [cell for cell in cells if cell.trained]
    people = {cell.cloak.person: cell.cloak.folders for cell in tasks.cells}
    lines, width = [], max(map(len, people))
    for person, folders in people.items():
        to_make = sum(cloak.person == person for cloak in cloaks)
        to_train = sum(cell.cloak.person == person for cell in victims)
        left = f"{to_make} cloaks and {to_train} victims to do" if to_make or to_train else "done"
        lines.append(f"{person:<{width}}  {photos_in(Path(folders.photos)).number} photos, {left}")
    workers, controls = workers_of(launcher), len(cells) - len(victims)
    lines.append(
        f"{len(people)} people: {len(cloaks)} cloaks and {len(victims)} victims to do"
        f"{f', and {controls} controls that are not trained' if controls else ''}, "
        f"{workers} at a time ({launcher.cluster})"
    )
    if cloaks or cells:
        phases = (
            kinds([run_of_cloak(cloak, parse) for cloak in tasks.cloaks]),
            kinds([run_of_cell(cell, parse) for cell in tasks.cells]),
        )
        lines += [time_line(phases, workers), disk_line(root, phases, workers)]
    return lines


def run_of_cloak(cloak: Cloak, parse: Parse) -> Run:
    """A run that cloaks somebody's photos."""

    def footprint() -> Footprint:
        settings = parse(command(cloak.how, {**of_base_model(cloak.backbone, cloak.how), **FORM}))
        return footprint_of_cloak(settings, parse, cloak.keep_models)

    return Run(f"a cloak {cloak.protection}", cloak.record, cloak.source, footprint)


def run_of_cell(cell: Cell, parse: Parse) -> Run:
    """The runs of a cell: a victim's training and its test, or the test of the control."""

    def footprint() -> Footprint:
        return footprint_of_victim(parse(cell.test), cell.trained, cell.keep_models)

    kind = f"a victim {cell.victim}" if cell.trained else "a control"
    return Run(kind, cell.record, cell.cloak.source, footprint)


def kinds(runs: Sequence[Run]) -> list[Kind]:
    """Runs by their kind. Only one run of each kind is looked at for its size."""
    found = []
    for name in dict.fromkeys(run.kind for run in runs):
        same = [run for run in runs if run.kind == name]
        left = [run for run in same if not run.record.is_file()]
        done = [json.loads(run.record.read_text(encoding="utf-8")) for run in same if run.record.is_file()]
        footprint = usable(left[0].footprint) if left else "nothing is left"
        found.append(Kind(name, [photos_in(run.photos) for run in left], [r["seconds"] for r in done], footprint))
    return found


def usable(footprint: Callable[[], Footprint]) -> Footprint | str:
    """A footprint; the reason where the command line is wrong, which makes its own runs fail and no others."""
    try:
        return footprint()
    except InputError as error:
        return str(error)
    except SystemExit:  # the parser's, after it has printed the reason
        return "its command line is wrong"
