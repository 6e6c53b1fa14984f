"""What a test leaves behind: the pictures, a row of measures for each, their grid."""

from __future__ import annotations

import csv
import io
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from antidreambooth.files import replacing, write_atomically, write_json
from antidreambooth.photos.delivery import write_png
from callbacks.disk_space import require_writable
from callbacks.show import show


class Likeness(Callback):
    """Writes ``images/*.png``, ``per_image.csv``, ``measures.json`` and ``grid.png`` (a row is a prompt)."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds out before any work whether the results can be written."""
        if trainer.is_global_zero:
            require_writable(Path(trainer.default_root_dir))

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The results of all ranks; the module has ``rows``, ``pictures`` and ``generation``."""
        found = self._of_all_ranks(trainer, list(zip(pl_module.rows, pl_module.pictures, strict=True)))
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        found.sort(key=lambda item: item[0]["file"])
        with replacing(root / "images") as folder:
            for row, picture in found:
                write_png(folder / Path(row["file"]).name, picture)
        write_atomically(root / "per_image.csv", table([row for row, _ in found]).encode())
        means = {name: float(value) for name, value in trainer.callback_metrics.items()}
        write_json(root / "measures.json", means)
        columns = len(found) // len(pl_module.generation.prompts)
        pictures = torch.stack([picture for _, picture in found])
        show(trainer, "likeness", pictures, columns, trainer.global_step, root / "grid.png")

    @staticmethod
    def _of_all_ranks(trainer: Trainer, mine: list[Any]) -> list[Any]:
        if trainer.world_size == 1:
            return mine
        parts: list[list[Any]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(parts, mine)
        return [item for part in parts for item in part]


def remove_test(root: Path) -> None:
    """Removes what a test left in a run's folder."""
    shutil.rmtree(root / "images", ignore_errors=True)
    for name in ("measures.json", "per_image.csv", "grid.png"):
        (root / name).unlink(missing_ok=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV; what is undefined is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return text.getvalue()
