"""Loading a base model: from small files and weights to a ``Backbone``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.configs import SCHEDULER, Configs
from antidreambooth.diffusion.integrity import faults
from antidreambooth.diffusion.layout import inspect, read_defaults, read_json, variant_of
from antidreambooth.diffusion.libraries import named_errors, quiet
from antidreambooth.diffusion.precision import made_on_cpu
from antidreambooth.diffusion.single_file import network_in_file
from antidreambooth.diffusion.source import INDEX, Named, Source, locate
from antidreambooth.errors import InputError

LEFT_OVER = re.compile(r"(^|\.)position_ids$|^logit_scale$|^(vision_model|visual_projection)\.|^lm_head\.")
HARMLESS = {  # what files may hold beside a network's weights: the rest of a whole CLIP, positions of old files
    CLIPTextModel: re.compile(rf"{LEFT_OVER.pattern}|^text_projection\."),
    CLIPTextModelWithProjection: LEFT_OVER,
}


def load_backbone(named: Named) -> Backbone:
    """Loads a base model's components in fp32 onto the CPU, from safetensors only.

    Args:
        named: ``embedded``, a folder in diffusers layout, or a hub id (downloaded once, then cached); or a ``Source``,
            which adds a revision, a variant, or to one file the folder of its other components.

    Raises:
        InputError: a component is missing or damaged, the components do not fit each other, the model is of no family
            that is supported, or the hub cannot be reached.
    """
    source = Source.of(named)
    kind, configs, held = inspect(source)
    place = locate(source)
    where: dict[str, Any] = {"revision": source.revision, "local_files_only": isinstance(place, Path)}

    def load(component: Any, part: str, **kwargs: Any) -> Any:
        with named_errors(source, part), quiet():
            return component.from_pretrained(place, subfolder=part, **where, **kwargs)

    weights = load_file(source.file) if source.file else {}

    def network(component: Any, part: str) -> Any:
        if part in held:
            return network_in_file(source, part, component, weights)
        ours = issubclass(component, ModelMixin)  # diffusers': it names a weight of another shape by itself
        how = {"torch_dtype": torch.float32} if ours else {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        files = {"variant": variant_of(source, part, component), "use_safetensors": True}
        made, report = load(component, part, **how, **files, output_loading_info=True)
        if wrong := faults(made.state_dict(), report, HARMLESS.get(component, LEFT_OVER)):
            raise InputError(
                f"the backbone {source} cannot be used: {part}/ {wrong}; its files are damaged or of another model: "
                "download or convert them again"
            )
        return made

    with made_on_cpu():
        parts = {part: load(tokenizer, part) for part, tokenizer in kind.tokenizers.items()}
        parts[SCHEDULER] = load(_scheduler_kind(kind, configs), SCHEDULER)
        _check_tokens(parts, kind, configs, source)
        parts |= {part: network(component, part) for part, component in kind.networks.items()}
        index = read_json(source, INDEX)
        switches = {name: index[name] for name in kind.switches if isinstance(index.get(name), bool)}
        backbone = kind(**parts, **switches, defaults=read_defaults(source))
    for parameter in backbone.parameters():
        # Out of the memory-mapped file: its tensors lie at any byte, and matrix products round by alignment.
        parameter.data = parameter.data.clone()
    return backbone


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
    for part in kind.tokenizers:
        encoder = part.replace("tokenizer", "text_encoder")
        tokens, known = len(parts[part]), configs[encoder]["vocab_size"]
        if tokens > known:
            raise InputError(
                f"the backbone {source} has a {part} of {tokens} tokens and a {encoder} that knows {known}: "
                "they are of different models"
            )
