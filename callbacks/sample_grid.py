"""What the model in training generates, every few rounds."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer

from antidreambooth.sampling import noise_of, sample
from callbacks.pictures import show


class SampleGrid(Callback):
    """Generates pictures of some prompts from the module's ``backbone``, to ``samples/`` and to TensorBoard.

    The noise is the same every time, so that grids can be compared over time; a row is a prompt.

    Args:
        prompts: what to show.
        count: pictures for each prompt.
        every_n_epochs: rounds (epochs) between two grids; 0 switches them off.
        guidance_scale: classifier-free guidance; the backbone's own when not given.
        sampling_steps: DDIM steps; the backbone's own when not given.
    """

    def __init__(
        self,
        prompts: list[str] = ["a photo of sks person"],  # noqa: B006 (never changed)
        count: int = 4,
        every_n_epochs: int = 25,
        guidance_scale: float | None = None,
        sampling_steps: int | None = None,
    ) -> None:
        self.prompts, self.count, self.every_n_epochs = prompts, count, every_n_epochs
        self.guidance_scale, self.sampling_steps = guidance_scale, sampling_steps

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A grid, when one is due."""
        number = trainer.current_epoch + 1
        if not self.every_n_epochs or number % self.every_n_epochs or not trainer.is_global_zero:
            return
        backbone = pl_module.backbone
        noise = noise_of(backbone, pl_module.resolution, range(self.count), seed=0)
        with trainer.precision_plugin.forward_context():
            rows = [sample(backbone, p, noise, self.guidance_scale, self.sampling_steps) for p in self.prompts]
        path = Path(trainer.default_root_dir) / "samples" / f"round-{number:03d}.png"
        show(trainer, "samples", torch.cat(rows).cpu(), self.count, path)
