"""The denoiser's keys and values of the text learn, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.defaults import given
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth, learning_encoders
from antidreambooth.finetuning.full import Full


class CrossAttention(Full):
    """The layers that make keys and values of the text, for the picture to attend to, as CAAT trains them.

    CAAT (arXiv:2404.15081) does so in a surrogate, Custom Diffusion (arXiv:2212.04488) in an attacker's model. In a
    U-Net, and in Sana, these are the keys and values of the cross-attention. Stable Diffusion 3, FLUX, FLUX.2 and Qwen
    Image attend to text and picture at once, with layers of the text's own: these learn (FLUX's later
    blocks have none). In Z-Image and Lumina 2 one layer makes the keys of text and picture alike: there it learns, for
    both.

    Saved as a whole pipeline's folder, ``model/``. The text encoder learns only if ``train_text_encoder`` says so.
    """

    def usual(self, training: DreamBooth) -> DreamBooth:
        """No text encoder."""
        return replace(training, train_text_encoder=given(training.train_text_encoder, False))

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Unfreezes these layers."""
        parts, wanted = backbone.denoiser.named_modules(), re.compile(backbone.text_layers)
        layers = [layer for name, layer in parts if wanted.fullmatch(name)]
        if not layers:
            raise InputError(f"this {backbone.family} model has no layers for keys and values of the text: use LoRA")
        for part in [*layers, *(learning_encoders(backbone) if train_text_encoder else [])]:
            part.requires_grad_(True)
