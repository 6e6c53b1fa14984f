"""What a user's files are called: on the way in, and when they are given back."""

from __future__ import annotations

import re
from pathlib import Path


def given_names(wanted: list[tuple[str, str]]) -> list[str]:
    """The name of each file that is given back: the photo's own stem, and a suffix of the file's format.

    Args:
        wanted: the photo's own name, and the suffix of the cloaked file.
    """
    same = {".tif": (".tif", ".tiff"), ".jpg": (".jpg", ".jpeg", ".jpe", ".jfif")}
    taken: set[str] = set()
    names = []
    for own, suffix in wanted:
        path = Path(own)
        if path.suffix.lower() in same.get(suffix, (suffix,)):
            suffix = path.suffix
        stem, number = path.stem, 1
        while f"{stem}{suffix}".casefold() in taken:
            number += 1
            stem = f"{path.stem}-{number}"
        taken.add(f"{stem}{suffix}".casefold())
        names.append(f"{stem}{suffix}")
    return names


def clean_name(name: str) -> str:
    """A user's name of a photo, without folders and without what no file system takes."""
    last = re.split(r"[\\/]", name)[-1]
    kept = "".join(letter for letter in last if letter.isprintable() and letter not in '<>:"|?*').strip(". ")
    return kept[-120:] or "photo"
