"""Which base model is meant, and where it lies: the embedded one, a folder in diffusers layout, a hub id, one file."""

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
SINGLE_FILE = ".safetensors"  # a whole model or its denoiser in one file, as many are shared
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SHOWN = 5  # names in a message
Precision = Literal["fp32", "bf16", "nf4"]  # in which weights that do not learn are held
INDEX = "model_index.json"  # says which pipeline a folder is of, and so which family
LAYOUT = f"it must hold a model in diffusers layout: {INDEX}, and a folder for each component"


@dataclass(frozen=True)
class Source:
    """A base model with the revision and the variant that are wanted; may stand wherever a plain name may.

    Args:
        name: ``embedded``, a folder in diffusers layout, a hub id, or one ``.safetensors`` file with ``components``.
        revision: branch, tag or commit of a hub id.
        variant: variant of the weights' files, such as ``fp16``; computed in fp32 all the same. When not given, the
            plain weights or, in a folder without plain ones, those of its only variant.
        components: beside one file, a folder in diffusers layout of the same kind of model. Config files, tokenizers
            and the scheduler are read there, and the weights of networks that the file lacks.
        frozen_weights: how the weights of denoiser and text encoders are held that do not learn. With ``bf16`` half the
            memory: those that autocast rounds to bf16 anyway are held so. With ``nf4`` the denoiser's take 4 bits each
            (bitsandbytes, on CUDA), for a LoRA or for a model that does not learn. Either needs a run in bf16.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    components: str | None = None
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
        """Where it lies: ``backbone``, ``revision``, ``variant``, ``components``, without those that were not given."""
        beside = {"revision": self.revision, "variant": self.variant, "components": self.components}
        return {name: value for name, value in {"backbone": self.name, **beside}.items() if value}

    @property
    def file(self) -> Path | None:
        """The one file that holds weights, where they do not all lie in a folder or on the hub."""
        return Path(self.name).expanduser() if self.components else None

    def __str__(self) -> str:
        """The name, and what was given beside it."""
        return " ".join([self.name, *(f"{key} {value}" for key, value in self.given.items() if key != "backbone")])


Named = str | os.PathLike[str] | Source  # whatever may stand for a base model


def locate(source: Source) -> str | Path:
    """Where a base model's small files are: a folder as a path, anything that has the form of a hub id as it is.

    What exists, and what would lie in a folder that exists, is never taken for a hub id.

    Raises:
        InputError: neither a folder in diffusers layout, nor one file with such a folder beside it, nor a hub id.
    """
    name = source.name
    if source.components:
        return _components(source)
    folder = EMBEDDED if name == "embedded" else Path(name).expanduser()
    try:
        if folder.is_dir():
            if not (folder / INDEX).is_file():
                raise InputError(f"the backbone folder {name} lacks {INDEX}: {LAYOUT}")
            return folder
        if folder.exists():
            raise InputError(_no_folder(folder))
        local = folder.parent.exists() or folder.suffix in (SINGLE_FILE, *PICKLES)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise InputError(f"the backbone {name!r} cannot be looked for: {error.strerror}") from error
    if not local and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return name
    raise InputError(
        f"the backbone {name!r} is neither a folder{_neighbours(folder)} nor a hub id (owner/name, where no folder is "
        "called owner); 'embedded' always works"
    )


def whole_folder(source: Source) -> Path | None:
    """The folder that holds all of a base model; None for a hub's, and where the weights are one file."""
    place = locate(source)
    return place if isinstance(place, Path) and not source.file else None


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
    """The shell command that makes a folder in diffusers layout of a Stable Diffusion in a single file."""
    code = (
        "from diffusers import StableDiffusionPipeline; "
        f"StableDiffusionPipeline.from_single_file({json.dumps(str(file))})"
        f".save_pretrained({json.dumps(str(file.with_suffix('')))})"
    )
    return f"python -c {shlex.quote(code)}"


def _no_folder(file: Path) -> str:
    """What to do with something that is there and no folder."""
    if file.suffix not in (SINGLE_FILE, *PICKLES):
        return f"the backbone {file} is a file; give a folder: {LAYOUT}"
    conversion = (
        f"convert it with `{conversion_command(file)}` (for another family with its pipeline; it asks the hub for "
        f"config files) and pass --model.backbone {shlex.quote(str(file.with_suffix('')))}"
    )
    if file.suffix in PICKLES:
        return f"the backbone {file} is a pickle, which may run anything when it is read: {conversion}"
    return (
        f"the backbone {file} is a single file without config files: give a folder in diffusers layout of the same "
        f"kind of model with --model.components FOLDER, in Python Source(name, components=FOLDER); or {conversion}"
    )


def _components(source: Source) -> Path:
    """The folder beside one file.

    Raises:
        InputError: there is no such folder or file, or the file is a pickle.
    """
    file, folder = Path(source.name).expanduser(), Path(source.components or "").expanduser()
    if not (folder / INDEX).is_file():
        lacking = f"the backbone {file} needs a folder as --model.components, and {folder} lacks {INDEX}"
        raise InputError(f"{lacking}: {LAYOUT}; weights that the file has may be missing there")
    if file.suffix in PICKLES and file.is_file():
        raise InputError(_no_folder(file))
    if file.suffix != SINGLE_FILE or not file.is_file():
        raise InputError(
            f"the backbone {source.name!r} is no {SINGLE_FILE} file{_neighbours(file)}: leave out --model.components, "
            "which is for one file"
        )
    return folder


def _neighbours(folder: Path) -> str:
    """What lies where a folder is missing: names like it or, where there are none, all of them."""
    try:
        there = sorted(path.name for path in folder.parent.iterdir() if path.is_dir() or path.suffix == SINGLE_FILE)
    except OSError:  # that folder is missing, too
        return ""
    visible = [name for name in there if not name.startswith(".")]
    shown = get_close_matches(folder.name, visible, SHOWN) or visible[:SHOWN]
    if not shown:
        return ""
    others = "" if len(shown) == len(visible) else " and others"
    return f" ({folder.parent.absolute()} holds {', '.join(shown)}{others})"
