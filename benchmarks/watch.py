"""A callback that watches a run: seconds of its rounds, and what its processes tell one another in one of them."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from antidreambooth.files import to_json

BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "int": 4, "unsigned char": 1}
BACKENDS = ("gloo:", "nccl:")


class Watch(Callback):
    """Writes ``{"seconds": [...], "collectives": {name: {"calls": n, "bytes": n}}}`` where rank 0 runs.

    Bytes are those that one rank hands in; how many go over the wire depends on the number of ranks. The first round,
    which also encodes what stays the same, and the last one, which is profiled, have no seconds.

    Args:
        file: to write.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.seconds: list[float] = []
        self.profiler: profile | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The round begins."""
        if trainer.max_epochs and trainer.current_epoch == trainer.max_epochs - 1:
            self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profiler.start()
        self.begun = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The round is over, with what it logs."""
        if self.profiler is not None:
            self.profiler.stop()
        elif trainer.current_epoch > 0:
            self.seconds.append(time.perf_counter() - self.begun)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what was seen."""
        if trainer.is_global_zero and self.profiler is not None:
            seen = {"seconds": self.seconds, "collectives": collectives(self.profiler)}
            self.file.write_text(to_json(seen, indent=2), encoding="utf-8")


def collectives(profiler: profile) -> dict[str, dict[str, int]]:
    """Calls, and bytes handed in, of each kind."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"calls": 0, "bytes": 0})
    for event in profiler.events() or []:
        if event.name.startswith(BACKENDS):
            kind = found[event.name.partition(":")[2]]
            kind["calls"] += 1
            kind["bytes"] += sum(
                math.prod(shape) * BYTES[dtype]
                for shape, dtype in zip(event.input_shapes, event.input_dtypes, strict=True)
                if dtype in BYTES
            )
    return dict(found)
