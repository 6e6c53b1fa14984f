"""Loading a base model; and what can be told from its small files, before any weights are loaded."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import BitsAndBytesConfig, ModelMixin, SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.configs import Configs, completed
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.families import FAMILIES, family_named
from antidreambooth.diffusion.integrity import faults
from antidreambooth.diffusion.precision import held_in_bf16, made_on_cpu
from antidreambooth.diffusion.source import INDEX, Named, Source, download_command, locate
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
SCHEDULER = "scheduler"
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
OTHER_SHAPE = re.compile(r"(\S+) expected shape torch\.Size\((\[.*?\])\), but got torch\.Size\((\[.*?\])\)")


def load_backbone(named: Named) -> Backbone:
    """Loads a base model's components onto the CPU, from safetensors only.

    In fp32, or as ``Source.frozen_weights`` says: with bf16 denoiser and text encoders are read in bf16, and what
    autocast does not round is brought to fp32 again; of nf4 the denoiser is on the GPU from the start. The autoencoder
    is fp32 in any case, since pictures are decoded in it.

    Args:
        named: ``embedded``, a folder in diffusers layout, or a hub id (downloaded once, then cached); or one of these
            with a revision and a variant.

    Raises:
        InputError: a component is missing or damaged, the components do not fit each other, the model is of no family
            that is supported, the hub cannot be reached, or weights of 4 bits do not work here.
    """
    source = Source.of(named)
    if source.frozen_weights == "nf4":
        require_four_bits()
    kind, configs = inspect(source)
    place = locate(source)
    where: dict[str, Any] = {"revision": source.revision, "local_files_only": isinstance(place, Path)}

    def load(component: Any, part: str, **kwargs: Any) -> Any:
        with _named_errors(source, part), quiet():
            return component.from_pretrained(place, subfolder=part, **where, **kwargs)

    def network(component: Any, part: str) -> Any:
        ours = issubclass(component, ModelMixin)  # diffusers': it names a weight of another shape by itself
        low = source.frozen_weights != "fp32" and part != "vae"
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
        parts = {part: load(tokenizer, part) for part, tokenizer in kind.tokenizers.items()}
        parts[SCHEDULER] = load(_scheduler_kind(kind, configs), SCHEDULER)
        _check_tokens(parts, kind, configs, source)
        parts |= {part: network(component, part) for part, component in kind.networks.items()}
        index = _json(source, INDEX)
        switches = {name: index[name] for name in kind.switches if isinstance(index.get(name), bool)}
        backbone = kind(**parts, **switches, defaults=read_defaults(source))
    for parameter in backbone.parameters():
        if parameter.device.type != "cpu":  # of 4 bits
            continue
        # Out of the memory-mapped file: its tensors lie at any byte, and matrix products round by alignment.
        parameter.data = parameter.data.clone()
    return backbone


def require_four_bits() -> None:
    """Refuses weights of 4 bits where they do not work.

    Raises:
        InputError: there is no CUDA, or a package is missing.
    """
    other = "use frozen_weights bf16 instead"
    if not torch.cuda.is_available():
        raise InputError(f"frozen_weights nf4 works on an NVIDIA GPU only: {other}")
    if missing := [name for name in QUANTIZED if find_spec(name) is None]:
        raise InputError(
            f"frozen_weights nf4 needs {' and '.join(missing)}: pip install 'antidreambooth[quantized]', or {other}"
        )


def family_of(named: Named) -> type[Backbone]:
    """The family of a base model, by the pipeline that its ``model_index.json`` names.

    Raises:
        InputError: it names another one, or the file cannot be had.
    """
    source = Source.of(named)
    index = _json(source, INDEX)
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
    kind, configs = inspect(source)
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


def inspect(source: Source) -> tuple[type[Backbone], Configs]:
    """A base model's family and its config files by component, after a look at whether it can work; loads no weights.

    Config files are completed by what holds where they say nothing.

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
        configs = {part: _json(source, file) for part, file in files.items()}
        reason = _other_kind(kind, configs)
        if not reason:
            configs |= {part: completed(component, configs[part]) for part, component in kind.networks.items()}
            reason = kind.misfit(configs, read_defaults(source))
    if reason:
        raise InputError(f"the backbone {source} {reason}")
    for part, component in kind.networks.items():
        variant_of(source, part, component)
    return kind, configs


def files_of(kind: type[Backbone]) -> dict[str, str]:
    """Each component's config file, without which it is missing."""
    return {part: f"{part}/{_config_of(part)}" for part in (*kind.networks, *kind.tokenizers, SCHEDULER)}


def _config_of(part: str) -> str:
    """The name of a component's config file."""
    own = part == SCHEDULER or part.startswith("tokenizer")
    return f"{part.rstrip('_0123456789')}_config.json" if own else "config.json"


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


def _scheduler_kind(kind: type[Backbone], configs: Configs) -> Any:
    """The class of the scheduler: the family's or, where it leaves that open, the one that the model's folder names."""
    if kind.scheduler_kind is not None:
        return kind.scheduler_kind
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


def _json(source: Source, file: str) -> dict[str, Any]:
    """One of a base model's small files; ``file`` is its path in the model's folder."""
    place = locate(source)
    with _named_errors(source, file.partition("/")[0]):
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
        with _named_errors(source, part), quiet(), torch.device("meta"):
            if issubclass(kind, ModelMixin):
                network = kind.from_config(kind.load_config(place, subfolder=part, **where))
            else:
                network = kind(kind.config_class.from_pretrained(place, subfolder=part, **where))
        return int(sum(weights.numel() for weights in network.parameters())) * torch.float32.itemsize

    return {part: size(kind, part) for part, kind in family_of(source).networks.items()}


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
        config = _config_of(part)
        weights = " and safetensors weights" if config == "config.json" else ""
        fix = f"it must hold {INDEX}" if part == INDEX else f"it must hold {part}/ with {config}{weights}"
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
