"""Tiny models in one file, under the names that the models' own authors gave: what converters of diffusers read.

The names are those of the published files of Stable Diffusion 1.x (``cond_stage_model``), of XL (``conditioner``), of
Stable Diffusion 3 with text encoders, and of Z-Image as ComfyUI keeps it. diffusers' converter for FLUX.1 knows the
published width only (3072), so a tiny FLUX.1 cannot be in its authors' layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
RESNET = {  # in the U-Net
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {  # of the U-Net's blocks
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # in the autoencoder
SD3_BLOCK = {  # pairs of the transformer's names; what is side by side in the authors' file is a tuple
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "attn.to_q attn.to_k attn.to_v": "x_block.attn.qkv",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "context_block.attn.qkv",
    "attn2.to_q attn2.to_k attn2.to_v": "x_block.attn2.qkv",
}
SD3_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def unet(network: Any) -> State:
    """Blocks are numbered through; each holds a resnet (0), then perhaps an attention (1), then a change of size."""
    per, last = network.config.layers_per_block + 1, network.config.layers_per_block
    attending = ["CrossAttn" in kind for kind in network.config.up_block_types]

    def renamed(name: str) -> str:
        for ours, theirs in OUTSIDE.items():
            if name.startswith(f"{ours}."):
                return theirs + name.removeprefix(ours)
        if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
            number = 2 * int(found[2]) if found[1] == "resnets" else 1
            return f"middle_block.{number}.{inside(found[1], found[3])}"
        found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|\w+samplers)\.(\d)\.(.*)", name)
        assert found, name
        down, level, kind, layer, rest = found[1] == "down", int(found[2]), found[3], int(found[4]), found[5]
        if kind.endswith("samplers"):
            layer = last
        place = f"input_blocks.{1 + level * per + layer}" if down else f"output_blocks.{level * per + layer}"
        if kind == "downsamplers":
            return f"{place}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            return f"{place}.{2 if attending[level] else 1}.{rest}"
        return f"{place}.{0 if kind == 'resnets' else 1}.{inside(kind, rest)}"

    def inside(kind: str, rest: str) -> str:
        first, _, more = rest.partition(".")
        return f"{RESNET[first]}.{more}" if kind == "resnets" else rest

    return {f"model.diffusion_model.{renamed(name)}": values for name, values in network.state_dict().items()}


def vae(network: Any, prefix: str = "first_stage_model.") -> State:
    """The decoder's levels count from the other end; its attention is made of convolutions."""
    levels, state = len(network.config.block_out_channels), {}
    for name, values in network.state_dict().items():
        new = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", new):
            new = f"{found[1]}.mid.attn_1.{ATTENTION[found[2]]}.{found[3]}"
            values = values[:, :, None, None] if values.ndim == 2 else values
        state[prefix + new] = values
    return state


def clip(network: Any, prefix: str) -> State:
    """As transformers had it when the files were written: everything but the projection in ``text_model``."""
    plain = {name.removeprefix("text_model."): values for name, values in network.state_dict().items()}
    inner = "text_model."
    return {prefix + (name if name.startswith("text_projection") else inner + name): v for name, v in plain.items()}


