"""Z-Image: one Qwen3 text encoder, prompts of their own length, time and prediction that point the other way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Model

from antidreambooth.diffusion.backbone import Backbone, Conditioning
from antidreambooth.diffusion.configs import Configs, Pair
from antidreambooth.diffusion.defaults import Defaults, Recipe


class Ragged(Conditioning):
    """Prompts of different lengths: each part is one prompt's tokens (length width), without padding."""

    def repeated(self, count: int) -> Ragged:
        """Each prompt ``count`` times, one after the other."""
        return Ragged(prompt for prompt in self for _ in range(count))

    def expanded(self, count: int) -> Ragged:
        """Of one prompt, for ``count`` images."""
        return self.repeated(count)


class ZImage(Backbone):
    """Z-Image (arXiv:2511.22699).

    Args:
        parts: see ``Backbone``.
    """

    family = "Z-Image"
    official = ZImagePipeline
    networks: ClassVar[Mapping[str, Any]] = {
        "transformer": ZImageTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": Qwen3Model,
    }
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": Qwen2Tokenizer}
    guidance = ("guidance_scale", 0.0)  # the pipeline adds scale * (with - without) to what is predicted with a prompt
    text_layers = r"layers\.\d+\.attention\.to_[kv]"  # of text and picture alike
    # diffusers' examples/dreambooth/README_z_image.md; the pipeline's own sampling.
    published = Defaults(
        surrogate=Recipe(1e-4, 1, 3, False, 1e-4),
        full=Recipe(1e-4, 1, 500, False, 1e-4),
        lora=Recipe(1e-4, 1, 500, False, 1e-4),
        guidance_scale=5.0,
        sampling_steps=50,
        resolution=512,
    )

    @classmethod
    def fits(cls, configs: Configs) -> Iterable[Pair]:
        """Channels of latents, width of texts."""
        transformer, texts = configs["transformer"], configs["text_encoder"]["hidden_size"]
        yield "transformer/ for latents", transformer["in_channels"], "vae/", configs["vae"]["latent_channels"]
        yield "transformer/ for texts", transformer["cap_feat_dim"], "text_encoder/", texts

    def encode_text(self, prompts: list[str]) -> Ragged:
        """The last hidden states but one of a chat with each prompt in it."""
        rows, _ = self.pipeline(self.scheduler).encode_prompt(  # a copy: the pipeline writes its template into the list
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return Ragged(rows)

    def given(self, conditioning: Conditioning, prefix: str = "") -> dict[str, Any]:
        """A list of prompts."""
        return {f"{prefix}prompt_embeds": list(conditioning)}

    def denoise(
        self, noisy: Float[Tensor, "n c h w"], times: Shaped[Tensor, " n"], conditioning: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """Noise less latents: the network, which is told how clean they are, predicts the opposite."""
        pictures = list(noisy.unsqueeze(2).unbind(0))  # videos of one frame
        predicted = self.transformer(pictures, 1 - times / 1000, list(conditioning), return_dict=False)[0]
        return -torch.stack(list(predicted)).squeeze(2)
