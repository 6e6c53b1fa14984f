"""A folder of people, each with photos: everybody's are cloaked by a run of their own, shared out over workers.

Run the same command again to continue after an interruption and to retry whoever failed: who is done is skipped.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from antidreambooth.diffusion.layout import read_defaults
from antidreambooth.errors import InputError
from antidreambooth.files import locked, to_json, write_atomically
from launch.cost import attacked
from launch.flags import named
from launch.help import PEOPLE, USAGE, Help
from launch.jobs import workers_of
from launch.parsing import OneLine
from launch.people.dry_run import State, plan
from launch.people.folders import People
from launch.runs import Fit, Parse, cloak_photos, command, finished
from launch.tasks import Task, failures, share_out, work


def people(arguments: list[str], fit: Fit, parse: Parse) -> None:
    """Cloaks everybody's photos, or (as one of the jobs) does a share of it.

    Args:
        arguments: the command line after ``people``.
        fit: runs a command line of this project.
        parse: gives the settings of one.
    """
    options = parser().parse_args(arguments)
    job = read_people(options)
    records = [job.record(name) for name in job.everyone]
    if options.share:
        tasks = [Task(job.record(name), partial(protect, job, name, fit)) for name in job.everyone]
        work(tasks, options.share, job.logs)
        return
    settings = parse(command(job.protection, {}))  # a wrong flag ends here, and not once for each person
    for terms in dict.fromkeys(read_defaults(source).notice for source in attacked(settings)):
        if terms:
            print(terms, flush=True)
    changed = changed_since(job)
    if options.dry_run:
        print("\n".join(plan(job, states(job, changed), settings, parse)), flush=True)
        return
    if left := sum(not record.is_file() for record in records):
        print(f"{left} of {len(records)} people to do, {min(left, workers_of(job.launcher))} at a time", flush=True)
    with locked(job.root, "give another folder with --output"):
        try:
            share_out(["people", *arguments], records, job.launcher, job.logs, "people")
        finally:
            found = states(job, changed)
            write_summary(job, found)
    if lost := [one for one in found if one.state != "done"]:
        reason = lost[0].error or "no worker got to it"
        again = "; run the same command again to retry" if {one.person for one in lost} - changed.keys() else ""
        raise InputError(f"{len(lost)} of {len(found)} people failed, the first: {lost[0].person}: {reason}{again}")


def parser() -> ArgumentParser:
    """The command's options."""
    options = OneLine(prog="cli.py people", description=PEOPLE, usage=USAGE["people"], formatter_class=Help)
    options.add_argument("-c", "--config", action="config", help="a file of these options, see configs/people.yaml")
    options.add_argument("--dry_run", action="store_true", help="print who is to be done, time and disk; write nothing")
    options.add_argument("--share", type=str | None, help="NUMBER/JOBS, given to the jobs that this starts")
    options.add_class_arguments(People)
    return options


def read_people(options: Namespace) -> People:
    """The job that the options describe."""
    with named(options):
        values = vars(parser().instantiate(options))
        job = People(**{key: value for key, value in values.items() if key not in ("config", "share", "dry_run")})
    job.check()
    return job


def protect(job: People, name: str, fit: Fit) -> None:
    """Cloaks a person's photos, or resumes an interrupted run; does nothing where the photos are cloaked already.

    Whether these were cloaked with the same settings is checked by ``changed_since``.
    """
    if not job.record(name).is_file():
        with no_warnings():  # the run has them, too
            settings = job.settings(name)
        cloak_photos(job.record(name), settings, job.protection, job.flags(name), fit)


def changed_since(job: People) -> dict[str, str]:
    """Who was cloaked with other settings or photos than those of now, and what differs, by name."""
    changed = {}
    done = [name for name in job.everyone if job.record(name).is_file()]
    for name in tqdm(done, desc="who is done", unit="", file=sys.stdout, dynamic_ncols=True, disable=not done):
        try:
            with no_warnings():
                finished(job.record(name), job.settings(name))
        except (InputError, OSError) as error:
            changed[name] = str(error)
    return changed


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silences warnings about files that are no photos: each person's own run gives them, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def states(job: People, changed: dict[str, str]) -> list[State]:
    """How far everybody is.

    Args:
        job: whose photos are cloaked.
        changed: who was cloaked with other settings, see ``changed_since``.
    """
    reasons = {**failures([job.record(name) for name in job.everyone]), **changed}
    found = []
    for name in job.everyone:
        reason, seconds = reasons.get(name), None
        if job.record(name).is_file():
            seconds = round(json.loads(job.record(name).read_text(encoding="utf-8"))["seconds"], 1)
        state = "failed" if reason else "waiting" if seconds is None else "done"
        found.append(State(name, state, seconds, reason and reason.removeprefix("error: ")))
    return found


def write_summary(job: People, found: list[State]) -> None:
    """A table to read, with those who failed first, and the same as lines for machines."""
    kinds = ("failed", "waiting", "done")
    counts = ", ".join(f"{sum(one.state == kind for one in found)} {kind}" for kind in reversed(kinds))
    lines = [f"{len(found)} people: {counts}.", "", "| person | state | seconds | PSNR in dB | error |"]
    lines.append("|---|---|---|---|---|")
    for one in sorted(found, key=lambda one: kinds.index(one.state)):
        closeness = psnr(job.root / one.person) if one.state == "done" else None
        cells = (one.person, one.state, one.seconds, closeness, one.error)
        lines.append("| " + " | ".join("" if c is None else str(c).replace("|", r"\|") for c in cells) + " |")
    write_atomically(job.root / "table.md", ("\n".join(lines) + "\n").encode())
    records = [to_json(one._asdict(), ensure_ascii=False) for one in found]
    write_atomically(job.root / "summary.jsonl", ("\n".join(records) + "\n").encode())
    print(f"{counts}; the table: {job.root / 'table.md'}", flush=True)


def psnr(run: Path) -> float | None:
    """Mean PSNR of a run's cloaked photos in dB; None where no photo was changed."""
    photos = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["photos"]
    known = [photo["psnr"] for photo in photos if photo["psnr"] is not None]
    return round(sum(known) / len(known), 1) if known else None
