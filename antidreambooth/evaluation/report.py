"""The verdict as files: table.csv for machines, table.md to read, and one page that opens from disk."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from antidreambooth.evaluation.judgement import BASELINE, LOW, RECOGNISED, Group, Setting, Status, setting_of, summarise
from antidreambooth.evaluation.prose import answer, count_recognised, of_blanks, warnings
from antidreambooth.evaluation.results import MEASURES, Result, decimal
from antidreambooth.evaluation.statistics import RESAMPLES, Interval
from antidreambooth.files import write_atomically

SHOWN = 6  # pictures of a cell on the page
MAIN = ("acceptance", "joint_ism", "ism", "fdfr", "stability", "brisque")

Qualities = Mapping[tuple[str, str, float], Mapping[str, float | int | None]]  # person, protection, budget -> figures


COSTS = {  # of a cloak: heading and digits
    "psnr": ("PSNR in dB", 1),
    "ssim": ("SSIM", 3),
    "lpips": ("LPIPS", 3),
    "largest_difference": ("largest difference of 255", 0),
    "seconds": ("seconds", 0),
    "denoiser": ("Denoiser passes", 0),
    "encoder": ("encoder passes", 0),
}


class Picture(NamedTuple):
    """A generated picture on the page."""

    link: str
    said: str  # what the verifier said


class Row(NamedTuple):
    """What one victim of a person drew."""

    setting: Setting
    recognised: tuple[int, int]  # of all seeds
    pictures: list[Picture]  # of the first seed


def write_report(
    folder: Path,
    cells: Sequence[Result],
    *,
    title: str,
    expected: int,
    failed: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    remarks: Sequence[str] = (),
    qualities: Qualities | None = None,
    baseline: str = BASELINE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Path:
    """Write table.csv, table.md and index.html into ``folder``, which holds ``cells``; returns the page.

    Args:
        folder: Of the verdict; the pictures stay in its cells and are linked.
        cells: The finished ones, see ``read_results``.
        title: Name of the verdict.
        expected: Number of cells once all have finished.
        failed: Name of each cell that failed, with its error in one line.
        notes: What else the reader needs to know: measures left out and how to get them, costs.
        remarks: What has to be known of the base model and the protections before a figure is read.
        qualities: Of each cloak the values of ``COSTS``; None where undefined, absent where there is none.
        baseline: A protection that the others are compared with, as they are with none and noise.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    groups = summarise(cells, baseline=baseline, resamples=resamples, seed=seed)
    seconds = [cell.seconds for cell in cells]
    facts = {
        "title": title,
        "answer": answer(groups),
        "warnings": [*of_blanks(cells), *warnings(groups, len(cells), expected, len(failed))],
        "finished": len(cells),
        "expected": expected,
        "failed": failed,
        "hours": sum(seconds) / 3600,
        "minutes": float(np.median(seconds)) / 60 if seconds else 0.0,
        "notes": notes,
        "remarks": remarks,
        "qualities": sorted((qualities or {}).items()),
        "costs": COSTS,
        "mean_costs": _mean_costs(qualities or {}),
        "groups": groups,
        "compared": ("none", "noise", baseline),
        "by_status": {s: [g for g in groups if not g.is_control and g.status is s] for s in Status},
        "victims": list(dict.fromkeys(group.setting.victim for group in groups)),
        "attacks": {key: list(found) for key, found in groupby(groups, key=lambda group: group.setting[:2])},
        "gallery": _gallery(cells),
        "measures": {name: MEASURES[name] for name in MAIN if any(name in group.figures for group in groups)},
        "levels": sorted({interval.over for group in groups for interval in group.figures.values()}),
        "recognised": RECOGNISED,
        "low": LOW,
    }
    page = folder / "index.html"
    write_atomically(folder / "table.csv", _table(groups).encode())
    environment = _environment()
    for template, path in (("table.md.j2", folder / "table.md"), ("report.html.j2", page)):
        write_atomically(path, environment.get_template(template).render(facts).encode())
    return page


def _mean_costs(qualities: Qualities) -> dict[tuple[str, float], dict[str, float]]:
    """Protection and budget -> each cost on average over people."""
    by_protection: dict[tuple[str, float], list[Mapping[str, float | int | None]]] = {}
    for (_, protection, budget), costs in sorted(qualities.items()):
        by_protection.setdefault((protection, budget), []).append(costs)
    known = {
        key: {name: [v for costs in found if (v := costs.get(name)) is not None] for name in COSTS}
        for key, found in by_protection.items()
    }
    return {key: {name: sum(v) / len(v) for name, v in found.items() if v} for key, found in known.items()}


def _table(groups: Iterable[Group]) -> str:
    """One row for each setting and measure, and one for each paired difference; ``control`` says from what."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = ("mean", "low", "high", "people", "cells", "images", "over")
    writer.writerow([*Setting._fields, "measure", "control", *keys])
    for group in groups:
        for control, figures in {"": group.figures, **group.against}.items():
            for measure, interval in figures.items():
                writer.writerow([*group.setting, measure, control, *(getattr(interval, key) for key in keys)])
    return text.getvalue()


def _gallery(cells: Sequence[Result]) -> dict[str, dict[tuple[str, str], list[Row]]]:
    """Person -> victim and condition -> one row for each protection."""
    return {
        person: _attacks([cell for cell in cells if cell.person == person])
        for person in sorted({cell.person for cell in cells})
    }


def _attacks(cells: Sequence[Result]) -> dict[tuple[str, str], list[Row]]:
    attacks: dict[tuple[str, str], list[Row]] = {}
    for setting in sorted({setting_of(cell) for cell in cells}, key=lambda setting: setting.order):
        own = [cell for cell in cells if setting_of(cell) == setting]
        first = min(own, key=lambda cell: (cell.victim_seed, cell.cloak_seed, cell.name))
        row = Row(setting, count_recognised(own), list(_pictures(first)))
        attacks.setdefault((setting.victim, setting.condition), []).append(row)
    return attacks


def _pictures(cell: Result) -> Iterator[Picture]:
    unmeasured = np.full(len(cell.files), np.nan)
    faceless = cell.values.get("fdfr", unmeasured) == 1
    accepted = cell.values.get("acceptance", unmeasured)
    for file, none, own in list(zip(cell.files, faceless, accepted, strict=True))[:SHOWN]:
        said = "no face" if none else {1.0: "recognised", 0.0: "not recognised"}.get(float(own), "not verified")
        yield Picture(quote(f"cells/{cell.name}/{file}"), said)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("antidreambooth.evaluation", ""),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"figure": _figure, "difference": _difference, "markdown": _markdown, "decimal": decimal}
    environment.globals["place"] = _place
    return environment


def _figure(interval: Interval | None, measure: str, unit: str = " %") -> str:
    """Mean and interval in the measure's unit."""
    if interval is None:
        return "\N{EN DASH}"
    scale, digits = (100 if MEASURES[measure].share else 1), MEASURES[measure].digits
    mean, low, high = (decimal(scale * value, digits) for value in (interval.mean, interval.low, interval.high))
    return f"{mean}{unit if MEASURES[measure].share else ''} [{low}, {high}]"


def _difference(interval: Interval | None, measure: str) -> str:
    return _figure(interval, measure, " points")


def _place(value: float, low: float, high: float) -> str:
    """Where a value lies on an axis, in percent of its length."""
    return f"{100 * min(max((value - low) / (high - low), 0), 1):.2f}%"


def _markdown(text: object) -> str:
    """Text that ends no table cell and starts no markup."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
