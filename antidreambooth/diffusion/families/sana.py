"""Sana: one Gemma2 text encoder, a deterministic autoencoder that shrinks each side by 32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizer

from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.configs import Configs, Pair
from antidreambooth.diffusion.defaults import Defaults, Recipe
from antidreambooth.diffusion.precision import precise


class Sana(Backbone):
    """Sana (arXiv:2410.10629).

    Args:
        parts: see ``Backbone``.
    """

    family = "Sana"
    official = SanaPipeline
    networks: ClassVar[Mapping[str, Any]] = {
        "transformer": SanaTransformer2DModel,
        "vae": AutoencoderDC,
        "text_encoder": Gemma2Model,
    }
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": GemmaTokenizer}
    spread = False
    schedulers = ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")
    lora_targets = ("to_q", "to_k", "to_v")
    arguments = ("prompt_embeds", "prompt_attention_mask")
    options: ClassVar[Mapping[str, Any]] = {
        "use_resolution_binning": False,  # else it draws pictures of another size
        "negative_prompt": None,  # it has one of its own, beside which it takes no embeddings of one
    }
    # diffusers' examples/dreambooth/README_sana.md; the pipeline's own sampling.
    published = Defaults(
        surrogate=Recipe(1e-4, 1, 3, False, 1e-4),
        full=Recipe(1e-4, 1, 500, False, 1e-4),
        lora=Recipe(1e-4, 1, 500, False, 1e-4),
        guidance_scale=4.5,
        sampling_steps=20,
        resolution=512,
    )

    @classmethod
    def fits(cls, configs: Configs) -> Iterable[Pair]:
        """Channels of latents, width of texts."""
        transformer, texts = configs["transformer"], configs["text_encoder"]["hidden_size"]
        yield "transformer/ for latents", transformer["in_channels"], "vae/", configs["vae"]["latent_channels"]
        yield "transformer/ for texts", transformer["caption_channels"], "text_encoder/", texts

    @classmethod
    def shrinkage(cls, configs: Configs) -> int:
        """Pixels of a picture per latent, along one side."""
        return int(2 ** (len(configs["vae"]["encoder_block_out_channels"]) - 1))

    @classmethod
    def step(cls, configs: Configs) -> int:
        """A picture's side is a multiple of a latent."""
        return cls.shrinkage(configs) * int(configs["transformer"]["patch_size"])

    @property
    def downscale(self) -> int:
        """Pixels of an image per latent, along one side."""
        return int(2 ** (len(self.vae.config.encoder_block_out_channels) - 1))

    def to_latents(self, images: Float[Tensor, "n 3 h w"]) -> Posterior:
        """Latents without a spread."""
        latents = precise(self.vae.encode(images).latent) * self.vae.config.scaling_factor
        return Posterior(latents, torch.zeros_like(latents))

    def encode_text(self, prompts: list[str]) -> Conditioning:
        """The last hidden states, and which of them are words; without the instructions for a rewriter of prompts."""
        sequence, mask, *_ = self.pipeline(self.scheduler).encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, complex_human_instruction=None
        )
        return Conditioning((sequence, mask))

    def denoise(
        self, noisy: Float[Tensor, "n c h w"], times: Shaped[Tensor, " n"], conditioning: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """Noise less latents."""
        sequence, mask = conditioning
        predicted: Tensor = self.transformer(
            noisy,
            encoder_hidden_states=sequence,
            encoder_attention_mask=mask,
            timestep=times * self.transformer.config.timestep_scale,
        ).sample
        return predicted
