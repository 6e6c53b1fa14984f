"""Stable Diffusion XL: two CLIP text encoders, a U-Net that is told the picture's size, DDPM noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from antidreambooth.diffusion.backbone import Backbone, Conditioning
from antidreambooth.diffusion.configs import Configs, Pair
from antidreambooth.diffusion.defaults import Defaults, Recipe
from antidreambooth.diffusion.families.stable_diffusion import schedule_misfit
from antidreambooth.diffusion.noising import Noising

SIZES = 6  # numbers that the U-Net is told of a picture: original size, top left corner of the crop, target size


class StableDiffusionXL(Backbone):
    """Stable Diffusion XL (arXiv:2307.01952), with epsilon- or v-prediction.

    Args:
        parts: see ``Backbone``.
    """

    family = "Stable Diffusion XL"
    official = StableDiffusionXLPipeline
    networks: ClassVar[Mapping[str, Any]] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
    text_lora = ("text_encoder", "text_encoder_2")
    inverted: ClassVar[Mapping[str, str]] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    switches: ClassVar[Mapping[str, Any]] = {"force_zeros_for_empty_prompt": True}
    arguments = ("prompt_embeds", "pooled_prompt_embeds")
    # diffusers' examples: README_sdxl.md of dreambooth for a LoRA, README_sdxl.md of text_to_image for the whole U-Net,
    # textual_inversion_sdxl.py for a token; the pipeline's own sampling.
    published = Defaults(
        surrogate=Recipe(1e-6, 1, 3, False),
        full=Recipe(1e-6, 1, 500, False),
        lora=Recipe(1e-4, 1, 500, False, 1e-4),
        textual_inversion=Recipe(5e-4, 4, 2000, False),
        guidance_scale=5.0,
        sampling_steps=50,
        resolution=1024,
    )

    @classmethod
    def misfit(cls, configs: Configs, defaults: Defaults) -> str:
        """What is wrong: a refiner, an inpainting model, an impossible schedule ..."""
        for left, found, right, wanted in cls.fits(configs):
            if found != wanted:
                return f"is no plain {cls.family}: its {left} {found}, its {right} {wanted}"
        return schedule_misfit(configs["scheduler"], defaults)

    @classmethod
    def fits(cls, configs: Configs) -> Iterable[Pair]:
        """Channels of latents, width of texts, and how many numbers the U-Net is told beside them."""
        unet, first, second = configs["unet"], configs["text_encoder"], configs["text_encoder_2"]
        told = SIZES * (unet["addition_time_embed_dim"] or 0) + second["projection_dim"]
        yield "unet/ takes channels:", unet["in_channels"], "vae/ gives", configs["vae"]["latent_channels"]
        yield (
            "unet/ takes texts of width",
            unet["cross_attention_dim"],
            "text encoders give",
            (first["hidden_size"] + second["hidden_size"]),
        )
        yield "unet/ is told numbers:", unet["projection_class_embeddings_input_dim"], "there are", told

    @classmethod
    def step(cls, configs: Configs) -> int:
        """A picture's side is a multiple of so many pixels: of a latent and of the 8 that the pipeline wants."""
        return math.lcm(8, cls.shrinkage(configs))

    @classmethod
    def smallest(cls, configs: Configs) -> int:
        """The smallest side of a picture in pixels: the U-Net's coarsest level still has a latent of its own."""
        return int(cls.step(configs) * 2 ** (len(configs["unet"]["block_out_channels"]) - 1))

    def law(self, config: Mapping[str, Any]) -> Noising:
        """DDPM, of whose betas the published folder's Euler sampler knows, too."""
        return Noising.diffusion(config)

    def sampler(self) -> DDIMScheduler:
        """DDIM: the published Euler sampler's noise is in another unit, and its config leaves these two open."""
        return DDIMScheduler.from_config(self.scheduler.config, clip_sample=False, set_alpha_to_one=False)

    def encode_text(self, prompts: list[str]) -> Conditioning:
        """Both encoders' last hidden states but one, side by side, and the second one's projected pooled output."""
        sequence, _, pooled, _ = self.pipeline(self.scheduler).encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning((sequence, pooled))

    def negative(self, count: int) -> Conditioning:
        """Zeros, unless the model's folder says that it wants the empty prompt itself."""
        empty = self.embed([""] * count)
        return Conditioning(map(torch.zeros_like, empty)) if self.force_zeros_for_empty_prompt else empty

    def denoise(
        self, noisy: Float[Tensor, "n c h w"], times: Shaped[Tensor, " n"], conditioning: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """The noise or v, for a picture of this size that is not cropped."""
        sequence, pooled = conditioning
        height, width = (float(side * self.downscale) for side in noisy.shape[-2:])
        numbers = (height, width, 0.0, 0.0, height, width)
        sizes = torch.stack([pooled.new_full((len(noisy),), number) for number in numbers], dim=1)
        told = {"text_embeds": pooled, "time_ids": sizes}
        predicted: Tensor = self.unet(noisy, times, sequence, added_cond_kwargs=told).sample
        return predicted
