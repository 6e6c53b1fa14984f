"""Loading a base model; and what can be told from its small files, before any weights are loaded."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.families import stable_diffusion as family
from antidreambooth.diffusion.families.stable_diffusion import NETWORKS, OTHERS, PARTS, StableDiffusion
from antidreambooth.diffusion.integrity import faults
from antidreambooth.diffusion.precision import made_on_cpu
from antidreambooth.diffusion.source import Named, Source, download_command, locate
from antidreambooth.errors import InputError, OutOfRangeError, causes, first_line

LOADING: tuple[type[BaseException], ...] = (  # what diffusers and transformers raise for a model that they cannot load
    OSError,  # a file is missing, unreadable or no JSON; the network is dead; the cache cannot be written
    ValueError,  # a config of no network; a tokenizer that is no JSON
    SafetensorError,  # weights are cut or something else
    StrictDataclassError,  # values in a config of transformers
    *HfHubHTTPError.__bases__,  # whatever HTTP client the hub's library uses: a download that breaks off
)
LOGGING = (diffusers_logging, transformers_logging)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
# diffusers' words for weights of another shape than the config's; transformers lists them in its report.
OTHER_SHAPE = re.compile(r"(\S+) expected shape torch\.Size\((\[.*?\])\), but got torch\.Size\((\[.*?\])\)")


def load_backbone(named: Named) -> Backbone:
    """Loads a base model's components in fp32 onto the CPU, from safetensors only.

    Args:
        named: ``embedded``, a folder in diffusers layout, or a hub id (downloaded once, then cached); or one of these
            with a revision and a variant.

    Raises:
        InputError: a component is missing or damaged, the components do not fit each other, this is no Stable
            Diffusion 1.x / 2.x, or the hub cannot be reached.
    """
    source = Source.of(named)
    configs, place = inspect(source), locate(source)
    where: dict[str, Any] = {"revision": source.revision, "local_files_only": isinstance(place, Path)}

    def load(component: Any, part: str, **kwargs: Any) -> Any:
        with _named_errors(source, part), quiet():
            return component.from_pretrained(place, subfolder=part, **where, **kwargs)

    def network(component: Any, part: str) -> Any:
        ours = issubclass(component, ModelMixin)  # diffusers': it names a weight of another shape by itself
        how = {"torch_dtype": torch.float32} if ours else {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        files = {"variant": variant_of(source, part), "use_safetensors": True}
        made, report = load(component, part, **how, **files, output_loading_info=True)
        if wrong := faults(made.state_dict(), report, family.HARMLESS.get(part)):
            raise InputError(
                f"the backbone {source} cannot be used: {part}/ {wrong}; its files are damaged or of another model: "
                "download or convert them again"
            )
        return made

    with made_on_cpu():
        parts = {part: load(kind, part) for part, kind in OTHERS.items()}
        family.check_tokens(parts["tokenizer"], configs["text_encoder"], str(source))
        parts |= {part: network(kind, part) for part, kind in NETWORKS.items()}
        backbone = StableDiffusion(**parts, defaults=read_defaults(source))
    for parameter in backbone.parameters():
        # Out of the memory-mapped file: its tensors lie at any byte, and matrix products round by alignment.
        parameter.data = parameter.data.clone()
    return backbone


def read_defaults(named: Named) -> Defaults:
    """What the base model wants where the user says nothing, without loading it."""
    place = locate(Source.of(named))
    return Defaults.read(place) if isinstance(place, Path) else Defaults()


def resolution_of(named: Named, wanted: int | None = None) -> int:
    """The side in pixels of the square images that a run on a base model works with.

    Reads the model's small files only, and refuses here what could not work later.

    Args:
        named: the base model.
        wanted: what the user asks for; what the base model was made for when not given.

    Raises:
        InputError: the model cannot be used, does not say what it was made for, or takes no images of this size.
    """
    source = Source.of(named)
    configs = inspect(source)
    step, least = family.downscale(configs["vae"]), family.smallest(configs)
    if wanted is None:
        return step * family.latent_side(configs["unet"], str(source))
    if wanted < least or wanted % step:
        below = wanted // step * step
        usable = " or ".join(str(side) for side in (below, below + step) if side >= least) or least
        allowed = f"{least} or more and a multiple of {step} pixels for the backbone {source}, such as {usable}"
        raise OutOfRangeError("resolution", wanted, allowed)
    return wanted


def shared_resolution(sources: Sequence[Source], wanted: int | None = None) -> int:
    """The side in pixels that a run on several base models works with: what is asked for, or the first one's.

    Raises:
        InputError: as ``resolution_of``, of any of them; so a wrong one is found before the first is loaded.
    """
    first, *others = sources
    side = resolution_of(first, wanted)
    for other in others:
        resolution_of(other, side)
    return side


def inspect(source: Source) -> dict[str, dict[str, Any]]:
    """A base model's config files by component, after a look at whether it can work; loads no weights.

    Raises:
        InputError: it cannot.
    """
    configs = {part: _config(source, part) for part in PARTS}
    with quiet():
        family.check(configs, read_defaults(source), str(source))
    for part in NETWORKS:
        variant_of(source, part)
    return configs


def variant_of(source: Source, part: str) -> str | None:
    """Which variant of a component's weights is loaded, None for the plain ones; on the hub the one that is asked for.

    Raises:
        InputError: a folder has no such weights, or several variants and nobody has said which.
    """
    place, wanted = locate(source), source.variant or None
    if not isinstance(place, Path):
        return wanted
    there = _variants(place / part, "diffusion_pytorch_model" if issubclass(NETWORKS[part], ModelMixin) else "model")
    if wanted in there:
        return wanted
    if wanted is None and len(there) == 1:
        return there.pop()
    known = ", ".join(sorted(variant or "plain ones" for variant in there))
    if not there:
        pickles = sorted(file.name for file in (place / part).glob("*.bin"))
        found = f" ({pickles[0]} is a pickle, which may run anything when it is read)" if pickles else ""
        raise InputError(f"the backbone {source} cannot be loaded: {part}/ holds no safetensors weights{found}")
    if wanted is None:
        raise InputError(
            f"the backbone {source} cannot be loaded: {part}/ holds several variants of its weights and no plain ones: "
            f"choose with --model.variant ({known}), in Python with Source(name, variant=...)"
        )
    raise InputError(
        f"the backbone {source} cannot be loaded: {part}/ holds no weights of this variant, but {known}: "
        "leave out --model.variant or choose another one"
    )


def _variants(folder: Path, stem: str) -> set[str | None]:
    """The variants of weights that a folder holds, None for plain ones; a set of shards is known by its index."""
    whole = rf"{stem}(\.(?P<variant>[^.]+))?\.safetensors"
    index = rf"{stem}\.safetensors\.index(\.(?P<variant>[^.]+))?\.json"
    matches = [re.fullmatch(form, file.name) for form in (whole, index) for file in folder.iterdir() if file.is_file()]
    return {match["variant"] for match in matches if match and not re.search(r"-\d{5}-of-\d{5}", match[0])}


def _config(source: Source, part: str) -> dict[str, Any]:
    """A component's config file."""
    place = locate(source)
    with _named_errors(source, part):
        if isinstance(place, Path):
            file = str(place / part / PARTS[part])
        else:
            file = hf_hub_download(place, f"{part}/{PARTS[part]}", revision=source.revision)
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{PARTS[part]} is no JSON object")
        return values


