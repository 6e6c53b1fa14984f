"""What a folder of people will take: who is to be done, how many photos, time, disk. Nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jsonargparse import Namespace

from antidreambooth.errors import InputError
from launch.cost import Kind, Photos, disk_line, footprint_of_cloak, photos_in, time_line
from launch.jobs import workers_of
from launch.people.folders import People
from launch.runs import Parse


class State(NamedTuple):
    """How far a person is; a line of summary.jsonl."""

    person: str
    state: str  # done, failed or waiting
    seconds: float | None
    error: str | None


def plan(job: People, found: list[State], settings: Namespace, parse: Parse) -> list[str]:
    """A line for each person, then what all who are not done need together.

    Args:
        job: whose photos are cloaked.
        found: how far everybody is.
        settings: of everybody's run.
        parse: gives the settings of a command line of this project.
    """
    footprint = footprint_of_cloak(settings, parse)
    counted = {one.person: photos_of(job.everyone[one.person].photos, footprint.own_size) for one in found}
    left = [one for one in found if one.seconds is None]
    photos = [known for one in left if isinstance(known := counted[one.person], Photos)]
    workers = max(1, min(workers_of(job.launcher), len(photos)))
    width = max(len(one.person) for one in found)
    lines = [f"{one.person:<{width}}  {described(one, counted[one.person])}" for one in found]
    number = sum(one.number for one in photos)
    done, before = sum(one.state == "done" for one in found), sum(one.state == "failed" for one in left)
    other = len(found) - len(left) - done
    lines.append(
        f"{len(found)} people: {done} done, {f'{other} done with other settings, ' if other else ''}{len(left)} to do "
        f"({before} of them failed before), {number} photos, {workers} at a time ({job.launcher.cluster})"
    )
    if photos:
        seconds = [one.seconds for one in found if one.state == "done" and one.seconds is not None]
        phases = [[Kind("a person", photos, seconds, footprint)]]
        lines += [time_line(phases, workers), disk_line(job.root, phases, workers)]
    return lines


def photos_of(folder: Path, own_size: bool) -> Photos | str:
    """The photos that a folder holds, or what is wrong with it."""
    try:
        return photos_in(folder, own_size)
    except InputError as error:
        return str(error)


def described(one: State, photos: Photos | str) -> str:
    """A person in the plan."""
    if isinstance(photos, str):
        return f"fails: {photos}"
    state = "to do" if one.state == "waiting" else one.state
    return f"{photos.number} photos, {state}{f': {one.error}' if one.error else ''}"
