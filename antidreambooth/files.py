"""Files that are whole or not there."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from antidreambooth.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
LOCK = ".lock"  # in a folder that somebody works in; left there, as removing it would let two in


def cache_folder(kind: str) -> Path:
    """Where a kind of thing is kept that several runs need: under ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antidreambooth" / kind


@contextmanager
def writing(path: Path, advice: str | None = None) -> Iterator[None]:
    """Turns a refusal of the file system into one line, in a block that does nothing but write.

    Args:
        path: what is written, for the message.
        advice: what the user can do; to make room or to choose another folder when not given.

    Raises:
        InputError: the disk is full, the folder is not writable, and the like.
    """
    try:
        yield
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        usual = "make room" if refusal.errno in FULL else "make it writable, or choose another folder"
        raise InputError(f"{path} cannot be written: {refusal.strerror}; {advice or usual}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees half of it; its folder is created.

    Raises:
        InputError: It cannot be written; a file that was there stays as it was.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, as a rename must not cross file systems; short, as `path` may use up a name's 255 bytes.
        temporary = path.parent / f".{secrets.token_hex(8)}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # Ctrl-C too
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``folder`` when the block ends; after an error the old one stays.

    For one process at a time, see ``locked``.

    Args:
        folder: what is replaced; need not exist.

    Raises:
        InputError: it cannot be written.
    """
    fresh, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old"))
    with writing(folder):
        if old.exists() and not folder.exists():  # killed between the two renames below
            old.rename(folder)
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            yield fresh
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
        finally:
            if old.exists() and not folder.exists():  # Ctrl-C, or an error, between the two renames
                old.rename(folder)
            for left in (fresh, old):
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(folder: Path, advice: str) -> Iterator[None]:
    """For one process (and thread) at a time; the lock goes with the process, however that ends.

    Args:
        folder: what is worked in; created.
        advice: what whoever comes second can do.

    Raises:
        InputError: another one is at work there, or nothing can be written there.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"another run is at work in {folder}: wait until it has ended, or {advice}") from error
        except NotImplementedError:
            warnings.warn(
                f"the file system of {folder} has no locks: nothing keeps two runs from working there at once",
                stacklevel=3,
            )
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, record: Any) -> None:
    """Write plain values, indented. See ``write_atomically``."""
    write_atomically(path, (to_json(record, indent=2) + "\n").encode())


def to_json(record: Any, **how: Any) -> str:
    """Plain values as JSON, which knows no NaN: what is undefined is null. ``how`` is that of ``json.dumps``."""
    return json.dumps(_defined(record), allow_nan=False, **how)


def _defined(value: Any) -> Any:
    """None for each number that is not finite, however deep it lies."""
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refusal(error: Exception) -> OSError | None:
    """What the file system said, where an error is its own or a library's word for it."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None  # others, such as a download's, are of another kind
    if isinstance(error, SafetensorError):
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
    # torch's zip writer fails once more as it closes a file that could not be written, and that error comes out.
    of_torch = type(error) is RuntimeError and "inline_container" in str(error)
    return error.__context__ if of_torch and isinstance(error.__context__, OSError) else None
