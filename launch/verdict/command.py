"""Are these photos protected, and against what? Victims trained on photos under every protection, measured, compared.

Run the same command again to go on after an interruption: what is finished is kept.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from antidreambooth.diffusion.loading import read_defaults
from antidreambooth.errors import InputError
from antidreambooth.evaluation.brisque import BRISQUE_MISSING, brisque_available
from antidreambooth.evaluation.prose import paragraph
from antidreambooth.evaluation.quality import LPIPS_MISSING, largest_difference, lpips, lpips_available, psnr, ssim
from antidreambooth.evaluation.report import write_report
from antidreambooth.evaluation.results import read_results
from launch.jobs import workers_of
from launch.runs import Fit, finished
from launch.tasks import Task, failures, share_out, work
from launch.verdict.cell import cell_settings, cloak_settings, make_cloak, originals, protected, run_cell
from launch.verdict.estimate import estimate, left
from launch.verdict.experiment import Cloak, Experiment, Person

OWN = "you"


def verdict(arguments: list[str], fit: Fit) -> None:
    """Runs an experiment, or (as one of its jobs) a share of it.

    Args:
        arguments: the command line after ``verdict``.
        fit: runs a command line of this project.
    """
    options = parser().parse_args(arguments)
    experiment = read_experiment(options)
    if options.share:
        work_on(experiment, options.share, fit)
        return
    cloaks, cells = run(experiment, arguments)
    write_results(experiment, cloaks, cells)
    if failed := {**cloaks, **cells}:
        counts = f"{len(cloaks)} cloaks and {len(cells)} cells failed" if cloaks else f"{len(cells)} cells failed"
        name, reason = next(iter(failed.items()))
        raise InputError(f"{counts}, the first: {name}: {reason}; run the same command again to retry")


def parser() -> ArgumentParser:
    """The command's options: those of an experiment, and the short form for one's own photos."""
    options = ArgumentParser(prog="cli.py verdict", description=__doc__)
    options.add_argument("-c", "--config", action="config", help="an experiment's file, see configs/verdict")
    options.add_argument("--photos", type=str | None, help="your cloaked photos: a verdict on these alone")
    options.add_argument("--clean_photos", type=str | None, help="for --photos: others of you, not cloaked")
    options.add_argument("--share", type=str | None, help="PHASE:NUMBER/JOBS, given to the jobs that this starts")
    options.add_class_arguments(Experiment)
    return options


def read_experiment(options: Namespace) -> Experiment:
    """The experiment that the options describe."""
    values = vars(parser().instantiate(options))
    photos, clean = values.pop("photos"), values.pop("clean_photos")
    if bool(photos) != bool(clean):
        raise InputError("give both: --photos (your cloaked ones) and --clean_photos (others of you, not cloaked)")
    if photos:
        values |= {"people": {OWN: Person(clean, clean)}, "protections": {"none": "none", "cloaked": photos}}
        if not Path(photos).is_dir():
            raise InputError(f"{photos} is no folder: --photos is the folder of your cloaked photos")
    experiment = Experiment(**{key: value for key, value in values.items() if key not in ("config", "share")})
    experiment.check()
    return experiment


def run(experiment: Experiment, arguments: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Cloaks first, then cells, each as one job a worker; returns which of both failed and why."""
    for cloak in experiment.cloaks():
        finished(experiment.cloak_record(cloak), cloak_settings(experiment, cloak))
    for cell in experiment.cells():
        finished(experiment.cell_record(cell), cell_settings(experiment, cell))
    cloaks, cells = left(experiment)
    workers = workers_of(experiment.launcher)
    if cloaks or cells:
        minutes = estimate(experiment, workers, cloaks, cells) / 60
        print(f"{cloaks} cloaks and {cells} victims to do, {workers} at a time: about {minutes:.0f} min", flush=True)
    phases: list[tuple[str, list[Path]]] = [
        ("cloaks", [experiment.cloak_record(cloak) for cloak in experiment.cloaks()]),
        ("cells", [experiment.cell_record(cell) for cell in experiment.cells()]),
    ]
    for phase, records in phases:
        share_out(["verdict", *arguments], records, experiment.launcher, logs(experiment), phase, f"{phase}:")
    (_, cloaks_done), (_, cells_done) = phases
    return failures(cloaks_done), failures(cells_done)


def work_on(experiment: Experiment, share: str, fit: Fit) -> None:
    """A job's part of the cloaks or the cells."""
    phase, _, part = share.partition(":")
    if phase == "cloaks":
        tasks = [Task(experiment.cloak_record(c), partial(make_cloak, experiment, c, fit)) for c in experiment.cloaks()]
    else:
        tasks = [Task(experiment.cell_record(c), partial(run_cell, experiment, c, fit)) for c in experiment.cells()]
    work(tasks, part, logs(experiment))


def logs(experiment: Experiment) -> Path:
    """Where what the jobs print is kept."""
    return experiment.root / "jobs"


def write_results(experiment: Experiment, failed_cloaks: dict[str, str], failed: dict[str, str]) -> None:
    """Tables and the page; on the screen the verdict in a paragraph, or the readable table's place."""
    wanted = {cell.name for cell in experiment.cells()}
    cells = [cell for cell in read_results(experiment.root) if cell.name in wanted]
    if not cells:
        return
    done = {cell.name for cell in cells}
    lost = [c for c in experiment.cloaks() if not experiment.cloak_record(c).is_file()]
    qualities = {
        (cell.cloak.person, cell.cloak.protection, cell.cloak.budget): quality(experiment, cell.cloak)
        for cell in experiment.cells()
        if cell.name in done and cell.cloak.budget and cell.cloak not in lost
    }
    notes = [f"The cloak {name} failed: {reason}" for name, reason in failed_cloaks.items()]
    page = write_report(
        experiment.root,
        cells,
        title=experiment.name,
        expected=len(wanted),
        failed=list(failed.items()),
        notes=[*notes, *general_notes(experiment)],
        qualities=qualities,
    )
    if set(experiment.everyone()) == {OWN}:
        print(paragraph(cells))
    print(f"the page: {page}; the table: {experiment.root / 'table.md'}", flush=True)


def general_notes(experiment: Experiment) -> list[str]:
    """What was left out or done in another way than the papers do."""
    notes = [
        text
        for there, text in ((lpips_available(), LPIPS_MISSING), (brisque_available(), BRISQUE_MISSING))
        if not there
    ]
    if read_defaults(experiment.backbone).blurred_references:
        notes.append(
            "The person's clean photos are compared with as the base model's autoencoder shows them: it blurs so much "
            "that the verifier would turn away the photos themselves, and a victim can draw nothing sharper."
        )
    return notes


def quality(experiment: Experiment, cloak: Cloak) -> dict[str, float | None]:
    """How much a protection changes a person's photos, on average (the largest difference: of all), and its cost."""
    pair = originals(experiment, cloak.person), protected(experiment, cloak)
    return {
        "psnr": float(psnr(*pair).nanmean()),
        "ssim": float(ssim(*pair).mean()),
        "lpips": float(lpips(*pair).mean()) if lpips_available() else None,
        "largest_difference": int(largest_difference(*pair).max()),
        **made_with(experiment, cloak),
    }


def made_with(experiment: Experiment, cloak: Cloak) -> dict[str, float | None]:
    """Seconds and passes that a cloak took; nothing for what no run of ours made."""
    file = experiment.cloak_record(cloak)
    if not file.is_file():
        return {}
    record = json.loads(file.read_text(encoding="utf-8"))
    return {"seconds": record["seconds"], **record.get("passes", {})}
