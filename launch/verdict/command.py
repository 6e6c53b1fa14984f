"""Are these photos protected, and against what? Victims trained on photos under every protection, measured, compared.

Run the same command again to continue after an interruption: what is finished is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from antidreambooth.diffusion.layout import read_defaults
from antidreambooth.diffusion.source import EMBEDDED, Source, locate
from antidreambooth.errors import InputError
from antidreambooth.evaluation.brisque import BRISQUE_MISSING, brisque_available
from antidreambooth.evaluation.prose import STANDS_FOR, paragraph
from antidreambooth.evaluation.quality import LPIPS_MISSING, largest_difference, lpips, lpips_available, psnr, ssim
from antidreambooth.evaluation.report import write_report
from antidreambooth.evaluation.results import read_results
from antidreambooth.files import locked
from launch.flags import named
from launch.help import USAGE, VERDICT, Help
from launch.parsing import OneLine
from launch.runs import Fit, Parse, finished
from launch.tasks import Task, failures, share_out, work
from launch.verdict.cell import Cloak, Person, make_cloak, originals, protected, run_cell
from launch.verdict.elsewhere import content_hash, largest_change, without_added
from launch.verdict.estimate import estimate
from launch.verdict.experiment import OWN, Experiment, Resolved

OPTIONS = ("config", "dry_run", "share")  # of the command, not of the experiment


def verdict(arguments: list[str], fit: Fit, parse: Parse) -> None:
    """Runs an experiment, or (as one of its jobs) a share of it.

    Args:
        arguments: the command line after ``verdict``.
        fit: runs a command line of this project.
        parse: gives the settings of one.
    """
    words, added = without_added(arguments)
    options = parser().parse_args(words)
    experiment = read_experiment(options, added)
    tasks = experiment.resolve()
    if options.share:
        work_on(tasks, options.share, logs(experiment), fit)
        return
    done = [finished(cloak.record, cloak.settings) for cloak in tasks.cloaks]
    done += [finished(cell.record, cell.settings) for cell in tasks.cells]
    if options.dry_run or not all(done):
        print("\n".join(estimate(tasks, experiment.launcher, experiment.root, parse)), flush=True)
    if options.dry_run:
        return
    with locked(experiment.root, "give another --name"):
        cloaks, cells = run(experiment, tasks, arguments)
        write_results(experiment, tasks, cloaks, cells)
    if failed := {**cloaks, **cells}:
        counts = f"{len(cloaks)} cloaks and {len(cells)} cells failed" if cloaks else f"{len(cells)} cells failed"
        name, reason = next(iter(failed.items()))
        raise InputError(f"{counts}, the first: {name}: {reason}; run the same command again to retry")


def parser() -> ArgumentParser:
    """The command's options: those of an experiment, and the short form for one's own photos."""
    options = OneLine(prog="cli.py verdict", description=VERDICT, usage=USAGE["verdict"], formatter_class=Help)
    options.add_argument("-c", "--config", action="config", help="an experiment's file, see configs/verdict")
    options.add_argument("--photos", type=str | None, help="your cloaked photos: a verdict on these alone")
    options.add_argument("--clean_photos", type=str | None, help="for --photos: others of you, not cloaked")
    options.add_argument(
        "--dry_run", action="store_true", help="print what is to be done, time and disk; write nothing"
    )
    options.add_argument("--share", type=str | None, help="PHASE:NUMBER/JOBS, given to the jobs that this starts")
    options.add_class_arguments(Experiment)
    return options


def read_experiment(options: Namespace, added: Sequence[tuple[str, str]] = ()) -> Experiment:
    """The experiment that the options describe.

    Args:
        options: as they were parsed.
        added: names and folders (or whatever a protection may be) of further protections.

    Raises:
        InputError: --photos or --clean_photos cannot be used, or two protections have one name.
    """
    with named(options):
        values = vars(parser().instantiate(options))
    photos, clean = values.pop("photos"), values.pop("clean_photos")
    if bool(photos) != bool(clean):
        raise InputError("give both: --photos (your cloaked ones) and --clean_photos (others of you, not cloaked)")
    if photos:
        values |= {"people": {OWN: Person(clean, clean)}, "protections": {"none": "none", "cloaked": photos}}
        if not Path(photos).is_dir():
            raise InputError(f"{photos} is no folder: --photos is the folder of your cloaked photos")
    for name, how in added:
        if name in values["protections"]:
            raise InputError(f"--protections {name}={how}: there is a protection {name!r} already, choose another name")
        values["protections"] = {**values["protections"], name: how}
    with named(options):
        return Experiment(**{key: value for key, value in values.items() if key not in OPTIONS})


def run(experiment: Experiment, tasks: Resolved, arguments: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Cloaks first, then cells, each shared out over jobs; returns which of both failed and why."""
    cloaks, cells = [cloak.record for cloak in tasks.cloaks], [cell.record for cell in tasks.cells]
    for phase, records in (("cloaks", cloaks), ("cells", cells)):
        share_out(["verdict", *arguments], records, experiment.launcher, logs(experiment), phase, f"{phase}:")
    return failures(cloaks), failures(cells)


