"""A tiny random model of each family of base models, made anew: an official pipeline of diffusers, for small pictures.

``python -m tests.families.tiny NAME FOLDER`` writes one in diffusers layout. What differs between models of a family
(widths, layers, tokens) is small here. What the family's code relies on is as in the published models: the classes, the
constants of autoencoders and schedulers, and the layers of a text encoder that the pipeline reads.
"""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIDE = 32  # pixels of the pictures that each model is made for: the least that Sana's pipeline takes
OFTEN = ("sdxl", "flux", "sana")  # two text encoders; a flow; an autoencoder without spread
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CHATS = (  # a chat template with what the pipelines ask for: a generation prompt, thoughts that are closed at once
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
CLIP_LENGTH = 32  # tokens


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Letters, each with and without the end of a word."""
    letters = "!.,-" + string.ascii_lowercase + string.digits
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab=numbered(pieces), merges=[], pad_token=pad, model_max_length=CLIP_LENGTH)


def clip(width: int, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder of three layers, so that the last but one is not the first."""
    tokens = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=width,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5_tokenizer() -> T5Tokenizer:
    """Small letters with their scores."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*pieces, *((letter, -3.0) for letter in string.ascii_lowercase)], extra_ids=0)


def t5(width: int) -> T5EncoderModel:
    """Of two layers."""
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes."""
    pieces = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab=numbered(pieces), merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": pieces[-2:]})
    tokenizer.chat_template = CHATS
    return tokenizer


def qwen3_config(layers: int) -> Qwen3Config:
    """For the bytes of ``qwen_tokenizer``."""
    return Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def gemma_tokenizer() -> GemmaTokenizer:
    """Letters, large and small."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_letters, *string.digits, *"<>.,-"]
    return GemmaTokenizer(vocab=numbered(pieces), merges=[])


def gemma(width: int) -> Gemma2Model:
    """Of two layers."""
    config = Gemma2Config(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=512,
    )
    return Gemma2Model(config)


def numbered(pieces: list[str]) -> dict[str, int]:
    """A vocabulary."""
    return {piece: number for number, piece in enumerate(pieces)}


def autoencoder(channels: int, kind: Any = AutoencoderKL, **constants: Any) -> Any:
    """Four pixels a latent, along a side; published ones have eight, which no code should take for granted."""
    return kind(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=SIDE,
        **constants,
    )


def newer_autoencoder(scale: float, shift: float) -> AutoencoderKL:
    """Sixteen channels, with a shift and without a convolution around the latents."""
    return autoencoder(
        16, scaling_factor=scale, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False, force_upcast=True
    )


def stable_diffusion(prediction: str) -> StableDiffusionPipeline:
    """The schedulers are those of 1.5 (whose config file has a key that its class does not know) and of 2.1."""
    if prediction == "epsilon":
        scheduler = PNDMScheduler.from_config({**BETAS, "skip_prk_steps": True, "clip_sample": False})
    else:
        scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        vae=autoencoder(4, scaling_factor=0.18215),
        text_encoder=clip(16),
        tokenizer=clip_tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """The text encoders have different widths, so that they cannot be mistaken."""
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=24,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        vae=autoencoder(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(16, projected=True),
        tokenizer_2=clip_tokenizer("!"),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
    )


def sd3() -> StableDiffusion3Pipeline:
    """Both CLIPs together are narrower than T5, as they are in the published ones."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        vae=newer_autoencoder(1.5305, 0.0609),
        text_encoder=clip(8, projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(16, projected=True),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5(32),
        tokenizer_3=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(distilled: bool) -> FluxPipeline:
    """Dev has guidance as an input and a shift by the picture's size; schnell, which is distilled, neither."""
    dynamic = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 2, 2),
            guidance_embeds=not distilled,
        ),
        vae=newer_autoencoder(0.3611, 0.1159),
        text_encoder=clip(8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(16),
        tokenizer_2=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**({} if distilled else dynamic)),
    )


def flux2_klein() -> Flux2KleinPipeline:
    """The text encoder has as many layers as the published ones, of which the pipeline reads the 9th, 18th and 27th."""
    vae = autoencoder(4, AutoencoderKLFlux2)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(qwen3_config(36)),
        tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def z_image() -> ZImagePipeline:
    """The class leaves its padding tokens uninitialised."""
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[1024, 32, 32],
    )
    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return ZImagePipeline(
        transformer=transformer,
        vae=newer_autoencoder(0.3611, 0.1159),
        text_encoder=Qwen3Model(qwen3_config(2)),
        tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def qwen_image() -> QwenImagePipeline:
    """The text encoder could look at pictures, and the autoencoder at videos."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "rope_parameters": rope,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    tokens = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 1.5, 0.7],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        ),
        tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    )


def sana() -> SanaPipeline:
    """The autoencoder is deterministic; the scheduler's file is a DPM solver's, whose shift has a name of its own."""
    blocks = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8, 8),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), (5,)),
        }.items()
    }
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=8,
        ),
        vae=AutoencoderDC(
            latent_channels=8,
            attention_head_dim=4,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
            **blocks,
        ),
        text_encoder=gemma(8),
        tokenizer=gemma_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", solver_order=2
        ),
    )


def lumina2() -> Lumina2Pipeline:
    """The prompt comes after a system prompt of a hundred and fifty letters."""
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=[4, 2, 2],
            axes_lens=[300, 32, 32],
            cap_feat_dim=8,
        ),
        vae=newer_autoencoder(0.3611, 0.1159),
        text_encoder=gemma(8),
        tokenizer=gemma_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


TINY: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": partial(stable_diffusion, "epsilon"),
    "sd-v": partial(stable_diffusion, "v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": partial(flux, distilled=False),
    "flux-schnell": partial(flux, distilled=True),
    "flux2-klein": flux2_klein,
    "z-image": z_image,
    "qwen-image": qwen_image,
    "sana": sana,
    "lumina2": lumina2,
}
GUIDANCE = {"flux-schnell": 0.0}  # by default; what the others' is


def build(name: str, seed: int = 0) -> DiffusionPipeline:
    """A tiny model of a family, whose weights follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TINY[name]()


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Writes a tiny model in diffusers layout, with what it wants where the user says nothing; gives the folder."""
    build(name, seed).save_pretrained(folder)
    recipe = {"learning_rate": 1e-3, "batch_size": 1, "steps": 2, "train_text_encoder": name in ("sd", "sd-v")}
    frozen = {**recipe, "train_text_encoder": False}
    defaults = {
        "surrogate": recipe,
        "full": recipe,
        "lora": {**frozen, "learning_rate": 1e-2},
        "textual_inversion": {**frozen, "learning_rate": 1e-2},
        "guidance_scale": GUIDANCE.get(name, 3.0),
        "sampling_steps": 2,
        "resolution": SIDE,
    }
    (folder / "antidreambooth.json").write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
    return folder


def often(rows: Iterable[Any]) -> list[Any]:
    """Parameters, each beginning with a family: all tests hold those of ``OFTEN``, ``-m thorough`` the rest."""
    seldom = [pytest.mark.slow, pytest.mark.thorough]
    named = [(row if isinstance(row, str) else row[0], row) for row in rows]
    return [pytest.param(row, marks=[] if name in OFTEN else seldom) for name, row in named]


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
