"""Finding a base model by name and loading it: the embedded one, a folder in diffusers layout, or a hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers.utils import logging as transformers_logging

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.families.stable_diffusion import FAMILY, NETWORKS, OTHERS, PARTS, StableDiffusion
from antidreambooth.diffusion.precision import made_on_cpu
from antidreambooth.errors import InputError

EMBEDDED = Path(__file__).parent.parent / "models" / "embedded"


def locate(name: str) -> str | Path:
    """The embedded model's or a given folder as a path, anything that has the form of a hub id as it is.

    Raises:
        InputError: neither a folder that holds all components nor a hub id.
    """
    folder = EMBEDDED if name == "embedded" else Path(name).expanduser()
    if folder.is_dir():
        missing = [f"{part}/{file}" for part, file in PARTS.items() if not (folder / part / file).is_file()]
        if missing:
            raise InputError(
                f"the backbone folder {name} lacks {', '.join(missing)}: it must hold a {FAMILY} "
                f"model in diffusers layout ({', '.join(f'{part}/' for part in PARTS)})"
            )
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return name
    raise InputError(f"the backbone {name!r} is no folder here and no hub id (owner/name); 'embedded' always works")


def load_backbone(name: str, revision: str | None = None, variant: str | None = None) -> Backbone:
    """Loads a base model's components in fp32 onto the CPU, from safetensors only.

    Args:
        name: ``embedded``, a folder in diffusers layout, or a hub id (downloaded once, then cached).
        revision: branch, tag or commit on the hub.
        variant: weights variant such as ``fp16`` (loaded into fp32 all the same).

    Raises:
        InputError: a component is missing, is no Stable Diffusion 1.x / 2.x, or the hub cannot be reached.
    """
    source = locate(name)
    where: dict[str, Any] = {"revision": revision, "local_files_only": isinstance(source, Path)}
    weights = {**where, "variant": variant, "use_safetensors": True}

    def load(component: Any, part: str, **kwargs: Any) -> Any:
        with _named_errors(name, part), quiet():
            return component.from_pretrained(source, subfolder=part, **kwargs)

    dtypes = {part: "dtype" if part == "text_encoder" else "torch_dtype" for part in NETWORKS}
    with made_on_cpu():
        parts = {part: load(kind, part, **{dtypes[part]: torch.float32}, **weights) for part, kind in NETWORKS.items()}
        parts |= {part: load(kind, part, **where) for part, kind in OTHERS.items()}
        backbone = StableDiffusion(**parts, defaults=read_defaults(name))
    backbone.check(name)
    for parameter in backbone.parameters():
        # Out of the memory-mapped file: its tensors lie at any byte, and matrix products round by alignment.
        parameter.data = parameter.data.clone()
    return backbone


def read_defaults(name: str) -> Defaults:
    """What the base model wants where the user says nothing, without loading it."""
    source = locate(name)
    return Defaults.read(source) if isinstance(source, Path) else Defaults()


def resolution_of(name: str, revision: str | None = None) -> int:
    """The side of the square images that a base model was made for, in pixels; reads two small JSON files only."""
    source = locate(name)

    def config(part: str) -> dict[str, Any]:
        with _named_errors(name, part):
            if isinstance(source, Path):
                file = str(source / part / "config.json")
            else:
                file = hf_hub_download(source, f"{part}/config.json", revision=revision)
            values: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
            return values

    return int(config("unet")["sample_size"] * 2 ** (len(config("vae")["block_out_channels"]) - 1))


@contextmanager
def _named_errors(name: str, part: str) -> Iterator[None]:
    """Turns whatever loading a component raises into one message with the fix."""
    try:
        yield
    # The hub's client, diffusers, transformers and safetensors raise unrelated types for a missing file, a dead
    # network, a gated model or a damaged download.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = (
            f"it must hold {part}/ with safetensors weights"
            if Path(name).expanduser().is_dir()
            else f"check the name, the network and (for a gated model) `hf auth login`; or run "
            f"`hf download {name} --include '*/*.json' '*/*.txt' '*/*.safetensors' --local-dir FOLDER` "
            f"where there is a network, copy FOLDER here and pass --model.backbone FOLDER"
        )
        raise InputError(f"the backbone {name} cannot be loaded: {part}: {reason.rstrip('.')}; {fix}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar of a library while weights are read or written (a second or two)."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