def work_on(tasks: Resolved, share: str, logs: Path, fit: Fit) -> None:
    """A job's share of the cloaks or the cells."""
    phase, _, part = share.partition(":")
    if phase == "cloaks":
        work([Task(cloak.record, partial(make_cloak, cloak, fit)) for cloak in tasks.cloaks], part, logs)
    else:
        work([Task(cell.record, partial(run_cell, cell, fit)) for cell in tasks.cells], part, logs)


def logs(experiment: Experiment) -> Path:
    """The folder of what the jobs print."""
    return experiment.root / "jobs"


def write_results(
    experiment: Experiment, tasks: Resolved, failed_cloaks: dict[str, str], failed: dict[str, str]
) -> None:
    """Writes the tables and the page; prints where they are and, for one's own photos, the verdict in a paragraph."""
    wanted = {cell.name for cell in tasks.cells}
    results = [result for result in read_results(experiment.root) if result.name in wanted]
    if not results:
        return
    done = {result.name for result in results}
    lost = [cloak for cloak in tasks.cloaks if not cloak.record.is_file()]
    qualities = {
        (cell.cloak.person, cell.cloak.protection, cell.cloak.budget): quality(cell.cloak)
        for cell in tasks.cells
        if cell.name in done and (cell.cloak.budget or cell.cloak.origin == "elsewhere") and cell.cloak not in lost
    }
    notes = [f"The cloak {name} failed: {reason}" for name, reason in failed_cloaks.items()]
    page = write_report(
        experiment.root,
        results,
        title=experiment.name,
        expected=len(wanted),
        failed=list(failed.items()),
        notes=[*notes, *general_notes(experiment.source)],
        remarks=[*made_elsewhere(experiment, tasks), *([STANDS_FOR] if locate(experiment.source) == EMBEDDED else [])],
        qualities=qualities,
        baseline=experiment.baseline,
    )
    if {cell.cloak.person for cell in tasks.cells} == {OWN}:
        print(paragraph(results))
    print(f"the page: {page}; the table: {experiment.root / 'table.md'}", flush=True)


def general_notes(source: Source) -> list[str]:
    """What was left out or done in another way than the papers do."""
    notes = [
        text
        for there, text in ((lpips_available(), LPIPS_MISSING), (brisque_available(), BRISQUE_MISSING))
        if not there
    ]
    if read_defaults(source).blurred_references:
        notes.append(
            "The person's clean photos are compared with as the base model's autoencoder shows them: it blurs so much "
            "that the verifier would turn away the photos themselves, and a victim can draw nothing sharper."
        )
    return notes


def made_elsewhere(experiment: Experiment, tasks: Resolved) -> list[str]:
    """Which protections no run of ours has made: what they are known by, and the budget that they turn out to use."""
    cloaks = dict.fromkeys(cell.cloak for cell in tasks.cells if cell.cloak.origin == "elsewhere")
    found = []
    for name in dict.fromkeys(cloak.protection for cloak in cloaks):
        pairs = {cloak.person: cloak.counterparts for cloak in cloaks if cloak.protection == name}
        identity = content_hash({person: own.values() for person, own in pairs.items()})
        most = largest_change(pair for own in pairs.values() for pair in own.items())
        found.append(
            f"The protection {name} was made elsewhere, by another tool: its photos were taken as they are from "
            f"{experiment.protections[name]} (SHA-256 of their content {identity}). Nobody here has set its budget: in "
            f"those files the largest change of any value, as measured, is {most} of 255."
        )
    return found


def quality(cloak: Cloak) -> dict[str, float | None]:
    """How much a protection changes a person's photos, on average (the largest difference: of all), and its cost."""
    pair = originals(cloak), protected(cloak)
    closeness = float(psnr(*pair).nanmean())  # NaN where nothing has changed
    return {
        "psnr": None if math.isnan(closeness) else closeness,
        "ssim": float(ssim(*pair).mean()),
        "lpips": float(lpips(*pair).mean()) if lpips_available() else None,
        "largest_difference": int(largest_difference(*pair).max()),
        **made_with(cloak),
    }


def made_with(cloak: Cloak) -> dict[str, float | None]:
    """Seconds and passes through networks that a cloak took; nothing for photos that no run of ours cloaked."""
    if not cloak.record.is_file():
        return {}
    record = json.loads(cloak.record.read_text(encoding="utf-8"))
    return {"seconds": record["seconds"], **record.get("passes", {})}
