"""FLUX.1 dev and schnell: CLIP's pooled output and T5, packed latents, guidance as an input (dev)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from antidreambooth.diffusion.backbone import Backbone, Conditioning
from antidreambooth.diffusion.configs import Configs, Pair
from antidreambooth.diffusion.defaults import Defaults, Recipe

PATCH = 2  # latents of a token, along one side
LENGTHS = {True: 512, False: 256}  # tokens that T5 reads, of dev and of schnell, by whether guidance is an input
GUIDANCE = 1.0  # while training: examples/dreambooth/README_flux.md of diffusers; 3.5 is its script's default


class Flux(Backbone):
    """FLUX.1 dev and schnell, by Black Forest Labs.

    Args:
        parts: see ``Backbone``.
    """

    family = "FLUX.1"
    official = FluxPipeline
    networks: ClassVar[Mapping[str, Any]] = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5Tokenizer}
    text_lora = ("text_encoder",)
    inverted: ClassVar[Mapping[str, str]] = {"text_encoder": ""}
    lora_targets = (
        *(f"attn.{name}" for name in ("to_k", "to_q", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    arguments = ("prompt_embeds", "pooled_prompt_embeds")
    text_layers = r".*\.attn\.add_[kv]_proj"  # the single blocks have none of the text alone
    # diffusers' examples/dreambooth/README_flux.md; the pipeline's own sampling.
    published = Defaults(
        surrogate=Recipe(1e-4, 1, 3, False, 1e-4),
        full=Recipe(1e-4, 1, 500, False, 1e-4),
        lora=Recipe(1e-4, 1, 500, False, 1e-4),
        guidance_scale=3.5,
        sampling_steps=28,
        resolution=512,
    )

    @classmethod
    def fits(cls, configs: Configs) -> Iterable[Pair]:
        """Channels of packed latents, width of texts."""
        transformer, texts = configs["transformer"], configs["text_encoder"]["hidden_size"]
        packed = PATCH**2 * configs["vae"]["latent_channels"]
        yield "transformer/ for tokens", transformer["in_channels"], "vae/ for tokens", packed
        yield "transformer/ for texts", transformer["joint_attention_dim"], "T5", configs["text_encoder_2"]["d_model"]
        yield "transformer/ for pooled texts", transformer["pooled_projection_dim"], "CLIP", texts

    @property
    def distilled(self) -> bool:
        """Whether it is schnell, which takes no guidance."""
        return not self.transformer.config.guidance_embeds

    def guides(self, scale: float) -> bool:
        """Never: guidance is an input of dev, and schnell knows none."""
        return False

    def encode_text(self, prompts: list[str]) -> Conditioning:
        """T5's sequence, whose padding is attended to, and CLIP's pooled output."""
        length = LENGTHS[self.transformer.config.guidance_embeds]
        sequence, pooled, _ = self.pipeline(self.scheduler).encode_prompt(
            list(prompts), None, self.device, max_sequence_length=length
        )
        return Conditioning((sequence, pooled))

    def denoise(
        self, noisy: Float[Tensor, "n c h w"], times: Shaped[Tensor, " n"], conditioning: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """Noise less latents."""
        sequence, pooled = conditioning
        rows, columns = (torch.arange(side // PATCH, device=noisy.device).float() for side in noisy.shape[-2:])
        places = torch.cartesian_prod(rows.new_zeros(1), rows, columns)
        predicted = self.transformer(
            hidden_states=self.pack(noisy),
            timestep=times / 1000,
            pooled_projections=pooled,
            encoder_hidden_states=sequence,
            txt_ids=places.new_zeros(sequence.shape[1], 3),
            img_ids=places,
            guidance=noisy.new_full((len(noisy),), GUIDANCE) if self.transformer.config.guidance_embeds else None,
        ).sample
        return self.unpack(predicted, noisy)

    def pack(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens width"]:
        """2 x 2 latents to a token, the channel outermost in it."""
        return pack(latents)

    def unpack(self, packed: Tensor, like: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Latents out of tokens."""
        return unpack(packed, like)


def pack(latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens width"]:
    """2 x 2 latents to a token, the channel outermost in it, rows before columns."""
    return torch.nn.functional.unfold(latents, PATCH, stride=PATCH).transpose(1, 2)


def unpack(packed: Float[Tensor, "n tokens width"], like: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The inverse of ``pack``, for latents of the shape of ``like``."""
    return torch.nn.functional.fold(packed.transpose(1, 2), like.shape[-2:], PATCH, stride=PATCH)
