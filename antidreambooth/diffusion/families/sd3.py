"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a transformer, flow matching with a constant shift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from antidreambooth.diffusion.backbone import Backbone, Conditioning
from antidreambooth.diffusion.configs import Configs, Pair
from antidreambooth.diffusion.defaults import Defaults, Recipe
from antidreambooth.diffusion.densities import LogitNormal
from antidreambooth.diffusion.noising import Noising

LENGTH = 77  # tokens that T5 reads: the DreamBooth example's; the pipeline's own is 256


class StableDiffusion3(Backbone):
    """Stable Diffusion 3 and 3.5 (arXiv:2403.03206).

    Args:
        parts: see ``Backbone``.
    """

    family = "Stable Diffusion 3 / 3.5"
    official = StableDiffusion3Pipeline
    networks: ClassVar[Mapping[str, Any]] = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    tokenizers: ClassVar[Mapping[str, Any]] = {
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": T5Tokenizer,
    }
    text_lora = ("text_encoder", "text_encoder_2")
    lora_targets = tuple(
        f"attn.{name}"
        for name in ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
    )
    density = LogitNormal()
    arguments = ("prompt_embeds", "pooled_prompt_embeds")
    text_layers = r".*\.attn\.add_[kv]_proj"
    # diffusers' examples/dreambooth/README_sd3.md, and train_dreambooth_sd3.py for density and loss weight; the
    # pipeline's own sampling.
    published = Defaults(
        surrogate=Recipe(1e-4, 1, 3, False, 1e-4),
        full=Recipe(1e-4, 1, 500, False, 1e-4),
        lora=Recipe(4e-4, 1, 500, False, 1e-4),
        guidance_scale=7.0,
        sampling_steps=28,
        resolution=512,
    )

    @classmethod
    def fits(cls, configs: Configs) -> Iterable[Pair]:
        """Channels of latents, width of texts."""
        transformer, clips = configs["transformer"], (configs["text_encoder"], configs["text_encoder_2"])
        pooled = sum(clip["projection_dim"] for clip in clips)
        yield "transformer/ for latents", transformer["in_channels"], "vae/", configs["vae"]["latent_channels"]
        yield "transformer/ for texts", transformer["joint_attention_dim"], "T5", configs["text_encoder_3"]["d_model"]
        yield "transformer/ for pooled texts", transformer["pooled_projection_dim"], "pair of CLIPs", pooled

    def law(self, config: Mapping[str, Any]) -> Noising:
        """The loss counts s^2: the example compares denoised latents (``--precondition_outputs``, its default)."""
        return Noising.flow(config, power=2)

    def encode_text(self, prompts: list[str]) -> Conditioning:
        """Both CLIPs' sequences side by side and T5's after them, and both pooled outputs side by side."""
        sequence, _, pooled, _ = self.pipeline(self.scheduler).encode_prompt(
            list(prompts), None, None, self.device, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
        return Conditioning((sequence, pooled))

    def denoise(
        self, noisy: Float[Tensor, "n c h w"], times: Shaped[Tensor, " n"], conditioning: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """Noise less latents."""
        sequence, pooled = conditioning
        predicted: Tensor = self.transformer(noisy, sequence, pooled, times).sample
        return predicted
