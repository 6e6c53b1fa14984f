"""Stable Diffusion 1.5's architecture without its weights, and one of the same kind that runs anywhere in no time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.families.stable_diffusion import StableDiffusion
from antidreambooth.diffusion.source import EMBEDDED

LENGTH = 77  # of a prompt, in tokens


@dataclass(frozen=True)
class Architecture:
    """What the components are built from: the dictionaries are those of their ``config.json``.

    Args:
        unet: of ``UNet2DConditionModel``.
        vae: of ``AutoencoderKL``.
        text_encoder: of ``CLIPTextModel``.
        parameters: of the U-Net, the VAE and the text encoder; checked where given.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    parameters: tuple[int, int, int] | None = None

    @property
    def resolution(self) -> int:
        """Side of its images, in pixels."""
        return int(self.vae["sample_size"])


STABLE_DIFFUSION_15 = Architecture(
    unet={
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # the number of heads: diffusers' name for it
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
    },
    vae={
        "sample_size": 512,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "scaling_factor": 0.18215,
    },
    text_encoder={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": LENGTH,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    parameters=(859_520_964, 83_653_863, 123_060_480),
)

TINY = Architecture(
    unet={
        **STABLE_DIFFUSION_15.unet,
        "sample_size": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    vae={
        **STABLE_DIFFUSION_15.vae,
        "sample_size": 16,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    text_encoder={
        **STABLE_DIFFUSION_15.text_encoder,
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 32,
        "projection_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
)

NARROW = Architecture(  # a tenth as wide, at 128 pixels
    unet={**STABLE_DIFFUSION_15.unet, "sample_size": 16, "block_out_channels": [32, 64, 128, 128]},
    vae={
        **STABLE_DIFFUSION_15.vae,
        "sample_size": 128,
        "block_out_channels": [16, 32, 64, 64],
        "norm_num_groups": 16,
    },
    text_encoder={**STABLE_DIFFUSION_15.text_encoder, "vocab_size": 4096},
)

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
}


def build(architecture: Architecture, device: str | torch.device = "cpu") -> Backbone:
    """A backbone with random weights, which cost what trained ones cost.

    Inside ``FakeTensorMode``, or on the ``meta`` device, it has shapes only and takes no memory.

    Args:
        architecture: what to build.
        device: where.
    """
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(architecture.unet)
        vae = AutoencoderKL.from_config(architecture.vae)
        text_encoder = CLIPTextModel(CLIPTextConfig(**architecture.text_encoder))
    # The embedded model's words: fewer, but a prompt costs the same whatever it says.
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", model_max_length=LENGTH)
    scheduler = DDPMScheduler.from_config(SCHEDULER)
    backbone = StableDiffusion(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
    backbone.noising.to(device)
    if architecture.parameters:
        assert counts(backbone) == architecture.parameters, counts(backbone)
    return backbone


def counts(backbone: Backbone) -> tuple[int, int, int]:
    """Parameters of the U-Net, the VAE and the text encoder."""
    unet, vae, text_encoder = (size(part) for part in (backbone.unet, backbone.vae, backbone.text_encoder))
    return unet, vae, text_encoder


def size(module: nn.Module) -> int:
    """A module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
