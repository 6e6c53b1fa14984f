"""Stable Diffusion 1.x and 2.x: one U-Net, one CLIP text encoder, an f8 autoencoder, DDPM noise."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from antidreambooth.diffusion.backbone import Backbone, Posterior, precise
from antidreambooth.diffusion.precision import made_on_cpu
from antidreambooth.errors import InputError

FAMILY = "Stable Diffusion 1.x / 2.x"
PARTS = {  # each component's folder and the file without which it is missing
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
NETWORKS: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
OTHERS: dict[str, Any] = {"tokenizer": CLIPTokenizer, "scheduler": DDPMScheduler}


class StableDiffusion(Backbone):
    """Stable Diffusion 1.x or 2.x, with epsilon- or v-prediction (arXiv:2112.10752).

    Args:
        parts: see ``Backbone``.
        named_parts: the same by name.
    """

    def __init__(self, *parts: Any, **named_parts: Any) -> None:
        super().__init__(*parts, **named_parts)
        self.known_tokens: dict[tuple[str, int, torch.device], Tensor] = {}

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def downscale(self) -> int:
        """Pixels of an image per latent, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Posterior:
        """Images in [-1, 1] to the posterior of their latents."""
        posterior = self.vae.encode(images).latent_dist
        scale = self.vae.config.scaling_factor
        return Posterior(precise(posterior.mean) * scale, precise(posterior.std) * scale)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Latents to images in [-1, 1]."""
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return cast(Tensor, pictures.float().clamp(-1, 1))

    def embed(self, prompts: list[str]) -> Float[Tensor, "p length width"]:
        """Prompts to the text encoder's last hidden states, padded or truncated to the tokenizer's length."""
        return cast(Tensor, self.text_encoder(torch.stack([self._tokens(prompt) for prompt in prompts]))[0])

    def _tokens(self, prompt: str) -> Int[Tensor, " length"]:
        """A prompt's tokens, on the device: copied there once, as a run asks for the same few in every step."""
        device = self.alphas_cumprod.device
        key = prompt, len(self.tokenizer), device  # textual inversion adds a token
        if key not in self.known_tokens:
            length = self.tokenizer.model_max_length
            found = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=length)
            with torch.inference_mode(False):  # what a test asks for may be trained on later
                self.known_tokens[key] = torch.tensor(found.input_ids, device=device)
        return self.known_tokens[key]

    def predict(
        self,
        noisy: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        embeddings: Float[Tensor, "n length width"],
    ) -> Float[Tensor, "n c h w"]:
        """u(z_t, t, c) in fp32: the noise or v, whichever the model predicts."""
        return precise(self.unet(noisy, timesteps, embeddings).sample)

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes activations of the U-Net and the VAE in the backward pass (the text encoder's are small)."""
        self.unet.enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    def pipeline(self) -> StableDiffusionPipeline:
        """A diffusers pipeline around these very modules, with a DDIM sampler and no progress bar."""
        with made_on_cpu():
            scheduler = DDIMScheduler.from_config(self.scheduler.config)
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def check(self, name: str) -> None:
        """Refuses what has this layout and is something else.

        Raises:
            InputError: an inpainting model, XL, a model that predicts neither noise nor v, and the like.
        """
        unet, scheduler = self.unet.config, self.scheduler.config
        if scheduler.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"the backbone {name} predicts {scheduler.prediction_type}; epsilon and v_prediction work")
        if unet.in_channels != self.latent_channels or unet.addition_embed_type is not None:
            raise InputError(f"the backbone {name} is no plain {FAMILY} (inpainting, XL ... do not work)")
