"""Weights of a base model in one file, as many are shared: which networks it holds, under the names of diffusers.

Which names in such a file stand for what is the knowledge of diffusers. Used here are the parts of which its
``from_single_file`` is made (``loaders/single_file_model.py`` and ``loaders/single_file_utils.py``, read in 0.42.1): as
a whole it neither says which weights a file lacks nor takes all other networks from a folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from safetensors import safe_open
from torch import Tensor
from transformers import T5EncoderModel

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.configs import without_values
from antidreambooth.diffusion.integrity import faults, listed
from antidreambooth.diffusion.libraries import named_errors, quiet
from antidreambooth.diffusion.source import Source, locate
from antidreambooth.errors import InputError, first_line

WHOLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")  # kinds of numbers that are not quantized
# Other networks than the denoiser in a file whose names a converter keeps.
OTHERS = re.compile(r"^(vae|first_stage_model|text_encoders|cond_stage_model|conditioner|model_ema)\.")


def held_in_file(source: Source, kind: type[Backbone]) -> set[str]:
    """The networks whose weights lie in a base model's one file, as its header says; none where there is no file.

    Args:
        source: the base model.
        kind: its family.

    Raises:
        InputError: the file is damaged or quantized, or holds no denoiser of this family.
    """
    if source.file is None:
        return set()
    weights, denoiser = _header(source, source.file), kind.denoiser_name()
    held = {part for part, component in kind.networks.items() if _holds(source, part, component, weights)}
    if denoiser not in held:
        raise _unusable(source, f"it holds no {denoiser} of a {kind.family} model (a LoRA is none)")
    return held


def network_in_file(source: Source, part: str, component: Any, weights: Mapping[str, Tensor]) -> Any:
    """A network with the weights that the file holds, in fp32.

    Args:
        source: the base model.
        part: the network's name, one of ``held_in_file``.
        component: its class.
        weights: all of the file.

    Raises:
        InputError: weights are missing, of another shape than the network's config says, or no finite numbers.
    """
    folder, report = locate(source), _report()
    with named_errors(source, part), quiet():
        if issubclass(component, ModelMixin):
            state = _weights_of(source, part, component, weights)
            with init_empty_weights():
                made = component.from_config(component.load_config(folder, subfolder=part))
            made.load_state_dict({name: state[name].float() for name in made.state_dict()}, assign=True)
        else:
            made = _maker(component, weights)(
                component, dict(weights), part, str(folder), torch_dtype=torch.float32, local_files_only=True
            )
            made.tie_weights()
            report = _report(missing=[name for name, values in made.state_dict().items() if values.is_meta])
    _require_whole(source, part, {} if report["missing_keys"] else made.state_dict(), report)
    return made


def _header(source: Source, file: Path) -> dict[str, Tensor]:
    """Names and shapes of all weights in the file, on torch's meta device; reads no weights."""
    with named_errors(source, file.name), safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        if small := sorted(name for name, one in slices.items() if one.get_dtype() not in WHOLE):
            raise InputError(
                f"the backbone {source} holds quantized weights ({listed(small)}); weights of 16 or 32 bits work"
            )
        return {name: torch.empty(one.get_shape(), device="meta") for name, one in slices.items()}


def _holds(source: Source, part: str, component: Any, weights: Mapping[str, Tensor]) -> bool:
    """Whether the file holds a network; of diffusers' also whether it is all there."""
    if not issubclass(component, ModelMixin):
        return _maker(component, weights) is not None
    return bool(_weights_of(source, part, component, weights))


def _weights_of(source: Source, part: str, component: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network of diffusers' under its own names; nothing where the file does not hold it.

    Raises:
        InputError: some are missing, or of another shape than the network's config says.
    """
    if component.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
        return {}
    with named_errors(source, part), quiet():
        own = without_values(component, locate(source), part).state_dict()
        config = component.load_config(locate(source), subfolder=part)
    state = {**weights} if own.keys() == weights.keys() else _converted(source, part, component, config, weights)
    if not own.keys() & state.keys():
        return {}
    shapes = [(name, state[name].shape, own[name].shape) for name in own.keys() & state.keys()]
    other = [(name, *map(tuple, both)) for name, *both in shapes if both[0] != both[1]]
    _require_whole(source, part, {}, _report(own.keys() - state.keys(), state.keys() - own.keys(), other))
    return state


def _converted(
    source: Source, part: str, component: Any, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights under diffusers' names. Its converters take them by name, and some count blocks first."""
    convert = SINGLE_FILE_LOADABLE_CLASSES[component.__name__]["checkpoint_mapping_fn"]
    try:
        converted: dict[str, Tensor] = convert(checkpoint=dict(weights), config=config)
    except (IndexError, ValueError):  # no block at all, or something else where a block's number should be
        return {}
    except KeyError as error:
        raise _unusable(source, f"its {part} lacks {error.args[0]}") from error
    except RuntimeError as error:  # torch's, for shapes
        raise _unusable(source, f"its {part} holds weights of another shape: {first_line(error)}") from error
    return converted


def _maker(component: Any, weights: Mapping[str, Tensor]) -> Any:
    """What makes a text encoder of the file's weights; None where the file holds none of its kind."""
    if is_clip_model_in_single_file(component, weights):
        return create_diffusers_clip_model_from_ldm
    if issubclass(component, T5EncoderModel) and is_t5_in_single_file(weights):
        return create_diffusers_t5_model_from_checkpoint
    return None


def _report(missing: Iterable[str] = (), left: Iterable[str] = (), shapes: Iterable[Any] = ()) -> dict[str, Any]:
    """As the libraries say it of weights that they load themselves."""
    return {"missing_keys": [*missing], "unexpected_keys": [*left], "mismatched_keys": [*shapes]}


def _require_whole(source: Source, part: str, state: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
    if wrong := faults(state, report, OTHERS):
        raise _unusable(source, f"its {part} {wrong}")


def _unusable(source: Source, wrong: str) -> InputError:
    return InputError(
        f"the backbone {source} cannot be used: {wrong}; the file is damaged, or components is of another kind of model"
    )
