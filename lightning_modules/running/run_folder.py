"""A run's folder: what is there when a run starts, and what of it must not be lost."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from antidreambooth.errors import InputError
from antidreambooth.files import LOCK, locked
from antidreambooth.provenance import photos_of, read_manifest

ANOTHER = "give another folder with --trainer.default_root_dir"
WAYS = f"{ANOTHER}, or --overwrite to replace it"
PICTURES = ("cloaked", "progress", "samples", "images")  # where runs write pictures, beside those in the folder itself
ON_THE_WAY = ("progress", "samples", "tensorboard")  # what is looked at while a run is under way
BEGUN = {"config.yaml", "checkpoints", "surrogates", *ON_THE_WAY, LOCK}  # what is there before the first checkpoint
# What torch.load raises for files that are cut, empty or something else, found by trying some thousands.
UNREADABLE = (
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
)


@contextmanager
def claimed(trainer: Trainer, data: Any, stage: str) -> Iterator[None]:
    """Reads the photos, sees that the run will not write to them, and keeps other runs out of its folder.

    Args:
        trainer: of the run; its ``default_root_dir`` is the run's folder.
        data: the data module, with ``files``.
        stage: ``fit`` or ``test``.

    Raises:
        InputError: a photo is of no use, or another run is at work in the folder.
    """
    read_photos(trainer, data, stage)
    with locked(Path(trainer.default_root_dir), ANOTHER) if trainer.is_global_zero else nullcontext():
        yield


def read_photos(trainer: Trainer, data: Any, stage: str) -> None:
    """Reads the photos, and sees that the run will not write to them; see ``claimed``.

    Raises:
        InputError: a photo is of no use.
    """
    data.setup(stage)
    require_apart(Path(trainer.default_root_dir), data.files)


def begin_fit(trainer: Trainer, data: Any, ckpt_path: str | None, overwrite: bool) -> str | None:
    """What a fit looks at before anything is computed: the checkpoint, and what is in the folder.

    Every rank looks, so that all of them end where one has to; the first one also clears away what was left.

    Args:
        trainer: of the run; its ``default_root_dir`` is the run's folder.
        data: the data module, with ``record()``.
        ckpt_path: as the user gave it.
        overwrite: whether the user wants what is there to be replaced.

    Returns:
        The checkpoint that the run resumes from; None where it starts from the beginning.

    Raises:
        InputError: something would be lost, or cannot be used.
    """
    found = look_at(trainer, data, ckpt_path, overwrite)
    if trainer.is_global_zero:
        clear(Path(trainer.default_root_dir), overwrite and found is None)
    if found is not None and Path(found).is_file():
        compute_as_before(read_checkpoint(Path(found)))
    return found


def look_at(trainer: Trainer, data: Any, ckpt_path: str | None, overwrite: bool) -> str | None:
    """The same without changing anything; see ``begin_fit``."""
    root = Path(trainer.default_root_dir)
    found = checkpoint_of(root, ckpt_path, trainer.max_epochs)
    require_fit(root, data.record(), found, overwrite)
    return found


def compute_as_before(checkpoint: dict[str, Any]) -> None:
    """Takes as many threads as a run began with, where the user says nothing: another number rounds differently."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(checkpoint.get("threads", torch.get_num_threads()))


def begin_test(trainer: Trainer, ckpt_path: str | None, overwrite: bool) -> None:
    """What a test looks at before anything is computed.

    Raises:
        InputError: a checkpoint is given, of which a test knows nothing, or another test's figures would be lost.
    """
    root = Path(trainer.default_root_dir)
    if ckpt_path is not None:
        raise InputError(f"a test reads the result that `fit` left in {root}: leave out --ckpt_path")
    if not overwrite and (root / "measures.json").exists():
        raise InputError(f"{root} holds the figures of a finished test: {WAYS}")


def require_apart(root: Path, sources: Iterable[Path]) -> None:
    """Refuses photos that lie where the run will write pictures.

    Raises:
        InputError: it names the photo.
    """
    places = [root.resolve(), *((root / name).resolve() for name in PICTURES)]
    for source in sources:
        folder = source.resolve().parent
        if folder == places[0] or any(folder.is_relative_to(place) for place in places[1:]):
            raise InputError(f"{source} lies where this run writes its own pictures, in {root}: {ANOTHER}")


