"""FLUX.2 klein: one Qwen3 text encoder of which three layers are read, latents as patches that a batch norm scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.configs import Configs, Pair
from antidreambooth.diffusion.defaults import Defaults, Recipe
from antidreambooth.diffusion.precision import precise

PATCH = 2  # of the autoencoder's latents, along one side
READ = 3  # layers of the text encoder that the pipeline reads


class Flux2Klein(Backbone):
    """FLUX.2 klein, by Black Forest Labs.

    Args:
        parts: see ``Backbone``.
    """

    family = "FLUX.2 klein"
    official = Flux2KleinPipeline
    networks: ClassVar[Mapping[str, Any]] = {
        "transformer": Flux2Transformer2DModel,
        "vae": AutoencoderKLFlux2,
        "text_encoder": Qwen3ForCausalLM,
    }
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": Qwen2Tokenizer}
    switches: ClassVar[Mapping[str, Any]] = {"is_distilled": False}
    text_layers = r".*\.attn\.add_[kv]_proj"  # the single blocks have none of the text alone
    # diffusers' examples/dreambooth/README_flux2.md; the pipeline's own sampling.
    published = Defaults(
        surrogate=Recipe(1e-4, 1, 3, False, 1e-4),
        full=Recipe(1e-4, 1, 500, False, 1e-4),
        lora=Recipe(1e-4, 1, 500, False, 1e-4),
        guidance_scale=4.0,
        sampling_steps=50,
        resolution=512,
    )

    @classmethod
    def fits(cls, configs: Configs) -> Iterable[Pair]:
        """Channels of patches, width of texts."""
        transformer, patch = configs["transformer"], PATCH**2 * configs["vae"]["latent_channels"]
        texts = READ * configs["text_encoder"]["hidden_size"]
        yield "transformer/ for tokens", transformer["in_channels"], "vae/ for tokens", patch
        yield "transformer/ for texts", transformer["joint_attention_dim"], "text_encoder/", texts

    @classmethod
    def shrinkage(cls, configs: Configs) -> int:
        """Pixels of a picture per patch, along one side."""
        return PATCH * super().shrinkage(configs)

    @classmethod
    def step(cls, configs: Configs) -> int:
        """A picture's side is a multiple of a patch."""
        return cls.shrinkage(configs)

    @property
    def lora_layers(self) -> list[str]:
        """The single blocks' ``to_out`` one by one: in the double blocks that name is of a list of layers."""
        single = range(len(self.transformer.single_transformer_blocks))
        usual = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj")
        return [*usual, *(f"single_transformer_blocks.{number}.attn.to_out" for number in single)]

    @property
    def latent_channels(self) -> int:
        """Channels of a patch."""
        return PATCH**2 * super().latent_channels

    @property
    def downscale(self) -> int:
        """Pixels of an image per patch, along one side."""
        return PATCH * super().downscale

    @property
    def distilled(self) -> bool:
        """Whether it is the one of few steps."""
        return bool(self.is_distilled)

    def guides(self, scale: float) -> bool:
        """A distilled model ignores the scale."""
        return not self.distilled and super().guides(scale)

    def to_latents(self, images: Float[Tensor, "n 3 h w"]) -> Posterior:
        """The posterior of patches, each channel normalised."""
        latent, (mean, std) = self.vae.encode(images).latent_dist, self._scale()
        patches = pixel_unshuffle(precise(latent.mean), PATCH)
        return Posterior((patches - mean) / std, pixel_unshuffle(precise(latent.std), PATCH) / std)

    def from_latents(self, latents: Float[Tensor, "n c h w"]) -> Tensor:
        """What the autoencoder's decoder makes of patches."""
        mean, std = self._scale()
        pictures: Tensor = self.vae.decode(pixel_shuffle(latents * std + mean, PATCH)).sample
        return pictures

    def _scale(self) -> tuple[Tensor, Tensor]:
        norm, epsilon = self.vae.bn, self.vae.config.batch_norm_eps
        return norm.running_mean.view(1, -1, 1, 1), (norm.running_var + epsilon).sqrt().view(1, -1, 1, 1)

    def encode_text(self, prompts: list[str]) -> Conditioning:
        """Three layers' hidden states side by side."""
        sequence, _ = self.pipeline(self.scheduler).encode_prompt(list(prompts), device=self.device)
        return Conditioning((sequence,))

    def denoise(
        self, noisy: Float[Tensor, "n c h w"], times: Shaped[Tensor, " n"], conditioning: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """Noise less latents."""
        (sequence,), (n, _, height, width) = conditioning, noisy.shape
        one, rows, columns, words = (
            torch.arange(count, device=noisy.device) for count in (1, height, width, sequence.shape[1])
        )
        predicted: Tensor = self.transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=times / 1000,
            encoder_hidden_states=sequence,
            txt_ids=torch.cartesian_prod(one, one, one, words).expand(n, -1, -1),
            img_ids=torch.cartesian_prod(one, rows, columns, one).expand(n, -1, -1),
            guidance=None,
        ).sample
        return predicted.transpose(1, 2).reshape(noisy.shape)

    def unpack(self, packed: Tensor, like: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The pipeline takes latents as they are, and gives them as the autoencoder has them."""
        mean, std = self._scale()
        return (pixel_unshuffle(packed, PATCH) - mean) / std
