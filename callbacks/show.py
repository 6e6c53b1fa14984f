"""Pictures for people to look at: on disk and in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import Trainer
from torch import Tensor
from torchvision.utils import make_grid

from antidreambooth.files import writing
from antidreambooth.photos.delivery import write_png


def show(trainer: Trainer, name: str, pictures: Tensor, columns: int, step: int, path: Path | None = None) -> None:
    """Writes a grid of 8-bit pictures (n 3 h w) to every TensorBoard log and, where a path is given, as PNG."""
    grid = make_grid(pictures, nrow=columns, padding=2, pad_value=255).to(torch.uint8)
    for logger in trainer.loggers:
        writer = getattr(logger, "experiment", None)
        if writer is not None and hasattr(writer, "add_image"):
            with writing(Path(logger.log_dir or trainer.default_root_dir)):
                writer.add_image(name, grid, step)
    if path is not None:
        write_png(path, grid)
