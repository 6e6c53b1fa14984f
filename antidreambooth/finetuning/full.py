"""The whole model learns: DreamBooth as published."""

from __future__ import annotations

from pathlib import Path

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.libraries import quiet
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.finetuning.adaptation import Adaptation, explained
from antidreambooth.finetuning.dreambooth import learning_encoders


class Full(Adaptation):
    """Every weight of the denoiser and, if so set, of the text encoder: DreamBooth as published (arXiv:2208.12242).

    Saved as a whole pipeline's folder, ``model/``.
    """

    role = "full"
    folder = "model"
    whole = True

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Unfreezes the weights."""
        for part in [backbone.denoiser, *(learning_encoders(backbone) if train_text_encoder else [])]:
            part.requires_grad_(True)

    def save(self, backbone: Backbone, folder: Path) -> None:
        """A folder for the official pipeline's ``from_pretrained``, which is a backbone of this project, too."""
        with quiet():
            backbone.pipeline(backbone.kept_scheduler()).save_pretrained(folder, safe_serialization=True)
        backbone.defaults.write(folder)

    def load(self, backbone: Backbone, folder: Path) -> None:
        """Takes over the denoiser and the text encoders."""
        with explained(folder):
            trained = load_backbone(str(folder))
            for name in (backbone.denoiser_name(), *backbone.text_encoders):
                getattr(backbone, name).load_state_dict(getattr(trained, name).state_dict())
