"""What made a result, as plain values: for the manifest, for checkpoints, and to tell two runs apart."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("antidreambooth", "diffusers", "lightning", "pillow", "torch", "transformers")


def describe(value: Any) -> Any:
    """Settings as strings, numbers, lists and dictionaries; of an object its class and its constructor's arguments."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        names = list(inspect.signature(type(value)).parameters)
    return {"class": type(value).__name__, **{name: describe(getattr(value, name)) for name in names}}


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """One line for each setting that differs, with its dotted name and both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [f"{name}: {before} then, {now} now"]
    keys = [*before, *(key for key in now if key not in before)]
    return [
        line
        for key in keys
        for line in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    ]


def versions() -> dict[str, str]:
    """The versions of the libraries whose numerics a result depends on."""
    return {package: version(package) for package in PACKAGES}


def slug(text: str) -> str:
    """A file name for any text; where characters have to go, a hash keeps it apart from other such texts."""
    name = re.sub(r"[^\w.-]+", "_", text)
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
