"""What a verdict measured: a cell is one victim, trained on one person's photos, and the pictures it then drew."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from antidreambooth.errors import InputError
from antidreambooth.evaluation.statistics import Values


class Measure(NamedTuple):
    """A column of per_image.csv, and how to read its mean."""

    title: str
    share: bool  # shown in percent
    digits: int
    meaning: str


MEASURES = {
    "acceptance": Measure(
        "acceptance", True, 0, "share of pictures that a face verifier takes for the person; lower is protection"
    ),
    "joint_ism": Measure("joint ISM", False, 3, "likeness to the person, 0 without a face; lower is protection"),
    "ism": Measure("ISM", False, 3, "likeness to the person in pictures with a face only; lower is protection"),
    "fdfr": Measure("FDFR", True, 0, "share of pictures in which no face is found; higher is protection"),
    "stability": Measure(
        "stability", False, 3, "stability of the face's embedding under slight changes; lower is a spoiled face"
    ),
    "brisque": Measure("BRISQUE", False, 1, "quality of the picture without reference; higher is worse"),
    "distance": Measure("distance", False, 3, "median distance to the person's clean photos; higher is protection"),
}


@dataclass(frozen=True, eq=False)
class Result:
    """A finished cell; ``values`` holds the measures that were taken, one value for each picture."""

    name: str  # of its folder
    person: str
    protection: str
    budget: float
    victim: str
    condition: str
    cloak_seed: int
    victim_seed: int
    seconds: float
    files: tuple[str, ...]  # relative to its folder
    values: dict[str, Values]
    blank: int = 0  # pictures with one colour all over: no protection, but a victim that drew nothing


def read_results(folder: Path) -> list[Result]:
    """Finished cells under ``folder``/cells, sorted by name; the others are left out.

    Raises:
        InputError: A finished cell lacks its figures.
    """
    paths = sorted((folder / "cells").glob("*/cell.json"))
    records = ((path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in paths)
    return [_read(place, record) for place, record in records if record.get("complete") is True]


def percent(share: float) -> str:
    """A share in whole percent, unless that made 0 or 100 of what is neither."""
    return f"{decimal(100 * share, 0)} %"


def decimal(value: float, digits: int) -> str:
    """Rounded; a number between 0 and 1 or 99 and 100 keeps a digit, as none and nearly none are not the same."""
    near = digits == 0 and round(value) in (-100, 0, 100) and round(value, 1) != round(value)
    return f"{round(value, digits + near) + 0.0:.{digits + near}f}".replace("-", "\N{MINUS SIGN}")


def _read(place: Path, record: dict[str, str | float]) -> Result:
    try:
        with (place / "per_image.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"cell {place.name} has no readable per_image.csv: remove its folder and run again") from error
    if not rows:
        raise InputError(f"cell {place.name} has no pictures: remove its folder and run again")
    return Result(
        name=place.name,
        person=str(record["person"]),
        protection=str(record["protection"]),
        budget=float(record["budget"]),
        victim=str(record["victim"]),
        condition=str(record["condition"]),
        cloak_seed=int(record["cloak_seed"]),
        victim_seed=int(record["victim_seed"]),
        seconds=float(record["seconds"]),
        files=tuple(row["file"] for row in rows),
        values=_measures(rows),
        blank=sum(_number(row.get("blank", "0")) == 1 for row in rows),
    )


def _measures(rows: list[dict[str, str]]) -> dict[str, Values]:
    columns = {name: np.array([_number(row[name]) for row in rows]) for name in rows[0] if name not in _TEXT}
    if "accepted" in columns:
        columns["acceptance"] = columns.pop("accepted")
    if "face" in columns:
        face = columns.pop("face")
        columns["fdfr"] = 1 - face
        for name in {"acceptance", "joint_ism"} & columns.keys():
            columns[name] = _zero_without_face(columns[name], face)
    return {name: columns[name] for name in MEASURES if name in columns and not np.isnan(columns[name]).all()}


_TEXT = ("prompt", "index", "file", "blank")  # and what is no measure


def _number(text: str) -> float:
    """NaN where a field is empty."""
    return float({"True": "1", "False": "0", "": "nan"}.get(text, text))


def _zero_without_face(values: Values, face: Values) -> Values:
    """Both count a picture without a face as 0, however it was written; no measure if no picture with a face has it."""
    if face.any() and np.isnan(values[face == 1]).all():
        return np.full_like(values, np.nan)
    return np.where((face == 0) & np.isnan(values), 0.0, values)
