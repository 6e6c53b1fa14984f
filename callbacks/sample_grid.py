"""What the model in training generates, every few rounds or steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from antidreambooth.diffusion.sampling import noise_of, sample
from antidreambooth.errors import InputError, require
from callbacks.show import show


class SampleGrid(Callback):
    """Generates pictures of some prompts from the module's ``backbone``, to ``samples/`` and to TensorBoard.

    The noise is the same every time, so that grids can be compared over time; a row is a prompt.

    Args:
        prompts: what to show.
        count: pictures for each prompt.
        every_n_epochs: rounds (epochs) between two grids; 0 switches them off.
        every_n_steps: training steps between two grids, for a run whose epoch is the whole training.
        guidance_scale: classifier-free guidance; the backbone's own when not given.
        sampling_steps: DDIM steps; the backbone's own when not given.
    """

    def __init__(
        self,
        prompts: list[str] = ["a photo of sks person"],  # noqa: B006 (never changed)
        count: int = 4,
        every_n_epochs: int = 25,
        every_n_steps: int = 0,
        guidance_scale: float | None = None,
        sampling_steps: int | None = None,
    ) -> None:
        if not prompts:
            raise InputError("SampleGrid's prompts are empty: leave out SampleGrid to draw nothing")
        require("count", count, 1)
        require("every_n_epochs", every_n_epochs, 0)
        require("every_n_steps", every_n_steps, 0)
        require("guidance_scale", guidance_scale, 0)
        require("sampling_steps", sampling_steps, 1)
        self.prompts, self.count = prompts, count
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.guidance_scale, self.sampling_steps = guidance_scale, sampling_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a run that loads no denoiser to draw with."""
        if getattr(pl_module, "encoder_only", False):
            raise InputError(
                "a method on the encoder alone loads no denoiser, and SampleGrid draws with one: leave it out of "
                "--trainer.callbacks"
            )

    def asks(self, pl_module: Any) -> list[list[str]]:
        """The lists of prompts that the grids ask text encoders for, so that a module can embed them in time."""
        return [[pl_module.prompt(prompt)] * self.count for prompt in self.prompts]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A grid, when a round's is due."""
        number = trainer.current_epoch + 1
        if self.every_n_epochs and number % self.every_n_epochs == 0:
            self._grid(trainer, pl_module, "round", number)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A grid, when a step's is due."""
        if self.every_n_steps and (batch_idx + 1) % self.every_n_steps == 0:
            self._grid(trainer, pl_module, "step", batch_idx + 1)

    def _grid(self, trainer: Trainer, pl_module: Any, unit: str, number: int) -> None:
        pl_module.require_vital()  # on every rank; it knows better than a broken picture what went wrong
        if not trainer.is_global_zero and not pl_module.together:
            return
        backbone = pl_module.backbone.to(pl_module.device)  # an ensemble may have put it aside
        noise = noise_of(backbone, pl_module.resolution, range(self.count), seed=0)
        prompts = [pl_module.prompt(prompt) for prompt in self.prompts]
        with trainer.precision_plugin.forward_context():
            rows = [sample(backbone, p, noise, self.guidance_scale, self.sampling_steps) for p in prompts]
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "samples" / f"{unit}-{number:03d}.png"
        show(trainer, "samples", torch.cat(rows).cpu(), self.count, number, path)
