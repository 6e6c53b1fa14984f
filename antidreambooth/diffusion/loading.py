"""Loading a base model: from small files and weights to a ``Backbone``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import BitsAndBytesConfig, ModelMixin, SchedulerMixin
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.configs import SCHEDULER, Configs
from antidreambooth.diffusion.integrity import faults
from antidreambooth.diffusion.layout import inspect, read_defaults, read_json, variant_of
from antidreambooth.diffusion.libraries import named_errors, quiet
from antidreambooth.diffusion.precision import held_in_bf16, made_on_cpu
from antidreambooth.diffusion.single_file import network_in_file
from antidreambooth.diffusion.source import INDEX, Named, Source, locate
from antidreambooth.errors import InputError

QUANTIZED = ("bitsandbytes", "accelerate")  # packages that weights of 4 bits need
NF4 = {  # https://huggingface.co/docs/diffusers/quantization/bitsandbytes
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
LEFT_OVER = re.compile(r"(^|\.)position_ids$|^logit_scale$|^(vision_model|visual_projection)\.|^lm_head\.")
HARMLESS = {  # what files may hold beside a network's weights: the rest of a whole CLIP, positions of old files
    CLIPTextModel: re.compile(rf"{LEFT_OVER.pattern}|^text_projection\."),
    CLIPTextModelWithProjection: LEFT_OVER,
}


def load_backbone(named: Named, encoder_only: bool = False) -> Backbone:
    """Loads a base model's components onto the CPU, from safetensors only.

    In fp32, or as ``Source.frozen_weights`` says: with bf16 denoiser and text encoders are read in bf16, and what
    autocast does not round is brought to fp32 again; of nf4 the denoiser is on the GPU from the start. The autoencoder
    is fp32 in any case, since pictures are decoded in it.

    Args:
        named: ``embedded``, a folder in diffusers layout, or a hub id (downloaded once, then cached); or a ``Source``,
            which adds a revision, a variant, or to one file the folder of its other components.
        encoder_only: whether the autoencoder is all that is loaded, which encodes and decodes; no denoiser and no text
            encoder takes time or memory then, and the fingerprint is of the autoencoder.

    Raises:
        InputError: a component is missing or damaged, the components do not fit each other, the model is of no family
            that is supported, the hub cannot be reached, or weights of 4 bits do not work here.
    """
    source = Source.of(named)
    if source.frozen_weights == "nf4" and not encoder_only:
        require_four_bits(source)
    kind, configs, held = inspect(source)
    place = locate(source)
    where: dict[str, Any] = {"revision": source.revision, "local_files_only": isinstance(place, Path)}

    def load(component: Any, part: str, **kwargs: Any) -> Any:
        with named_errors(source, part), quiet():
            return component.from_pretrained(place, subfolder=part, **where, **kwargs)

    weights = load_file(source.file) if source.file else {}

    def network(component: Any, part: str) -> Any:
        low = source.frozen_weights != "fp32" and part != "vae"
        if part in held:
            made = network_in_file(source, part, component, weights)
            if low:
                held_in_bf16(made)
            return made
        ours = issubclass(component, ModelMixin)  # diffusers': it names a weight of another shape by itself
        dtype = torch.bfloat16 if low else torch.float32
        how: dict[str, Any] = {"torch_dtype": dtype} if ours else {"dtype": dtype, "ignore_mismatched_sizes": True}
        if source.frozen_weights == "nf4" and part == kind.denoiser_name():
            how["quantization_config"] = BitsAndBytesConfig(**NF4)
        files = {"variant": variant_of(source, part, component), "use_safetensors": True}
        made, report = load(component, part, **how, **files, output_loading_info=True)
        if wrong := faults(made.state_dict(), report, HARMLESS.get(component, LEFT_OVER)):
            raise InputError(
                f"the backbone {source} cannot be used: {part}/ {wrong}; its files are damaged or of another model: "
                "download or convert them again"
            )
        if low:
            held_in_bf16(made)
        return made

    with made_on_cpu():
        tokenizers = {} if encoder_only else kind.tokenizers
        parts = {part: load(tokenizer, part) for part, tokenizer in tokenizers.items()}
        parts[SCHEDULER] = load(_scheduler_kind(kind, configs), SCHEDULER)
        _check_tokens(parts, kind, configs, source)
        networks = {part: made for part, made in kind.networks.items() if part == "vae" or not encoder_only}
        parts |= {part: network(component, part) for part, component in networks.items()}
        index = read_json(source, INDEX)
        switches = {name: index[name] for name in kind.switches if isinstance(index.get(name), bool)}
        backbone = kind(**parts, **switches, defaults=read_defaults(source))
    for parameter in backbone.parameters():
        if parameter.device.type != "cpu":  # of 4 bits
            continue
        # Out of the memory-mapped file: its tensors lie at any byte, and matrix products round by alignment.
        parameter.data = parameter.data.clone()
    return backbone


def require_four_bits(source: Source) -> None:
    """Refuses weights of 4 bits where they do not work.

    Raises:
        InputError: the model is one file, there is no CUDA, or a package is missing.
    """
    other = "use frozen_weights bf16 instead"
    if source.file:
        raise InputError(f"frozen_weights nf4 reads folders and hub ids, and {source.name} is one file: {other}")
    if not torch.cuda.is_available():
        raise InputError(f"frozen_weights nf4 works on an NVIDIA GPU only: {other}")
    if missing := [name for name in QUANTIZED if find_spec(name) is None]:
        raise InputError(
            f"frozen_weights nf4 needs {' and '.join(missing)}: pip install 'antidreambooth[quantized]', or {other}"
        )


def _scheduler_kind(kind: type[Backbone], configs: Configs) -> Any:
    """The class of the scheduler: the family's or, where it leaves that open, the one that the model's folder names."""
    if (own := kind.scheduler_kind(configs[SCHEDULER])) is not None:
        return own
    found = getattr(diffusers, str(configs[SCHEDULER].get("_class_name")), None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise InputError(f"scheduler_config.json names a scheduler that there is not: {configs[SCHEDULER]}")
    return found


def _check_tokens(parts: Mapping[str, Any], kind: type[Backbone], configs: Configs, source: Source) -> None:
    """Refuses a tokenizer with tokens that its text encoder has no embedding for."""
    for part in kind.tokenizers.keys() & parts.keys():
        encoder = part.replace("tokenizer", "text_encoder")
        tokens, known = len(parts[part]), configs[encoder]["vocab_size"]
        if tokens > known:
            raise InputError(
                f"the backbone {source} has a {part} of {tokens} tokens and a {encoder} that knows {known}: "
                "they are of different models"
            )
