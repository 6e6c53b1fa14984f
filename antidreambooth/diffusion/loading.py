"""Finding a base model by name and loading it: the embedded one, a folder in diffusers layout, or a hub id."""

from __future__ import annotations

import errno
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.families.stable_diffusion import FAMILY, NETWORKS, OTHERS, PARTS, StableDiffusion
from antidreambooth.diffusion.precision import made_on_cpu
from antidreambooth.errors import InputError, causes, first_line

EMBEDDED = Path(__file__).parent.parent / "models" / "embedded"
LOADING: tuple[type[BaseException], ...] = (  # what diffusers and transformers raise for a model that they cannot load
    OSError,  # a file is missing, unreadable or no JSON; the network is dead; the cache cannot be written
    ValueError,  # weights of other shapes than the config's; a config of no network; a tokenizer that is no JSON
    SafetensorError,  # weights are cut or something else
    StrictDataclassError,  # values in a config of transformers
    *HfHubHTTPError.__bases__,  # whatever HTTP client the hub's library uses: a download that breaks off
)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


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
        with _named_errors(name, part, revision, variant), quiet():
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
        with _named_errors(name, part, revision):
            if isinstance(source, Path):
                file = str(source / part / "config.json")
            else:
                file = hf_hub_download(source, f"{part}/config.json", revision=revision)
            values: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
            return values

    return int(config("unet")["sample_size"] * 2 ** (len(config("vae")["block_out_channels"]) - 1))


def download_command(name: str, revision: str | None = None, variant: str | None = None) -> str:
    """The shell command that puts what is read of a hub's model into a folder, for a machine without a network.

    Args:
        name: hub id.
        revision: branch, tag or commit.
        variant: of the weights; the files of all others are left out.
    """
    patterns = [f"*/*.{variant}*.safetensors"] if variant else ["*/*.safetensors"]
    others = [] if variant else ["*/*.*.safetensors"]  # fp16, non_ema and the like
    words = [
        *(word for pattern in ["*/*.json", "*/*.txt", *patterns] for word in ("--include", pattern)),
        *(word for pattern in [*others, "safety_checker/*"] for word in ("--exclude", pattern)),
        *(["--revision", revision] if revision else []),
    ]
    return f"hf download {name} {shlex.join(words)} --local-dir FOLDER"


def bytes_of_networks(name: str, revision: str | None = None) -> dict[str, int]:
    """The size of each network's fp32 weights in bytes, by its part (``unet``, ``vae`` ...).

    Builds the networks without values (on torch's meta device); of the model, reads their small JSON files only.

    Args:
        name: ``embedded``, a folder in diffusers layout, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: a component is missing, or the hub cannot be reached.
    """
    source = locate(name)
    where: dict[str, Any] = {"revision": revision, "local_files_only": isinstance(source, Path)}

    def size(kind: Any, part: str) -> int:
        with _named_errors(name, part), quiet(), torch.device("meta"):
            if issubclass(kind, ModelMixin):
                network = kind.from_config(kind.load_config(source, subfolder=part, **where))
            else:
                network = kind(kind.config_class.from_pretrained(source, subfolder=part, **where))
        return int(sum(weights.numel() for weights in network.parameters())) * torch.float32.itemsize

    return {part: size(kind, part) for part, kind in NETWORKS.items()}


@contextmanager
def _named_errors(name: str, part: str, revision: str | None = None, variant: str | None = None) -> Iterator[None]:
    """Turns what is known to go wrong while a component is loaded into one message with the fix."""
    try:
        yield
    except LOADING as error:
        raise InputError(_advice(name, part, first_line(error), revision, variant, error)) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # transformers' words for it, and of no use to our user
            raise
        reason = "its weights have other shapes than its config.json says"
        raise InputError(_advice(name, part, reason, revision, variant, error)) from error


def _advice(name: str, part: str, reason: str, revision: str | None, variant: str | None, error: BaseException) -> str:
    """What cannot be loaded, why, and what can be done about it."""
    refusals = [e.strerror for e in causes(error) if isinstance(e, OSError) and e.errno in UNWRITABLE]
    if isinstance(locate(name), Path):
        fix = f"it must hold {part}/ with safetensors weights"
    elif refusals:
        fix = "make room there and make it writable, or put it elsewhere with HF_HOME"
        reason = f"the hub's cache cannot be written: {refusals[0]}"
    else:
        fix = (
            f"check the name, the network and (for a gated model) `hf auth login`; or run "
            f"`{download_command(name, revision, variant)}` where there is a network, copy FOLDER here and pass "
            f"--model.backbone FOLDER"
        )
    return f"the backbone {name} cannot be loaded: {part}: {reason.rstrip('.')}; {fix}"


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
