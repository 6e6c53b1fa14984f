"""Decodes pictures in a process of its own, with limits: ``python -m page.preview`` and what it is asked for.

Photos come from anywhere, and decoders have had holes. This process has Pillow and pillow-heif, so much memory and
time, nothing to do with the network, and is gone afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from page.texts import say

PIXELS = 2**27 + 2**25  # 168 million; the engine's own limit is a little higher
SIDE = 1600  # of a preview, in pixels
CLOSE = 640  # side of the part that is shown pixel by pixel
MEMORY, SECONDS = 3 * 2**30, 60  # of this process
SHARES = {"weak": 4, "usual": 2, "strong": 1}  # of the strongest change: what it is divided by
AMPLIFIED = 8  # times: the difference that is shown
SUFFIX = {  # by Pillow's names of formats
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "AVIF": ".avif",
    "HEIF": ".heic",
    "JPEG2000": ".jp2",
    "GIF": ".gif",
    "PPM": ".png",
    "QOI": ".png",
}
READ = [name for name in SUFFIX if name not in ("MPO", "PPM", "QOI")]  # MPO is opened as JPEG


class RefusedPhoto(Exception):  # noqa: N818 (said to the user in a sentence)
    """A photo that is not taken; the message says why."""


def ask(*words: str | Path) -> dict[str, Any]:
    """Starts the process and waits for it.

    Args:
        words: ``look FILE PREVIEW``, ``compare BEFORE AFTER FOLDER`` or ``strengths BEFORE AFTER FOLDER``, see below.

    Raises:
        RefusedPhoto: the file is no photo that can be read, or too much for the limits.
    """
    command = [sys.executable, "-m", "page.preview", *map(str, words)]
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=2 * SECONDS, cwd=root, check=False
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:  # killed by a limit: no answer
        raise RefusedPhoto(say("photo_too_much")) from error
    if "refused" in answer:
        raise RefusedPhoto(answer["refused"])
    return answer


def limit() -> None:
    """So much memory and time, and no more; Windows has no such limits."""
    if sys.platform == "win32":
        return
    import resource  # not on Windows

    for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, hard))


def opened(file: Path) -> Any:
    """A picture whose header says that it can be decoded: its format and its size are known, no pixel yet.

    Raises:
        RefusedPhoto: it is no photo, or too large.
    """
    from PIL import Image
    from pillow_heif import register_heif_opener

    from antidreambooth.photos.formats import is_raw, why_unknown

    register_heif_opener()
    Image.MAX_IMAGE_PIXELS = None  # the limit is below
    try:
        picture = Image.open(file, formats=READ)
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        with file.open("rb") as beginning:
            raise RefusedPhoto(in_short(why_unknown(beginning.read(1000)))) from error
    if is_raw(picture):
        raise RefusedPhoto(say("photo_raw"))
    if picture.mode == "F":
        raise RefusedPhoto(say("photo_float"))
    if picture.width * picture.height > PIXELS:
        raise RefusedPhoto(say("photo_pixels", megapixels=round(picture.width * picture.height / 1e6)))
    return picture


def in_short(why: str) -> str:
    """The engine's reason for which a file cannot be opened, without what only its terminal's users can do."""
    if why.startswith("it is no image:"):
        return say("photo_none")
    if why.startswith("it is no image, or"):
        return say("photo_strange")
    return say("photo_unknown", why=why.removesuffix("; remove it or save it anew"))


def upright(picture: Any) -> Any:
    """A picture as people see it, in RGB.

    Raises:
        RefusedPhoto: it is cut off or damaged.
    """
    from PIL import Image, ImageOps

    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits of grey
            picture = picture.point(lambda level: level / 256).convert("L")
        if picture.has_transparency_data:
            paper = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(paper, picture.convert("RGBA"))
        return picture.convert("RGB")
    except (OSError, EOFError, SyntaxError, ValueError, RuntimeError) as error:
        raise RefusedPhoto(say("photo_damaged")) from error


def look(file: Path, preview: Path) -> dict[str, Any]:
    """Checks a photo by decoding all of it, and writes its preview, a JPEG.

    Returns:
        ``suffix`` of its format, ``width`` and ``height`` of the upright photo.
    """
    picture = opened(file)
    suffix = SUFFIX[picture.format]
    seen = upright(picture)
    width, height = seen.size
    seen.thumbnail((SIDE, SIDE))
    seen.save(preview, "JPEG", quality=90)
    return {"suffix": suffix, "width": width, "height": height}


def compare(before: Path, after: Path, folder: Path) -> dict[str, Any]:
    """Writes what the page shows of a photo and its changed copy, without loss: a preview would wash the change out.

    Writes ``before.png``, ``after.png`` and ``difference.png`` of the whole photo, and ``close-before.png``,
    ``close-after.png`` and ``close-difference.png`` of its middle, pixel by pixel.
    """
    wholes, closes = [], []
    for file in (before, after):  # one at a time is in memory at its own size
        picture = upright(opened(file))
        closes.append(picture.crop(middle(picture.size)))
        picture.thumbnail((SIDE, SIDE))
        wholes.append(picture)
    if wholes[0].size != wholes[1].size:
        raise RefusedPhoto(say("photo_damaged"))
    named = {"before": wholes[0], "after": wholes[1], "difference": apart(*wholes)}
    named |= {"close-before": closes[0], "close-after": closes[1], "close-difference": apart(*closes)}
    return write(named, folder)


def strengths(before: Path, after: Path, folder: Path) -> dict[str, Any]:
    """Writes how a photo changes at each strength, pixel by pixel, given how it changes at the strongest.

    Writes ``before.png``, and of each strength ``NAME.png`` and ``NAME-difference.png``.
    """
    from PIL import ImageChops

    was, strongest = (picture.crop(middle(picture.size)) for picture in map(upright, map(opened, (before, after))))
    named = {"before": was}
    for name, share in SHARES.items():
        more, less = ImageChops.subtract(strongest, was, share), ImageChops.subtract(was, strongest, share)
        named[name] = ImageChops.subtract(ImageChops.add(was, more), less)
        named[f"{name}-difference"] = apart(was, named[name])
    return write(named, folder)


def write(named: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes pictures without loss; each is whole as soon as it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in named.items():
        part = folder / f".{name}.{os.getpid()}"
        one.save(part, "PNG", compress_level=1)
        part.replace(folder / f"{name}.png")
    return {"written": len(named)}


def middle(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box that is shown pixel by pixel: a little above the middle, where faces are."""
    width, height = size
    side = min(CLOSE, width, height)
    left, top = (width - side) // 2, max(0, min(height - side, round(height * 0.42) - side // 2))
    return left, top, left + side, top + side


def apart(one: Any, other: Any) -> Any:
    """The difference of two pictures, made stronger: grey where there is none."""
    from PIL import Image, ImageChops

    grey = Image.new("RGB", one.size, (128, 128, 128))
    parts = ImageChops.subtract(other, one), ImageChops.subtract(one, other)
    more, less = (part.point(lambda level: min(127, AMPLIFIED * level)) for part in parts)
    return ImageChops.subtract(ImageChops.add(grey, more), less)


ASKED: dict[str, Callable[..., dict[str, Any]]] = {"look": look, "compare": compare, "strengths": strengths}


def main(words: list[str]) -> None:
    """Does what it is asked for; prints the answer as JSON."""
    limit()
    warnings.simplefilter("ignore")
    what, *files = words
    try:
        answer = ASKED[what](*map(Path, files))
    except RefusedPhoto as refused:
        answer = {"refused": str(refused)}
    except MemoryError:
        answer = {"refused": say("photo_too_much")}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
