"""The architectures of base models that people fine-tune today, as literals of their published config files.

The numbers are those of ``config.json`` in each model's folder on the hub, where the defaults of diffusers' and
transformers' classes say something else; checked are the parameters that they make, which are published, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from benchmarks.stable_diffusion import STABLE_DIFFUSION_15

CLIP_L = (CLIPTextModel, CLIPTextConfig(**STABLE_DIFFUSION_15.text_encoder))
BIG_G = (
    CLIPTextModelWithProjection,
    CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    ),
)
T5_XXL = (
    T5EncoderModel,
    T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    ),
)
QWEN3_4B = (
    Qwen3ForCausalLM,
    Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
)
QWEN3_8B = (
    Qwen3ForCausalLM,
    Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ),
)
QWEN2_5_VL_7B = (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        tie_word_embeddings=False,
    ),
)
GEMMA2_2B = (
    Gemma2Model,
    Gemma2Config(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    ),
)

KL = {  # of AutoencoderKL
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
DDPM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class BaseModel:
    """A base model's shape.

    Args:
        pipeline: the name of its official pipeline, which tells its family.
        denoiser: of the denoiser's config, what is not its class's default.
        vae: of the autoencoder's, likewise.
        texts: class and config of each text encoder.
        told: shapes of the parts of a prompt's conditioning, without the axis of prompts; integers are a mask's length.
        parameters: millions of the denoiser and of the autoencoder, as published.
        scheduler: of the scheduler's config, likewise.
    """

    pipeline: str
    denoiser: dict[str, Any]
    vae: dict[str, Any]
    texts: tuple[tuple[Any, Any], ...]
    told: tuple[tuple[int, ...] | int, ...]
    parameters: tuple[int, int]
    scheduler: dict[str, Any]


SD3_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
SD3_TEXTS = ((CLIPTextModelWithProjection, CLIP_L[1]), BIG_G, T5_XXL)
SD3_TOLD = ((154, 4096), (2048,))
SD3_VAE = {**KL, "scaling_factor": 1.5305, "shift_factor": 0.0609}
SD35 = {**SD3_MEDIUM, "qk_norm": "rms_norm"}

BASE_MODELS = {
    "SD 1.5": BaseModel(
        "StableDiffusionPipeline",
        STABLE_DIFFUSION_15.unet,
        STABLE_DIFFUSION_15.vae,
        (CLIP_L,),
        ((77, 768),),
        (860, 84),
        DDPM,
    ),
    "SDXL": BaseModel(
        "StableDiffusionXLPipeline",
        {
            "sample_size": 128,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        {**STABLE_DIFFUSION_15.vae, "sample_size": 1024, "scaling_factor": 0.13025},
        (CLIP_L, BIG_G),
        ((77, 2048), (1280,)),
        (2567, 84),
        DDPM,
    ),
    "SD3 medium": BaseModel("StableDiffusion3Pipeline", SD3_MEDIUM, SD3_VAE, SD3_TEXTS, SD3_TOLD, (2028, 84), {}),
    "SD3.5 medium": BaseModel(
        "StableDiffusion3Pipeline",
        {**SD35, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13))},
        SD3_VAE,
        SD3_TEXTS,
        SD3_TOLD,
        (2243, 84),
        {},
    ),
    "SD3.5 large": BaseModel(
        "StableDiffusion3Pipeline",
        {**SD35, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432},
        SD3_VAE,
        SD3_TEXTS,
        SD3_TOLD,
        (8057, 84),
        {},
    ),
    "FLUX.1 dev": BaseModel(
        "FluxPipeline",
        {"guidance_embeds": True},
        KL,
        (CLIP_L, T5_XXL),
        ((512, 4096), (768,)),
        (11901, 84),
        {},
    ),
    "FLUX.2 klein 4B": BaseModel(
        "Flux2KleinPipeline",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        {},
        (QWEN3_4B,),
        ((512, 7680),),
        (3876, 84),
        {},
    ),
    "FLUX.2 klein 9B": BaseModel(
        "Flux2KleinPipeline",
        {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
        {},
        (QWEN3_8B,),
        ((512, 12288),),
        (9079, 84),
        {},
    ),
    "Z-Image": BaseModel("ZImagePipeline", {}, KL, (QWEN3_4B,), ((32, 2560),), (6155, 84), {}),
    "Qwen-Image": BaseModel("QwenImagePipeline", {}, {}, (QWEN2_5_VL_7B,), ((32, 3584),), (20430, 127), {}),
    "Sana 1.6B": BaseModel(
        "SanaPipeline",
        {},
        {
            "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
            "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
            "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
            "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        },
        (GEMMA2_2B,),
        ((300, 2304), 300),
        (1604, 312),
        {},
    ),
    "Lumina2": BaseModel(
        "Lumina2Pipeline", {"cap_feat_dim": 2304}, KL, (GEMMA2_2B,), ((256, 2304), 256), (2610, 84), {}
    ),
}
