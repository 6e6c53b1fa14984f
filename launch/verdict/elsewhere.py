"""Photos that another tool has cloaked, each found by the stem of its original's name; nothing is written to them."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import decode, find_photos, open_photo, orientation, read

SAME_SIZE = (
    "the comparison needs the same size, pixel on pixel; where the tool gives back smaller squares, crop and scale the "
    "originals to such squares first, and give both"
)
FLAG = "--protections"
SIDEWAYS = range(5, 9)  # orientations in EXIF in which width and height are exchanged

PAIR = re.compile(r"([^-={\[\s][^=]*)=(.+)")  # NAME=FOLDER; what begins with a bracket is a whole dictionary


def without_added(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """A command line without the protections that it adds to those of its config file, and these.

    Args:
        arguments: words, in which ``--protections`` may be followed by one or more NAME=FOLDER. What is no such pair
            is left for the parser: it stands for all protections.
    """
    kept: list[str] = []
    added: list[tuple[str, str]] = []
    taking, before = False, ""
    for word in arguments:
        value = word.removeprefix(FLAG + "=")
        pair = PAIR.fullmatch(value) if taking or value != word else None
        if pair:
            added.append((pair[1], pair[2]))
        elif word != FLAG:
            kept += [FLAG, word] if before == FLAG else [word]
        taking, before = word == FLAG or (taking and pair is not None), word
    return kept + [FLAG] * (before == FLAG), added


def folder_of(folder: str, person: str) -> Path:
    """Where a person's cloaked photos lie: ``PERSON/set_B`` as in the people's folder, or ``PERSON`` itself."""
    own = Path(folder).expanduser() / person
    return own / "set_B" if (own / "set_B").is_dir() else own


def require_people(protection: str, folder: str, everyone: Iterable[str]) -> None:
    """Looks for a folder of each person.

    Args:
        protection: its name.
        folder: of the photos that another tool has cloaked, with a folder for each person in it.
        everyone: the people by name.

    Raises:
        InputError: somebody has none; it names the folder that is expected.
    """
    names = list(everyone)
    missing = [name for name in names if not folder_of(folder, name).is_dir()]
    if not missing:
        return
    wanted = f"expected {Path(folder) / missing[0] / 'set_B'} or {Path(folder) / missing[0]}"
    if len(missing) == len(names) > 1:
        raise InputError(
            f"protection {protection}: {folder} holds a folder of none of the people ({', '.join(names[:5])}): {wanted}"
        )
    raise InputError(f"protection {protection}: {folder} holds no folder of {missing[0]}: {wanted}")


def by_stem(folder: Path) -> dict[str, Path]:
    """The photos of a folder by the stems of their names, in the order of their names.

    Raises:
        InputError: it holds no photo, or two of one stem.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files that are no photos: a tool may leave a log there
        paths = find_photos(folder)
    found: dict[str, Path] = {}
    for path in paths:
        if (other := found.setdefault(path.stem, path)) is not path:
            raise InputError(
                f"{other} and {path.name} have one stem, so that nobody can tell which photo belongs to which: keep one"
            )
    return found


def counterparts(originals: Path, cloaked: Path) -> dict[Path, Path]:
    """Each original with the photo that another tool has made of it, in the order of the originals' names.

    Raises:
        InputError: a photo is missing, there is one more, or two files have one stem; it names the file.
    """
    before, after = by_stem(originals), by_stem(cloaked)
    if missing := [path for stem, path in before.items() if stem not in after]:
        raise InputError(
            f"{cloaked} has no photo called {missing[0].stem} (such as {missing[0].stem}.png), which {missing[0]} is "
            "to be compared with: cloak that one, too"
        )
    if more := [path for stem, path in after.items() if stem not in before]:
        raise InputError(f"{more[0]} has no original of that stem in {originals}: take it out, or add the original")
    return {path: after[stem] for stem, path in before.items()}


def require_pairs(pairs: Mapping[Path, Path]) -> None:
    """Looks at each photo before anything is computed.

    Args:
        pairs: of ``counterparts``.

    Raises:
        InputError: one cannot be read, has another size than its original, or is the original; it names the file.
    """
    for original, cloaked in pairs.items():
        data = read(cloaked)
        wanted, found = size_of(read(original), original), size_of(data, cloaked)
        if wanted != found:
            sizes = f"{found[0]} x {found[1]} pixels, and {original.name} has {wanted[0]} x {wanted[1]}"
            raise InputError(f"{cloaked} has {sizes}: {SAME_SIZE}")
        if data == read(original):
            raise InputError(f"{cloaked} is the original itself, byte for byte: give what the tool has made of it")


def size_of(data: bytes, path: Path) -> tuple[int, int]:
    """Width and height of a photo as it is looked at; its pixels are not decoded.

    Raises:
        InputError: it is no image.
    """
    image: Image.Image = open_photo(data, str(path))
    width, height = image.size
    return (height, width) if orientation(image) in SIDEWAYS else (width, height)


def largest_change(pairs: Iterable[tuple[Path, Path]]) -> int:
    """The largest change of any value of any pixel, at the photos' own size, in 8-bit steps: the budget as measured."""
    most = 0
    for original, cloaked in pairs:
        before, after = (np.asarray(decode(read(path), str(path)), np.int16) for path in (original, cloaked))
        most = max(most, int(np.abs(after - before).max()))
    return most


def content_hash(photos: Mapping[str, Iterable[Path]]) -> str:
    """SHA-256 over everybody's photos: names of people, stems and bytes, wherever the folder lies.

    Args:
        photos: of each person.
    """
    entries = [
        [person, path.stem, hashlib.sha256(read(path)).hexdigest()]
        for person, paths in sorted(photos.items())
        for path in sorted(paths, key=lambda path: path.stem)
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
