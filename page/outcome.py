"""What the test found, from the tables that ``cli.py verdict`` writes; the page says it in words."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

from page.records import read

PROTECTIONS = {"none": "originals", "cloaked": "changed", "base": "nobody"}  # the verdict's words, and the page's
TRAINED = ("originals", "changed")  # nobody's model draws only, which takes moments


def outcome(cells: Path) -> dict[str, Any]:
    """For each kind of photos: pictures drawn, how many were recognised, and the names of the pictures' files.

    Args:
        cells: the verdict's folder of that name.
    """
    found: dict[str, Any] = {}
    for record in sorted(cells.glob("*/cell.json")):
        kind = PROTECTIONS.get(str(read(record).get("protection")))
        table = record.parent / "per_image.csv"
        if kind is None or not table.is_file():
            continue
        with table.open(encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file)]
        values = [float(row["accepted"]) for row in rows if row.get("accepted")]
        found[kind] = {"pictures": len(values), "recognised": int(sum(values)), "cell": record.parent.name}
        found[kind]["files"] = [Path(row["file"]).name for row in rows]
    return found


def left(cells: Path, since: float) -> float | None:
    """Seconds that the test still takes; None as long as no model is trained from which to tell.

    Args:
        cells: the verdict's folder of that name.
        since: when the worker was started (seconds since the epoch): an interrupted model is trained anew.
    """
    records = [*cells.glob("*/cell.json")]
    trained = [record for record in map(read, records) if PROTECTIONS.get(str(record.get("protection"))) in TRAINED]
    if not trained:
        return None
    each = sum(float(record["seconds"]) for record in trained) / len(trained)
    now_at = max(since, *(record.stat().st_mtime for record in records))
    return max(0.0, (len(TRAINED) - len(trained)) * each - (time.time() - now_at))
