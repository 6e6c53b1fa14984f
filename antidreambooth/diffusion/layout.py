"""What a base model's small files say, before any weights are read: its family, its resolution, whether it can work."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.configs import SCHEDULER, Configs, completed, config_file, without_values
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.families import FAMILIES, family_named
from antidreambooth.diffusion.libraries import named_errors, quiet
from antidreambooth.diffusion.single_file import held_in_file
from antidreambooth.diffusion.source import INDEX, Named, Source, locate
from antidreambooth.errors import InputError, OutOfRangeError


def family_of(named: Named) -> type[Backbone]:
    """The family of a base model, by the pipeline that its ``model_index.json`` names.

    Raises:
        InputError: it names another one, or the file cannot be had.
    """
    source = Source.of(named)
    index = read_json(source, INDEX)
    name = index.get("_class_name")
    kind = family_named(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(
            f"the backbone {source} is a {name} ({INDEX}), which is not supported: a model of one of these works: "
            f"{', '.join(FAMILIES)}"
        )
    return kind


def read_defaults(named: Named) -> Defaults:
    """What the base model wants where the user says nothing, without loading it."""
    source = Source.of(named)
    place, published = locate(source), family_of(source).published
    return Defaults.read(place, published) if isinstance(place, Path) else published


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
    kind, configs, _ = inspect(source)
    step, least = kind.step(configs), kind.smallest(configs)
    if wanted is None:
        return _usual_resolution(source, kind, configs)
    if wanted < least or wanted % step:
        below = wanted // step * step
        usable = " or ".join(str(side) for side in (below, below + step) if side >= least) or least
        allowed = f"{least} or more and a multiple of {step} pixels for the backbone {source}, such as {usable}"
        raise OutOfRangeError("resolution", wanted, allowed)
    return wanted


def _usual_resolution(source: Source, kind: type[Backbone], configs: Configs) -> int:
    """What the base model is usually trained at, or was made for."""
    if found := read_defaults(source).resolution or kind.made_for(configs):
        return found
    part = kind.denoiser_name()
    raise InputError(
        f"the backbone {source} does not say what square images it was made for ({part}/config.json: sample_size "
        f"{configs[part].get('sample_size')}): give --model.resolution, in Python cloak(..., resolution=...), or write "
        "it there"
    )


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


def inspect(source: Source) -> tuple[type[Backbone], Configs, set[str]]:
    """What a base model is, after a look at whether it can work; loads no weights.

    Returns:
        Its family; its config files by component, completed by what holds where they say nothing; and the networks
        whose weights lie in its one file, if it has one.

    Raises:
        InputError: it cannot work.
    """
    kind = family_of(source)
    place, files = locate(source), files_of(kind)
    if isinstance(place, Path) and (missing := [file for file in files.values() if not (place / file).is_file()]):
        raise InputError(
            f"the backbone folder {source.name} lacks {', '.join(missing)}: a {kind.family} model consists of "
            f"{', '.join(f'{part}/' for part in files)}"
        )
    with quiet():
        configs = {part: read_json(source, file) for part, file in files.items()}
        reason = _other_kind(kind, configs)
        if not reason:
            configs |= {part: completed(component, configs[part]) for part, component in kind.networks.items()}
            reason = kind.misfit(configs, read_defaults(source))
    if reason:
        raise InputError(f"the backbone {source} {reason}")
    held = held_in_file(source, kind)
    for part, component in kind.networks.items():
        if part not in held:
            variant_of(source, part, component)
    return kind, configs, held


def files_of(kind: type[Backbone]) -> dict[str, str]:
    """Each component's config file, without which it is missing."""
    return {part: f"{part}/{config_file(part)}" for part in (*kind.networks, *kind.tokenizers, SCHEDULER)}


def _other_kind(kind: type[Backbone], configs: Configs) -> str:
    """Which component is of another kind than the family's, in words; nothing where all are as they should be."""
    for part, component in kind.networks.items():
        values, wanted = configs[part], component.__name__
        if values.get("quantization_config"):
            return f"holds quantized weights ({part}/config.json); weights of 16 or 32 bits work"
        if issubclass(component, ModelMixin):
            found = values.get("_class_name", wanted)
        else:
            wanted = component.config_class.model_type
            found = values.get("model_type", wanted)
            if (found, wanted) == ("clip", "clip_text_model"):  # a whole CLIP: its text encoder is taken
                found = wanted
        if found != wanted:
            return f"is no plain {kind.family}: its {part}/ is of the kind {found}, not {wanted}"
    return ""


def variant_of(source: Source, part: str, component: Any) -> str | None:
    """Which variant of a component's weights is loaded, None for the plain ones; on the hub the one that is asked for.

    Args:
        source: the base model.
        part: the component's name.
        component: its class.

    Raises:
        InputError: a folder has no such weights, or several variants and nobody has said which.
    """
    place, wanted = locate(source), source.variant or None
    if not isinstance(place, Path):
        return wanted
    there = _variants(place / part, "diffusion_pytorch_model" if issubclass(component, ModelMixin) else "model")
    if wanted in there:
        return wanted
    if wanted is None and len(there) == 1:
        return there.pop()
    known = ", ".join(sorted(variant or "plain ones" for variant in there))
    if not there:
        pickles = sorted(file.name for file in (place / part).glob("*.bin"))
        found = f" ({pickles[0]} is a pickle, which may run anything when it is read)" if pickles else ""
        where = f"neither the file nor {part}/ of components holds its" if source.components else f"{part}/ holds no"
        raise InputError(f"the backbone {source} cannot be loaded: {where} safetensors weights{found}")
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


def read_json(source: Source, file: str) -> dict[str, Any]:
    """One of a base model's small files; ``file`` is its path in the model's folder."""
    place = locate(source)
    with named_errors(source, file.partition("/")[0]):
        path = place / file if isinstance(place, Path) else hf_hub_download(place, file, revision=source.revision)
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{Path(file).name} is no JSON object")
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
        with named_errors(source, part), quiet():
            network = without_values(kind, place, part, **where)
        return int(sum(weights.numel() for weights in network.parameters())) * torch.float32.itemsize

    return {part: size(kind, part) for part, kind in family_of(source).networks.items()}
