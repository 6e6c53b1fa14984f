"""FSMG and AdvDM: perturbation against surrogates that do not learn any more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import SGD, Optimizer

from antidreambooth.attack.methods import METHODS, Method, Settings
from antidreambooth.attack.objectives.ratio import against_base, decoys
from antidreambooth.attack.rounds import Photos
from antidreambooth.diffusion.backbone import Checkpointing
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth
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
            as they are: base models, or a model that was trained elsewhere. A LikelihoodRatio without a decoy has one
            more model trained and kept there, on a few pictures of nobody that the base model draws; the next person's
            run finds it under ``$XDG_CACHE_HOME``.
        prompt: what the attacked models know the person as; when not given what the surrogates were trained on, and
            each backbone's class prompt where there are none.
        gradient_checkpointing: less memory for about a third more time; with ``vae`` in the autoencoder alone.
        kwargs: those of every cloaking method.
    """

    def __init__(
        self,
        *,
        surrogate: str | None = "configs/dreambooth.yaml",
        prompt: str | None = None,
        gradient_checkpointing: Checkpointing = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Lightning writes a checkpoint only after an optimizer's step, of which this method has no other: see
        # https://github.com/Lightning-AI/pytorch-lightning/issues/17167.
        self.clock = nn.Parameter(torch.zeros(()))

    @property
    def sources(self) -> list[Source]:
        """The surrogates that were trained on the base models, or the base models."""
        if self.hparams.surrogate is None:
            return super().sources
        root = Path(self.trainer.default_root_dir)
        places = [(source, str(surrogate_folder(root, source) / Full.folder)) for source in super().sources]
        return [Source(place, frozen_weights=source.frozen_weights) for source, place in places]

    @property
    def trains_decoys(self) -> bool:
        """Whether the models of nobody are trained before the attack, as those of the person are."""
        return self.hparams.surrogate is not None

    def build(self) -> None:
        """Also says which model of nobody was trained."""
        objective = self.attack.objective
        if self.hparams.surrogate is None:  # a dry run attacks the base model itself, and equal losses have no gradient
            for ratio in (*decoys(objective), *against_base(objective)):
                ratio.known_to_run = self.source, ""
        else:
            for ratio in decoys(objective):
                place = nobody_folder(Path(self.trainer.default_root_dir), self.source) / Full.folder
                nobody = Source(str(place), frozen_weights=self.source.frozen_weights)
                ratio.known_to_run = nobody, instance_prompt(nobody)
        super().build()

    def method(self) -> Method:
        """FSMG, or AdvDM where nothing is trained; whatever its numbers."""
        return METHODS["fsmg" if self.hparams.surrogate is not None else "advdm"]

    def completed(self, settings: Settings) -> Settings:
        """Also how much memory it may take."""
        return replace(settings, training=DreamBooth(gradient_checkpointing=self.hparams.gradient_checkpointing))

    def setup(self, stage: str) -> None:
        """Refuses what has no weights to split."""
        super().setup(stage)
        if not replicates(self.trainer.strategy):
            raise InputError("FSMG trains nothing that could be split over processes: use --trainer.strategy ddp")

    def configure_optimizers(self) -> Optimizer:
        """Counts rounds."""
        return SGD([self.clock], lr=1.0)

    def training_step(self, batch: Photos, batch_idx: int) -> None:
        """One round, and one more on the clock."""
        super().training_step(batch, batch_idx)
        self.clock.grad = -torch.ones_like(self.clock)
        cast(LightningOptimizer, self.optimizers()).step()
        self.clock.grad = None

    def prompts(self) -> list[str] | None:
        """The one that is given, or what each surrogate was trained on."""
        if self.hparams.prompt is not None:
            return [self.hparams.prompt] * len(self.sources)
        if self.hparams.surrogate is None:
            return None
        return [instance_prompt(source) for source in self.sources]

    def memory_savers(self) -> list[str]:
        """Also checkpointing."""
        checkpointing = self.hparams.gradient_checkpointing
        return [*super().memory_savers(), *([] if checkpointing else ["--model.gradient_checkpointing true"])]

    def effective(self) -> dict[str, Any]:
        """Also the prompts."""
        return {**super().effective(), "prompts": self.assembly.prompts}


def instance_prompt(surrogate: Source) -> str:
    """What a surrogate of ours was trained on."""
    record = json.loads((Path(surrogate.name).parent / "manifest.json").read_text(encoding="utf-8"))
    prompt: str = record["settings"]["model"]["training"]["instance_prompt"]
    return prompt


def surrogate_folder(root: Path, source: Source) -> Path:
    """Where the surrogate of a base model is trained; another revision, variant or rest is another model."""
    return root / "surrogates" / slug(str(source))


def nobody_folder(root: Path, source: Source) -> Path:
    """Where the model of nobody is trained that a LikelihoodRatio compares with."""
    return surrogate_folder(root, source).with_name(f"{slug(str(source))}-nobody")
