"""What components' config files say, completed by what holds where they say nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from diffusers import ModelMixin

SCHEDULER = "scheduler"
Configs = Mapping[str, Mapping[str, Any]]  # by component
Pair = tuple[str, Any, str, Any]  # what, its number, what else, its number


def config_file(part: str) -> str:
    """The name of a component's config file."""
    own = part == SCHEDULER or part.startswith("tokenizer")
    return f"{part.rstrip('_0123456789')}_config.json" if own else "config.json"


def completed(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """A component's config with the defaults where its file says nothing; of a whole CLIP, its text encoder's.

    Args:
        kind: the component's class.
        values: its config file.
    """
    return {**_standard(kind), **values, **(values.get("text_config") or {})}


def _standard(kind: Any) -> dict[str, Any]:
    """What the config of a component is where its file says nothing."""
    if issubclass(kind, ModelMixin):  # diffusers': the defaults of its constructor
        signature = inspect.signature(kind.__init__).parameters.values()
        return {one.name: one.default for one in signature if one.default is not inspect.Parameter.empty}
    config = getattr(kind, "config_class", None)
    standard = config().to_dict() if config else {}
    return {**standard, **(standard.get("text_config") or {})}


def without_values(kind: Any, place: str | Path, part: str, **where: Any) -> Any:
    """A component as its config says, on torch's meta device: names and shapes of weights, and no values.

    Args:
        kind: its class.
        place: the base model's folder or hub id.
        part: the component's name.
        where: further arguments of the libraries' readers, such as ``revision``.
    """
    with torch.device("meta"):
        if issubclass(kind, ModelMixin):
            return kind.from_config(kind.load_config(place, subfolder=part, **where))
        return kind(kind.config_class.from_pretrained(place, subfolder=part, **where))


def whole_number(value: Any) -> TypeGuard[int]:
    """Whether this is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
