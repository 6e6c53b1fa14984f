"""FSMG and AdvDM: perturbation against surrogates that do not learn any more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from antidreambooth.attack.rounds import Photos
from antidreambooth.attack.surrogates import Fixed
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.errors import InputError
from antidreambooth.finetuning.full import Full
from antidreambooth.provenance import slug
from lightning_modules.cloaking import Cloaking
from lightning_modules.running.strategies import replicates


class FSMG(Cloaking):
    """Fully-trained surrogate model guidance (arXiv:2303.15433, Section 4; https://arxiv.org/abs/2303.15433).

    PGD against a DreamBooth model that was trained on the clean photos beforehand; against the untouched base model it
    is AdvDM (arXiv:2302.04578). With ``ensemble`` it is E-FSMG: every base model, or every surrogate made of one.

    Args:
        surrogate: config file of the victim that trains the surrogates on the clean photos, and its flags; they are
            kept in ``surrogates/`` of the run's folder and reused from there. With ``null`` the backbones are attacked
            as they are: base models, or a model that was trained elsewhere.
        prompt: what the attacked models know the person as; when not given what the surrogates were trained on, and
            each backbone's class prompt where there are none.
        gradient_checkpointing: less memory for about a third more time.
        kwargs: those of every cloaking method.
    """

    def __init__(
        self,
        *,
        surrogate: str | None = "configs/dreambooth.yaml",
        prompt: str | None = None,
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Lightning writes a checkpoint only after an optimizer's step, of which this method has no other: see
        # https://github.com/Lightning-AI/pytorch-lightning/issues/17167.
        self.clock = nn.Parameter(torch.zeros(()))

    @property
    def sources(self) -> list[str]:
        """The surrogates that were trained on the base models, or the base models."""
        if self.hparams.surrogate is None:
            return super().sources
        root = Path(self.trainer.default_root_dir)
        return [str(surrogate_folder(root, name) / Full.folder) for name in super().sources]

    def setup(self, stage: str) -> None:
        """Refuses what has no weights to split."""
        super().setup(stage)
        if not replicates(self.trainer.strategy):
            raise InputError("FSMG trains nothing that could be split over processes: use --trainer.strategy ddp")

    def build(self) -> None:
        """Loads what is attacked, with the prompts that go with it."""
        super().build()
        found = zip(self.sources, self.backbones, strict=True)
        self.prompts = [self.hparams.prompt or self._usual_prompt(*model) for model in found]
        if self.hparams.gradient_checkpointing:
            for backbone in self.backbones:
                backbone.enable_gradient_checkpointing()

    def configure_optimizers(self) -> Optimizer:
        """Counts rounds."""
        return SGD([self.clock], lr=1.0)

    def training_step(self, batch: Photos, batch_idx: int) -> None:
        """One round, and one more on the clock."""
        super().training_step(batch, batch_idx)
        self.clock.grad = -torch.ones_like(self.clock)
        self.optimizers().step()
        self.clock.grad = None

    def surrogate(self, backbone: Backbone, photos: Photos) -> Fixed:
        """A model as it is."""
        return Fixed(backbone, self.prompts[self.backbones.index(backbone)])

    def memory_savers(self) -> list[str]:
        """Also checkpointing."""
        checkpointing = self.hparams.gradient_checkpointing
        return [*super().memory_savers(), *([] if checkpointing else ["--model.gradient_checkpointing true"])]

    def effective(self) -> dict[str, Any]:
        """Also the prompts."""
        return {**super().effective(), "prompts": self.prompts}

    def _usual_prompt(self, source: str, backbone: Backbone) -> str:
        if self.hparams.surrogate is None:
            return backbone.defaults.class_prompt
        record = json.loads((Path(source).parent / "manifest.json").read_text(encoding="utf-8"))
        return str(record["settings"]["model"]["training"]["instance_prompt"])


def surrogate_folder(root: Path, backbone: str) -> Path:
    """Where the surrogate of a base model is trained."""
    return root / "surrogates" / slug(backbone)
