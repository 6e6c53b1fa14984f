"""Which base model is meant, and where it lies: the embedded one, a folder in diffusers layout, or a hub id."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

from antidreambooth.errors import InputError

EMBEDDED = Path(__file__).parent.parent / "models" / "embedded"
SINGLE_FILES = (".safetensors", ".ckpt")  # a whole model in one file, as many are shared
SHOWN = 5  # names in a message
Precision = Literal["fp32", "bf16", "nf4"]  # in which weights that do not learn are held
INDEX = "model_index.json"  # says which pipeline a folder is of, and so which family
LAYOUT = f"it must hold a model in diffusers layout: {INDEX}, and a folder for each component"


@dataclass(frozen=True)
class Source:
    """A base model with the revision and the variant that are wanted; may stand wherever a plain name may.

    Args:
        name: ``embedded``, a folder in diffusers layout, or a hub id.
        revision: branch, tag or commit of a hub id.
        variant: variant of the weights' files, such as ``fp16``; computed in fp32 all the same. When not given, the
            plain weights or, in a folder without plain ones, those of its only variant.
        frozen_weights: how the weights of denoiser and text encoders are held that do not learn. With ``bf16`` half the
            memory: those that autocast rounds to bf16 anyway are held so. With ``nf4`` the denoiser's take 4 bits each
            (bitsandbytes, on CUDA), for a LoRA or for a model that does not learn. Either needs a run in bf16.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    frozen_weights: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.frozen_weights not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise InputError(f"frozen_weights is one of {known}: got {self.frozen_weights!r}")

    @classmethod
    def of(cls, named: object) -> Source:
        """What a name stands for.

        Raises:
            InputError: it is no name.
        """
        if isinstance(named, Source):
            return named
        if not isinstance(named, str | os.PathLike):
            raise InputError(f"a backbone is 'embedded', a folder, a hub id or a Source of one, got {named!r}")
        return cls(os.fspath(named))

    @classmethod
    def several(cls, named: Named | Iterable[Named], frozen_weights: Precision = "fp32") -> list[Source]:
        """What names stand for; one alone may be given without a list around it.

        Args:
            named: the base models.
            frozen_weights: of those that are given by a plain name.
        """
        if isinstance(named, Source | str | os.PathLike):
            named = [named]
        sources = [(one, cls.of(one)) for one in named]
        return [one if one is given else replace(one, frozen_weights=frozen_weights) for given, one in sources]

    @property
    def given(self) -> dict[str, str]:
        """Where it lies: the settings ``backbone``, ``revision`` and ``variant``, without those that were not given."""
        values = {"backbone": self.name, "revision": self.revision, "variant": self.variant}
        return {name: value for name, value in values.items() if value}

    def __str__(self) -> str:
        """The name, and what was given beside it."""
        return " ".join([self.name, *(f"{key} {value}" for key, value in self.given.items() if key != "backbone")])


Named = str | os.PathLike[str] | Source  # whatever may stand for a base model


def locate(source: Source) -> str | Path:
    """The embedded model's or a given folder as a path, anything that has the form of a hub id as it is.

    What exists, and what would lie in a folder that exists, is never taken for a hub id.

    Raises:
        InputError: neither a folder in diffusers layout nor a hub id.
    """
    name = source.name
    folder = EMBEDDED if name == "embedded" else Path(name).expanduser()
    try:
        if folder.is_dir():
            if not (folder / INDEX).is_file():
                raise InputError(f"the backbone folder {name} lacks {INDEX}: {LAYOUT}")
            return folder
        if folder.exists():
            raise InputError(_no_folder(folder))
        local = folder.parent.exists() or folder.suffix in SINGLE_FILES
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise InputError(f"the backbone {name!r} cannot be looked for: {error.strerror}") from error
    if not local and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return name
    raise InputError(
        f"the backbone {name!r} is neither a folder{_neighbours(folder)} nor a hub id (owner/name, where no folder is "
        "called owner); 'embedded' always works"
    )


def download_command(source: Source) -> str:
    """The shell command that puts what is read of a hub's model into a folder, for a machine without a network.

    Of the weights' files, those of other variants are left out.
    """
    patterns = [f"*/*.{source.variant}*.safetensors"] if source.variant else ["*/*.safetensors"]
    others = [] if source.variant else ["*/*.*.safetensors"]  # fp16, non_ema and the like
    small = ["*.json", "*/*.txt", "*/*.model", "*/*.jinja"]  # configs, and what tokenizers are made of
    words = [
        *(word for pattern in [*small, *patterns] for word in ("--include", pattern)),
        *(word for pattern in [*others, "safety_checker/*"] for word in ("--exclude", pattern)),
        *(["--revision", source.revision] if source.revision else []),
    ]
    return f"hf download {source.name} {shlex.join(words)} --local-dir FOLDER"


def conversion_command(file: Path) -> str:
    """The shell command that makes a folder in diffusers layout of a model in a single file."""
    code = (
        "from diffusers import StableDiffusionPipeline; "
        f"StableDiffusionPipeline.from_single_file({json.dumps(str(file))})"
        f".save_pretrained({json.dumps(str(file.with_suffix('')))})"
    )
    return f"python -c {shlex.quote(code)}"


def _no_folder(file: Path) -> str:
    """What to do with something that is there and no folder."""
    if file.suffix not in SINGLE_FILES:
        return f"the backbone {file} is a file; give a folder: {LAYOUT}"
    return (
        f"the backbone {file} is a single file, and only folders in diffusers layout are read: convert it with "
        f"`{conversion_command(file)}` (it asks the hub for config files) and pass --model.backbone "
        f"{shlex.quote(str(file.with_suffix('')))}"
    )


def _neighbours(folder: Path) -> str:
    """What lies where a folder is missing: names like it or, where there are none, all of them."""
    try:
        there = sorted(path.name for path in folder.parent.iterdir() if path.is_dir() or path.suffix in SINGLE_FILES)
    except OSError:  # that folder is missing, too
        return ""
    visible = [name for name in there if not name.startswith(".")]
    shown = get_close_matches(folder.name, visible, SHOWN) or visible[:SHOWN]
    if not shown:
        return ""
    others = "" if len(shown) == len(visible) else " and others"
    return f" ({folder.parent.absolute()} holds {', '.join(shown)}{others})"
