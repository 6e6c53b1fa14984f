"""Qwen-Image: one Qwen2.5-VL text encoder, a video autoencoder, packed latents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.configs import Configs, Pair
from antidreambooth.diffusion.defaults import Defaults, Recipe
from antidreambooth.diffusion.families.flux import PATCH, pack, unpack
from antidreambooth.diffusion.precision import precise


class QwenImage(Backbone):
    """Qwen-Image (arXiv:2508.02324).

    Args:
        parts: see ``Backbone``.
    """

    family = "Qwen-Image"
    official = QwenImagePipeline
    networks: ClassVar[Mapping[str, Any]] = {
        "transformer": QwenImageTransformer2DModel,
        "vae": AutoencoderKLQwenImage,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
    }
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": Qwen2Tokenizer}
    arguments = ("prompt_embeds", "prompt_embeds_mask")
    guidance = ("true_cfg_scale", 1.0)  # of no effect without a negative prompt; guidance_scale has none at all
    text_layers = r".*\.attn\.add_[kv]_proj"
    # diffusers' examples/dreambooth/README_qwen.md; the pipeline's own sampling.
    published = Defaults(
        surrogate=Recipe(2e-4, 1, 3, False, 1e-4),
        full=Recipe(2e-4, 1, 500, False, 1e-4),
        lora=Recipe(2e-4, 1, 500, False, 1e-4),
        guidance_scale=4.0,
        sampling_steps=50,
        resolution=512,
    )

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        for name in ("latents_mean", "latents_std"):  # on the device with the model, rather than sent there every time
            values = torch.tensor(self.vae.config[name], dtype=torch.float32, device="cpu").view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @classmethod
    def fits(cls, configs: Configs) -> Iterable[Pair]:
        """Channels of packed latents, width of texts."""
        transformer, texts = configs["transformer"], configs["text_encoder"]["hidden_size"]
        yield (
            "transformer/ for tokens",
            transformer["in_channels"],
            "vae/ for tokens",
            PATCH**2 * configs["vae"]["z_dim"],
        )
        yield "transformer/ for texts", transformer["joint_attention_dim"], "text_encoder/", texts

    @classmethod
    def shrinkage(cls, configs: Configs) -> int:
        """Pixels of a picture per latent, along one side."""
        return int(2 ** len(configs["vae"]["temperal_downsample"]))

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.z_dim)

    @property
    def downscale(self) -> int:
        """Pixels of an image per latent, along one side."""
        return int(2 ** len(self.vae.temperal_downsample))

    def to_latents(self, images: Float[Tensor, "n 3 h w"]) -> Posterior:
        """The posterior of latents, each channel normalised."""
        latent = self.vae.encode(images.unsqueeze(2)).latent_dist  # one frame
        mean, std = precise(latent.mean).squeeze(2), precise(latent.std).squeeze(2)
        return Posterior((mean - self.latents_mean) / self.latents_std, std / self.latents_std)

    def from_latents(self, latents: Float[Tensor, "n c h w"]) -> Tensor:
        """What the autoencoder's decoder makes of latents."""
        latents = latents * self.latents_std + self.latents_mean
        pictures: Tensor = self.vae.decode(latents.unsqueeze(2)).sample.squeeze(2)
        return pictures

    def encode_text(self, prompts: list[str]) -> Conditioning:
        """The last hidden states and, where a prompt is padded, which of them are words."""
        sequence, mask = self.pipeline(self.scheduler).encode_prompt(list(prompts), device=self.device)
        return Conditioning((sequence,) if mask is None else (sequence, mask.bool()))

    def given(self, conditioning: Conditioning, prefix: str = "") -> dict[str, Any]:
        """Conditioning as arguments of the pipeline, which wants a mask where nothing is padded, too."""
        sequence, *masks = conditioning
        whole = Conditioning((sequence, masks[0] if masks else sequence.new_ones(sequence.shape[:2]).bool()))
        return super().given(whole, prefix)

    def denoise(
        self, noisy: Float[Tensor, "n c h w"], times: Shaped[Tensor, " n"], conditioning: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """Noise less latents."""
        sequence, *masks = conditioning
        height, width = (side // PATCH for side in noisy.shape[-2:])
        predicted: Tensor = self.transformer(
            hidden_states=self.pack(noisy),
            encoder_hidden_states=sequence,
            encoder_hidden_states_mask=masks[0] if masks else None,
            timestep=times / 1000,
            img_shapes=[[(1, height, width)]] * len(noisy),
        ).sample
        return self.unpack(predicted, noisy)

    def pack(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens width"]:
        """2 x 2 latents to a token."""
        return pack(latents)

    def unpack(self, packed: Tensor, like: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Latents out of tokens."""
        return unpack(packed, like)
