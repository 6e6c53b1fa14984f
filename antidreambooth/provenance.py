"""What made a result, as plain values: for the manifest, for checkpoints, and to tell two runs apart."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Collection, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from antidreambooth.errors import InputError

MANIFEST = "manifest.json"  # in a run's folder, written last: what is there is whole, or says that it is not
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


def without(record: Any, names: Collection[str]) -> Any:
    """A record without some of its keys, at whatever depth."""
    if not isinstance(record, dict):
        return record
    return {key: without(value, names) for key, value in record.items() if key not in names}


def versions() -> dict[str, str]:
    """The versions of the libraries whose numerics a result depends on."""
    return {package: version(package) for package in PACKAGES}


def slug(text: str) -> str:
    """A file name for any text; where characters have to go, a hash keeps it apart from other such texts."""
    name = re.sub(r"[^\w.-]+", "_", text)
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_manifest(root: Path) -> dict[str, Any] | None:
    """What the run in a folder says about itself; None where there is no manifest.

    Raises:
        InputError: there is one, of some other program, or it cannot be read.
    """
    file = root / MANIFEST
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # unreadable; no UTF-8; no JSON
        raise InputError(f"{file} cannot be read as a run's manifest: move it away, or use another folder") from error
    if not (isinstance(record, dict) and {"settings", "versions"} <= record.keys()):
        raise InputError(f"{file} is no manifest of a run: move it away, or use another folder")
    return record


def photos_of(record: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the source photos by file name, from a manifest or from a run's record; empty where it has none."""
    photos: dict[str, str] | list[dict[str, Any]] = record.get("photos", {})
    return photos if isinstance(photos, dict) else {entry["source"]: entry["sha256"] for entry in photos}


def person_in(model: Path) -> str | None:
    """The prompt by which a model knows the person that a victim of this project has trained it on.

    A victim writes ``model/``, and ``manifest.json`` beside it.

    Args:
        model: a base model's folder.

    Returns:
        The instance prompt; None where no manifest lies beside the folder, and nobody can tell.

    Raises:
        InputError: the manifest is of a run that has trained the model on nobody in particular.
    """
    record = _beside(model)
    if record is None:
        return None
    prompt = record["settings"]
    for key in ("model", "training", "instance_prompt"):
        prompt = prompt.get(key) if isinstance(prompt, dict) else None
    if not isinstance(prompt, str):
        place = model.expanduser().resolve().parent / MANIFEST
        raise InputError(f"the model {model} was trained on nobody in particular, as {place} says")
    return prompt


def base_in(model: Path) -> dict[str, Any] | None:
    """The base model from which a victim of this project has trained a model, as the manifest beside it says.

    Args:
        model: the trained model's folder.

    Returns:
        The arguments of a ``Source``; None where no manifest lies beside the folder, and nobody can tell.
    """
    record = _beside(model)
    settings = record["settings"] if record else None
    chosen = settings.get("model") if isinstance(settings, dict) else None
    if not isinstance(chosen, dict) or "backbone" not in chosen:
        return None
    also = ("revision", "variant", "components", "frozen_weights")
    return {"name": chosen["backbone"], **{name: chosen[name] for name in also if chosen.get(name) is not None}}


def _beside(model: Path) -> dict[str, Any] | None:
    """The manifest of the run that has written a ``model/``; None where there is none, or it is another program's."""
    folder = model.expanduser().resolve()
    try:
        return read_manifest(folder.parent) if folder.name == "model" else None
    except InputError:
        return None


def cloaked_by(photo: Path, sha256: str) -> Path | None:
    """The folder of the run that made a picture, as the manifest there says; None where no manifest does.

    Args:
        photo: the picture's file; its own folder and the two above are looked through for a manifest.
        sha256: of its bytes.
    """
    photo = photo.resolve()
    for root in list(photo.parents)[:3]:
        try:
            record = read_manifest(root)
        except InputError:  # of some other program, which does not know our cloaks
            continue
        entries = record.get("photos") if record else None
        if isinstance(entries, list):
            made = {entry.get("cloaked_sha256") for entry in entries}
            if sha256 in made or photo.relative_to(root).parts[0] in ("comparison.png", "progress"):
                return root
    return None


def require_originals(photos: Iterable[tuple[Path, str]], advice: str) -> None:
    """Refuses photos that a run has cloaked already, as far as a manifest near them tells.

    Args:
        photos: file and SHA-256 of each.
        advice: what the user can do.

    Raises:
        InputError: it names the first one.
    """
    for photo, sha256 in photos:
        if (root := cloaked_by(photo, sha256)) is not None:
            raise InputError(f"{photo} is no original: the run in {root} made it; {advice}")
