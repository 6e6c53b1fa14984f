"""The victim's result: the trained model as diffusers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from antidreambooth.files import replacing, write_json
from antidreambooth.provenance import MANIFEST, versions
from callbacks.disk_space import for_all_ranks, require_room, require_writable
from callbacks.likeness import remove_test


class TrainedModel(Callback):
    """Writes ``model/``, ``lora/`` or ``textual_inversion/`` at the end, and ``manifest.json`` beside it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds out before any work whether the result can be written."""
        if stage == "fit":
            for_all_ranks(trainer, lambda: require_writable(Path(trainer.default_root_dir)))

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The same for its size, which is known now; the optimizer's moments make a checkpoint three times as large."""
        trained = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
        parts = [pl_module, *pl_module.backbone.text_encoders.values()]  # these may be no part of it while they rest
        whole = sum(size for size in {id(p): p.nbytes for part in parts for p in part.parameters()}.values())
        for_all_ranks(trainer, lambda: require_room(Path(trainer.default_root_dir), 6 * trained + whole))

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The result of a module that has ``adaptation``, ``trained()`` and ``record()``."""
        backbone = pl_module.trained()
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        folder = root / pl_module.adaptation.folder
        with replacing(folder) as fresh:
            pl_module.adaptation.save(backbone, fresh)
        remove_test(root)  # it was of the model before
        how = {"versions": versions(), "threads": torch.get_num_threads()}
        manifest = {**pl_module.record(), **how, "steps": trainer.global_step, "complete": True}
        write_json(root / MANIFEST, manifest)
