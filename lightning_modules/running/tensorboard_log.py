"""TensorBoard's log of a run, on a disk that may be full."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from antidreambooth.files import writing


class TensorBoardLog(TensorBoardLogger):
    """Lightning's own, which says in one line where it cannot write; of all files of a run it is written most often."""

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer; its folder is made when this is first asked for."""
        with writing(Path(self.log_dir)):
            return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hands numbers to the thread that writes them, whose errors come out at the next call."""
        with writing(Path(self.log_dir)):
            try:
                super().log_metrics(metrics, step)
            except ValueError as error:  # Lightning's word for whatever TensorBoard raises
                if isinstance(error.__cause__, OSError):
                    raise error.__cause__ from None
                raise

    @rank_zero_only
    def save(self) -> None:
        """Writes what is waiting."""
        with writing(Path(self.log_dir)):
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Closes the log; after a failed run its own error is what counts, not one that closing adds."""
        if status != "success":
            with suppress(OSError):
                super().finalize(status)
            return
        with writing(Path(self.log_dir)):
            super().finalize(status)
