"""Tables that a person reads and a program reads."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, columns aligned; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (header, rule, *rows):
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(folder: Path, name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``name.md``, with the title above the table, and ``name.csv``; returns what the first one says."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{title}\n\n{markdown(header, rows)}\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return text