def require_fit(root: Path, record: dict[str, Any], checkpoint: str | None, overwrite: bool) -> None:
    """Refuses a fit by which a finished or a longer run would be lost.

    Args:
        root: the run's folder.
        record: of the data module: which photos these are, by content.
        checkpoint: what the run resumes from; None where it starts from the beginning.
        overwrite: whether the user wants what is there to be replaced.

    Raises:
        InputError: it says what is there and what can be done.
    """
    before = read_manifest(root)
    known = {Path(entry["cloaked"]).name for entry in before["photos"]} if before and "rounds" in before else set()
    if strangers := sorted({file.name for file in (root / "cloaked").glob("*")} - known):
        raise InputError(
            f"{root / 'cloaked'} holds files that no run there has made ({', '.join(strangers[:5])}): move them away, "
            f"or {ANOTHER}"
        )
    kept = root / "checkpoints"
    if overwrite or (checkpoint and Path(checkpoint).resolve().is_relative_to(kept.resolve())):
        return  # a checkpoint knows itself which photos and settings it belongs to
    if before is not None:
        others = photos_of(before) != photos_of(record)
        if others or not checkpoint:
            raise InputError(f"{root} holds {described(before)}{' of other photos' if others else ''}: {ways(before)}")
    if (kept / "last.ckpt").exists():
        raise InputError(f"{root} holds the checkpoint of another run: resume that with --ckpt_path last, {WAYS}")


def described(manifest: dict[str, Any]) -> str:
    """What a manifest's run is, in a few words."""
    state = "a finished run" if manifest.get("complete", True) else "an interrupted run"
    unit = "rounds" if "rounds" in manifest else "steps"
    number = manifest.get(unit)
    return f"{state} ({number} {unit.removesuffix('s') if number == 1 else unit})"


def ways(manifest: dict[str, Any]) -> str:
    """What the user can do about a run that is there."""
    return WAYS if manifest.get("complete", True) else f"resume it with --ckpt_path last, {WAYS}"


def clear(root: Path, overwrite: bool) -> None:
    """Removes what a kill left half written and, to overwrite, the views of the run before; its result stays."""
    for part in (root / "checkpoints").glob(".*.part"):
        part.unlink(missing_ok=True)
    for name in ON_THE_WAY if overwrite else ():
        shutil.rmtree(root / name, ignore_errors=True)


def checkpoint_of(root: Path, ckpt_path: str | None, max_epochs: int | None) -> str | None:
    """The checkpoint that a run resumes from; None where it starts from the beginning.

    Args:
        root: the run's folder.
        ckpt_path: as given: None, ``last``, or a file (with some strategies a folder).
        max_epochs: how many epochs the run will have, or has had.

    Raises:
        InputError: there is none, it is damaged or something else, or it has more epochs behind it.
    """
    if ckpt_path is None:
        return None
    path = root / "checkpoints" / "last.ckpt" if ckpt_path == "last" else Path(ckpt_path).expanduser()
    if not path.exists():
        if ckpt_path == "last" and {file.name for file in root.glob("*")} <= BEGUN:
            return None  # a job that is put back into the queue is started in the same way each time
        also = "; one of the run itself is called last" if ckpt_path == "best" else ""
        raise InputError(
            f"there is no checkpoint {path}{also}: check --trainer.default_root_dir and --ckpt_path, or leave the "
            "latter out to start from the beginning"
        )
    if path.is_file():
        epochs = read_checkpoint(path).get("epoch", 0) + 1
        if max_epochs is not None and 0 <= max_epochs < epochs:
            raise InputError(
                f"{path} has {epochs} epochs (rounds) behind it, --trainer.max_epochs is {max_epochs}: give {epochs} "
                "or more"
            )
    return str(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint, its tensors still on the disk.

    Raises:
        InputError: the file is damaged, or no checkpoint.
    """
    if path.suffix == ".safetensors":
        raise InputError(f"{path} holds weights and no run: --ckpt_path takes a checkpoint (.ckpt)")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UNREADABLE as error:
        raise InputError(
            f"{path} is cut off, damaged or no checkpoint: start from an older one, or leave out --ckpt_path"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict) or not {"state_dict", "epoch", "pytorch-lightning_version"} <= content.keys():
        raise InputError(f"{path} is no checkpoint of a run: --ckpt_path takes a file from a run's checkpoints/")
    return content
