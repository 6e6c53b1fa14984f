"""The whole model learns: DreamBooth as published."""

from __future__ import annotations

from pathlib import Path

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.loading import load_backbone, quiet
from antidreambooth.finetuning.adaptation import Adaptation, explained


class Full(Adaptation):
    """Every weight of the U-Net and, if so set, of the text encoder: DreamBooth as published (arXiv:2208.12242).

    Saved as a whole pipeline's folder, ``model/``.
    """

    role = "full"
    folder = "model"

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Unfreezes the weights."""
        backbone.unet.requires_grad_(True)
        backbone.text_encoder.requires_grad_(train_text_encoder)

    def save(self, backbone: Backbone, folder: Path) -> None:
        """A folder for ``StableDiffusionPipeline.from_pretrained``, which is a backbone of this project, too."""
        with quiet():
            backbone.pipeline().save_pretrained(folder, safe_serialization=True)
        backbone.defaults.write(folder)

    def load(self, backbone: Backbone, folder: Path) -> None:
        """Takes over the U-Net and the text encoder."""
        with explained(folder):
            trained = load_backbone(str(folder))
            backbone.unet.load_state_dict(trained.unet.state_dict())
            backbone.text_encoder.load_state_dict(trained.text_encoder.state_dict())
