"""Lumina-Image 2.0: one Gemma2 text encoder, time and prediction that point the other way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from diffusers import AutoencoderKL, Lumina2Pipeline, Lumina2Transformer2DModel
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizer

from antidreambooth.diffusion.backbone import Backbone, Conditioning
from antidreambooth.diffusion.configs import Configs, Pair
from antidreambooth.diffusion.defaults import Defaults, Recipe


class Lumina2(Backbone):
    """Lumina-Image 2.0 (arXiv:2503.21758).

    Args:
        parts: see ``Backbone``.
    """

    family = "Lumina-Image 2.0"
    official = Lumina2Pipeline
    networks: ClassVar[Mapping[str, Any]] = {
        "transformer": Lumina2Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": Gemma2Model,
    }
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": GemmaTokenizer}
    arguments = ("prompt_embeds", "prompt_attention_mask")
    text_layers = r"layers\.\d+\.attn\.to_[kv]"  # of text and picture alike
    # diffusers' examples/dreambooth/README_lumina2.md; the pipeline's own sampling.
    published = Defaults(
        surrogate=Recipe(1e-4, 1, 3, False, 1e-4),
        full=Recipe(1e-4, 1, 500, False, 1e-4),
        lora=Recipe(1e-4, 1, 500, False, 1e-4),
        guidance_scale=4.0,
        sampling_steps=30,
        resolution=512,
    )

    @classmethod
    def fits(cls, configs: Configs) -> Iterable[Pair]:
        """Channels of latents, width of texts."""
        transformer, texts = configs["transformer"], configs["text_encoder"]["hidden_size"]
        yield "transformer/ for latents", transformer["in_channels"], "vae/", configs["vae"]["latent_channels"]
        yield "transformer/ for texts", transformer["cap_feat_dim"], "text_encoder/", texts

    def encode_text(self, prompts: list[str]) -> Conditioning:
        """The last hidden states but one behind the pipeline's system prompt, and which of them are words."""
        sequence, mask, *_ = self.pipeline(self.scheduler).encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device
        )
        return Conditioning((sequence, mask))

    def negative(self, count: int) -> Conditioning:
        """The empty prompt, before which the pipeline puts no system prompt."""

        def encode() -> Conditioning:
            _, _, sequence, mask = self.pipeline(self.scheduler).encode_prompt(
                [""] * count, do_classifier_free_guidance=True, device=self.device
            )
            return Conditioning((sequence, mask))

        return self.told(("negative", count), encode)

    def denoise(
        self, noisy: Float[Tensor, "n c h w"], times: Shaped[Tensor, " n"], conditioning: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """Noise less latents: the network, which is told how clean they are, predicts the opposite."""
        sequence, mask = conditioning
        predicted: Tensor = self.transformer(
            hidden_states=noisy,
            timestep=1 - times / 1000,
            encoder_hidden_states=sequence,
            encoder_attention_mask=mask,
        ).sample
        return -predicted
