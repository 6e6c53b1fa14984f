"""Which base models are on this machine, with their size, their terms, and whether this machine can work with them.

Only small files are read; no network is asked, and torch is not loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from page.texts import say

EMBEDDED = Path(__file__).parent.parent / "antidreambooth" / "models" / "embedded"
INDEX = "model_index.json"
WHOLE = 24  # GB of a card on which all of Stable Diffusion learns, as published


class Kind(NamedTuple):
    """A family of base models.

    Args:
        name: for people.
        card: GB of the smallest card for its largest member at its usual size, with all that saves memory; counted, and
            not measured (docs/scaling.md).
        terms: the name of a sentence about its licence.
    """

    name: str
    card: int
    terms: str


KINDS = {  # by the pipeline that model_index.json names
    "StableDiffusionPipeline": Kind("Stable Diffusion 1 or 2", 8, "terms_openrail"),
    "StableDiffusionXLPipeline": Kind("Stable Diffusion XL", 16, "terms_openrail"),
    "StableDiffusion3Pipeline": Kind("Stable Diffusion 3", 24, "terms_stability"),
    "FluxPipeline": Kind("FLUX.1", 40, "terms_flux"),
    "Flux2KleinPipeline": Kind("FLUX.2 klein", 24, "terms_flux"),
    "ZImagePipeline": Kind("Z-Image", 16, "terms_apache"),
    "QwenImagePipeline": Kind("Qwen-Image", 48, "terms_apache"),
    "SanaPipeline": Kind("Sana", 12, "terms_card"),
    "Lumina2Pipeline": Kind("Lumina-Image 2.0", 8, "terms_card"),
}


def here(folders: list[Path]) -> list[dict[str, Any]]:
    """The base models on this machine: the embedded one first, then folders, then the hub's cache.

    Args:
        folders: each a model in diffusers layout, or a folder of such.

    Returns:
        Of each ``id``, ``source`` (what ``--model.backbone`` takes), ``name``, ``bytes``, ``terms``, whether this
        machine is ``able`` and ``why`` not, and whether the test may be run with it (``testable``).
    """
    card = gigabytes_of_card()
    found = [described(EMBEDDED, "embedded", say("model_embedded"), card)]
    for folder in folders:
        for place in (folder, *(sorted(folder.iterdir()) if folder.is_dir() else ())):
            found.append(described(place, str(place.absolute()), place.name, card))
    for name, place in cached():
        found.append(described(place, str(place), name, card))
    return [one for one in found if one]


def cached() -> list[tuple[str, Path]]:
    """Names and folders of what lies in the hub's cache; the newest of several versions."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    found = []
    for model in sorted(cache.glob("models--*--*")):
        versions = sorted(model.glob(f"snapshots/*/{INDEX}"), key=lambda file: file.stat().st_mtime)
        if versions:
            found.append(("/".join(model.name.split("--")[1:]), versions[-1].parent))
    return found


def described(place: Path, source: str, name: str, card: int) -> dict[str, Any]:
    """A base model; nothing where there is none that this project works with.

    Args:
        place: its folder.
        source: as ``--model.backbone`` takes it.
        name: for people.
        card: GB of this machine's graphics card, 0 where there is none.
    """
    try:
        pipeline = json.loads((place / INDEX).read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return {}
    if not isinstance(pipeline, str) or pipeline not in KINDS:
        return {}
    kind, embedded = KINDS[pipeline], source == "embedded"
    able = embedded or card >= kind.card
    return {
        "id": "embedded" if embedded else hashlib.sha256(source.encode()).hexdigest()[:16],
        "source": source,
        "pipeline": pipeline,
        "name": name if embedded else f"{name} ({kind.name})",
        "bytes": sum(file.stat().st_size for file in place.glob("*/*.safetensors")),
        "terms": say("terms_embedded" if embedded else kind.terms),
        "able": able,
        "testable": embedded or (pipeline == "StableDiffusionPipeline" and card >= WHOLE),
        "card": card,
        "why": "" if able else say("no_card" if not card else "small_card", needed=kind.card, there=card),
    }


def words_of(model: dict[str, Any]) -> list[str]:
    """The command line's words that choose a base model, and what saves memory where the card asks for it."""
    words = [f"--model.backbone={model['source']}"]
    if model["source"] == "embedded":
        return words
    if model["pipeline"] == "StableDiffusionPipeline" and model["card"] >= WHOLE:
        return [*words, "--trainer.accelerator=gpu", "--trainer.devices=1"]
    return ["--config=configs/trainer/low-memory.yaml", *words]


def gigabytes_of_card() -> int:
    """The memory of the largest NVIDIA card, as its driver says; 0 where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    asked = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True)  # noqa: S603
        return max((round(int(line) / 1024) for line in answer.stdout.split()), default=0)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