def open_clip(network: Any, prefix: str) -> State:
    """Query, key and value are one matrix, the projection stands the other way."""
    state: State = {}
    for name, values in network.state_dict().items():
        new = name.removeprefix("text_model.")
        new = new.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
        new = new.replace("embeddings.position_embedding.weight", "positional_embedding")
        new = new.replace("encoder.layers.", "transformer.resblocks.").replace("self_attn", "attn")
        new = new.replace("layer_norm", "ln_").replace("fc1", "c_fc").replace("fc2", "c_proj")
        if new == "text_projection.weight":
            new, values = "text_projection", values.T
        if found := re.fullmatch(r"(.*)\.([qkv])_proj\.(weight|bias)", new):
            if found[2] != "q":
                continue
            parts = [network.state_dict()[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            new, values = f"{found[1]}.in_proj_{found[3]}", torch.cat(parts)
        state[prefix + new] = values
    return state


def sd3_transformer(network: Any) -> State:
    """The last block's and the end's modulations are in another order."""
    ours, state, last = network.state_dict(), {}, network.config.num_layers - 1
    state["pos_embed"] = ours["pos_embed.pos_embed"]

    def put(names: str, new: str, swapped: bool) -> None:
        for kind in ("weight", "bias"):
            parts = [ours[f"{name}.{kind}"] for name in names.split() if f"{name}.{kind}" in ours]
            if parts:
                whole = torch.cat(parts)
                state[f"{new}.{kind}"] = torch.cat(whole.chunk(2)[::-1]) if swapped else whole

    for name, new in SD3_OUTSIDE.items():
        put(name, new, swapped=name == "norm_out.linear")
    for block in range(last + 1):
        for names, new in SD3_BLOCK.items():
            full = " ".join(f"transformer_blocks.{block}.{name}" for name in names.split())
            put(full, f"joint_blocks.{block}.{new}", swapped=block == last and names == "norm1_context.linear")
    return {f"model.diffusion_model.{name}": values for name, values in state.items()}


def z_image_transformer(network: Any) -> State:
    """Query, key and value are one matrix."""
    ours, state = network.state_dict(), {}
    for name, values in ours.items():
        new = name.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
        new = new.replace("attention.to_out.0.", "attention.out.")
        new = new.replace("attention.norm_q", "attention.q_norm").replace("attention.norm_k", "attention.k_norm")
        if re.search(r"attention\.to_[kv]\.", new):
            continue
        if "attention.to_q." in new:
            parts = [ours[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            new, values = new.replace("to_q", "qkv"), torch.cat(parts)
        state[f"model.diffusion_model.{new}"] = values
    return state


def stable_diffusion(pipeline: Any) -> State:
    """Also what training left behind in the published files."""
    rest = {"betas": torch.zeros(3), "model_ema.decay": torch.tensor(0.9)}
    text = clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    old = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(32)[None]}
    return {**rest, **unet(pipeline.unet), **vae(pipeline.vae), **text, **old}


def sdxl(pipeline: Any) -> State:
    """Both text encoders."""
    first = clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
    second = open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    return {**unet(pipeline.unet), **vae(pipeline.vae), **first, **second}


def sd3(pipeline: Any) -> State:
    """All three text encoders; CLIP-L comes without its projection, which is the identity."""
    first = clip(pipeline.text_encoder, "text_encoders.clip_l.transformer.")
    del first["text_encoders.clip_l.transformer.text_projection.weight"]
    second = clip(pipeline.text_encoder_2, "text_encoders.clip_g.transformer.")
    t5 = {f"text_encoders.t5xxl.transformer.{name}": v for name, v in pipeline.text_encoder_3.state_dict().items()}
    return {**sd3_transformer(pipeline.transformer), **vae(pipeline.vae), **first, **second, **t5}


def z_image(pipeline: Any) -> State:
    """With an autoencoder, and with a text encoder that diffusers does not read from there."""
    text = {f"text_encoders.qwen3_4b.transformer.{k}": v for k, v in pipeline.text_encoder.state_dict().items()}
    return {**z_image_transformer(pipeline.transformer), **vae(pipeline.vae, "vae."), **text}


def bare(pipeline: Any) -> State:
    """The transformer alone, under diffusers' names: how fine-tuned ones are shared."""
    return dict(pipeline.transformer.state_dict())


ORIGINAL: dict[str, Callable[[Any], State]] = {  # of the tiny models, by their names
    "sd": stable_diffusion,
    "sd-v": stable_diffusion,
    "sdxl": sdxl,
    "sd3": sd3,
    "z-image": z_image,
    "flux": bare,
    "flux-schnell": bare,
    "flux2-klein": bare,
    "qwen-image": bare,
    "sana": bare,
    "lumina2": bare,
}


def write(name: str, pipeline: Any, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a tiny model's file; gives its path."""
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ORIGINAL[name](pipeline).items()}
    save_file({name: values.contiguous().clone() for name, values in state.items()}, file)
    return file