def bytes_of_networks(named: Named) -> dict[str, int]:
    """The size of each network's fp32 weights in bytes, by its part (``unet``, ``vae`` ...).

    Builds the networks without values (on torch's meta device); of the model, reads their small JSON files only.

    Args:
        named: the base model.

    Raises:
        InputError: a component is missing, or the hub cannot be reached.
    """
    source = Source.of(named)
    place = locate(source)
    where: dict[str, Any] = {"revision": source.revision, "local_files_only": isinstance(place, Path)}

    def size(kind: Any, part: str) -> int:
        with _named_errors(source, part), quiet(), torch.device("meta"):
            if issubclass(kind, ModelMixin):
                network = kind.from_config(kind.load_config(place, subfolder=part, **where))
            else:
                network = kind(kind.config_class.from_pretrained(place, subfolder=part, **where))
        return int(sum(weights.numel() for weights in network.parameters())) * torch.float32.itemsize

    return {part: size(kind, part) for part, kind in NETWORKS.items()}


@contextmanager
def _named_errors(source: Source, part: str) -> Iterator[None]:
    """Turns what is known to go wrong while a component is loaded into one message with the fix."""
    try:
        yield
    except LOADING as error:
        raise InputError(_advice(source, part, error)) from error


def _advice(source: Source, part: str, error: BaseException) -> str:
    """What cannot be loaded, why, and what can be done about it."""
    reason = first_line(error)
    refusals = [e.strerror for e in causes(error) if isinstance(e, OSError) and e.errno in UNWRITABLE]
    if isinstance(locate(source), Path):
        fix = f"it must hold {part}/ with {PARTS[part]}{' and safetensors weights' if part in NETWORKS else ''}"
        if shape := OTHER_SHAPE.search(reason):
            reason = f"{shape[1]} has the shape {shape[3]}, not {shape[2]} as its config.json says"
    elif refusals:
        fix = "make room there and make it writable, or put it elsewhere with HF_HOME"
        reason = f"the hub's cache cannot be written: {refusals[0]}"
    elif re.search(r"does not appear to have a file named .*safetensors", reason) and not source.variant:
        fix = "where the hub has weights of a variant only, such as fp16, give --model.variant"
    else:
        fix = (
            f"check the name, the network and (for a gated model) `hf auth login`; or run "
            f"`{download_command(source)}` where there is a network, copy FOLDER here and pass --model.backbone FOLDER"
        )
    return f"the backbone {source} cannot be loaded: {part}: {reason.rstrip('.')}; {fix}"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report of a library while weights are read or written: what is wrong, we say ourselves."""
    shown, levels = transformers_logging.is_progress_bar_enabled(), [log.get_verbosity() for log in LOGGING]
    transformers_logging.disable_progress_bar()
    for log in LOGGING:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(LOGGING, levels, strict=True):
            log.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
