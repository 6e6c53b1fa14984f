"""What the test found, from the tables that ``cli.py verdict`` writes; the page says it in words."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

PROTECTIONS = {"none": "originals", "cloaked": "changed", "base": "nobody"}  # the verdict's words, and the page's


def outcome(cells: Path) -> dict[str, Any]:
    """For each kind of photos: pictures drawn, how many were recognised, and the names of the pictures' files.

    Args:
        cells: the verdict's folder of that name.
    """
    found: dict[str, Any] = {}
    for record in sorted(cells.glob("*/cell.json")):
        kind = PROTECTIONS.get(protection(record))
        table = record.parent / "per_image.csv"
        if kind is None or not table.is_file():
            continue
        with table.open(encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file)]
        values = [float(row["accepted"]) for row in rows if row.get("accepted")]
        found[kind] = {"pictures": len(values), "recognised": int(sum(values)), "cell": record.parent.name}
        found[kind]["files"] = [Path(row["file"]).name for row in rows]
    return found


def protection(record: Path) -> str:
    """Which photos a cell's model was trained on."""
    values: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return str(values.get("protection", ""))
