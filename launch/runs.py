"""Runs that a larger job starts: their command lines, what they depend on, whether they are done."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError
from antidreambooth.files import write_json
from antidreambooth.photos.decoding import find_photos, load_photos
from antidreambooth.provenance import differences, require_originals

# Both take the words that a user would have typed after `python cli.py`, such as ["fit", "--config=configs/aspl.yaml"].
Fit = Callable[[list[str]], None]  # runs them
Parse = Callable[[list[str]], Namespace]  # gives all settings of the run that they ask for, which is not started


def cloak_photos(
    done: Path, settings: dict[str, Any], how: str, given: dict[str, Any], fit: Fit, keep_models: bool = False
) -> None:
    """Cloaks somebody's photos, or resumes an interrupted run; does nothing where the photos are cloaked already.

    Args:
        done: the file that this writes at the end, in the run's folder.
        settings: all that the result depends on; a run in the same folder with other settings is refused.
        how: config file of a cloaking run, and its flags.
        given: names and values of further flags; those in ``how`` win over them.
        fit: runs a command line of this project.
        keep_models: whether the surrogates that FSMG trains first are kept.
    """
    if finished(done, settings):
        return
    root, begun = done.parent, done.with_name("begun.json")
    checkpoint = root / "checkpoints" / "last.ckpt"
    going_on = checkpoint.is_file()
    again = begun.is_file()  # what an earlier start of this very function left there may be replaced
    before = 0.0  # seconds of earlier starts
    if going_on and finished(begun, settings):
        before = json.loads(begun.read_text(encoding="utf-8")).get("seconds", 0.0)
    started = time.monotonic() - before
    write_json(begun, {"settings": settings, "seconds": before})
    try:
        start = {"ckpt_path": "last"} if going_on else {"overwrite": "true"} if again else {}
        fit(command(how, {**given, "trainer.default_root_dir": root, **start}))
    except BaseException:
        with suppress(InputError):  # on a full disk, say: what stopped the run is what counts
            write_json(begun, {"settings": settings, "seconds": time.monotonic() - started})
        raise
    made = {"seconds": time.monotonic() - started, "passes": passes_of(root)}
    if not keep_models:
        shutil.rmtree(root / "surrogates", ignore_errors=True)
    write_json(done, {"settings": settings, **made, "complete": True})
    checkpoint.unlink(missing_ok=True)
    begun.unlink()


def command(how: str, given: dict[str, Any]) -> list[str]:
    """The command line of a fit: the config file, then the given flags, then the config file's own flags."""
    config, *flags = shlex.split(how) or [""]
    return ["fit", f"--config={located(config)}", *(f"--{name}={value}" for name, value in given.items()), *flags]


def backbones_of(model: Namespace) -> list[Source]:
    """The base models that the settings of a module name, the first one first; none for a module without any."""
    if model.get("backbone") is None:
        return []
    others = model.get("ensemble.backbones") or []
    named = [Source(**vars(other)) if isinstance(other, Namespace) else other for other in others]
    beside = [model.get(name) for name in ("revision", "variant", "components")]
    return Source.several([Source(model.backbone, *beside), *named])


def of_base_model(source: Source, how: str) -> dict[str, str]:
    """Names and values of the flags by which a run is given a base model, beside a config file and its own flags.

    A run that names another model by its own flags gets no revision, variant and components: they are of this one.
    """
    own = any(word.partition("=")[0] == "--model.backbone" for word in shlex.split(how))
    given = {"backbone": source.name} if own else source.given
    return {f"model.{name}": value for name, value in given.items()}


def passes_of(root: Path) -> dict[str, int]:
    """How many images a cloaking run sent through each network; FSMG's training of surrogates is counted, too."""
    parts = [root / "manifest.json", *root.glob("surrogates/*/surrogate.json")]
    counts = Counter[str]()
    for part in parts:
        counts.update(json.loads(part.read_text(encoding="utf-8"))["passes"])
    return dict(counts)


@cache
def contents(folder: str, originals: bool = False) -> list[str]:
    """SHA-256 of each photo of a folder.

    Args:
        folder: of photos.
        originals: whether photos that a run has cloaked are refused: figures that compare with them would be wrong.

    Raises:
        InputError: a photo cannot be decoded, or is no original.
    """
    photos = load_photos(Path(folder), 8)
    if originals:
        require_originals([(photo.path, photo.sha256) for photo in photos], "give the original")
    return [photo.sha256 for photo in photos]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each photo of a folder, by file name. Decodes none of them, as there may be ten thousand folders."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in find_photos(folder)}


def finished(record: Path, settings: dict[str, Any]) -> bool:
    """Whether a run is done.

    Raises:
        InputError: it is done, but with other settings: the folder is another experiment's.
    """
    if not record.is_file():
        return False
    changed = differences(json.loads(record.read_text(encoding="utf-8"))["settings"], settings)
    if changed:
        raise InputError(
            f"{record.parent} was made with other settings ({changed[0]}): delete that folder, or write to another one "
            f"(a verdict's --name, people's --output, a run's --trainer.default_root_dir)"
        )
    return True


def is_config(text: str) -> bool:
    """Whether this looks like the path of a config file; whether it exists is another question."""
    return text.endswith((".yaml", ".yml"))


def located(config: str) -> str:
    """A config file's path: as given or, where there is no such file, relative to this repository.

    So ``configs/aspl.yaml`` is found from whatever folder a command is started in.
    """
    own = Path(__file__).parent.parent / config
    return str(own) if own.is_file() and not Path(config).is_file() else config
