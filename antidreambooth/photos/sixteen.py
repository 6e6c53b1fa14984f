"""Photos of 16 bits a channel, of which Pillow gives eight without a word; libvips reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt16
from PIL import Image

_PHOTOMETRIC, _BITS, _EXTRA, _SAMPLE_FORMAT = 262, 258, 338, 339  # TIFF 6.0


def is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether a file that Pillow opened has colours, or grey and alpha, of 16 bits, and libvips can tell which.

    Grey without alpha is not meant: Pillow reads its 16 bits. A TIFF whose alpha is multiplied in comes as 8 bits.
    """
    if image.format == "PNG":
        return len(data) > 25 and data[24] == 16 and data[25] in (2, 4, 6)
    tags = getattr(image, "tag_v2", {})
    deep = bool(data) and set(tags.get(_BITS, ())) == {16} and tags.get(_PHOTOMETRIC) == 2
    return deep and set(tags.get(_SAMPLE_FORMAT, (1,))) == {1} and tags.get(_EXTRA, ())[:1] != (1,)


def read(image: Image.Image, data: bytes, rows: int) -> tuple[int, Iterator[UInt16[np.ndarray, "h w c"]]]:
    """All channels of a file for which ``is_deep`` holds, as they are stored: not upright, alpha last.

    Args:
        image: as Pillow opened it.
        data: the file.
        rows: of each strip.

    Returns:
        The height, and strips that are decoded as they are asked for.

    Raises:
        OSError: libvips cannot decode it; the strips may raise it, too.
    """
    vips = _vips()
    load = vips.Image.pngload_buffer if image.format == "PNG" else vips.Image.tiffload_buffer
    try:
        found = load(data, access="sequential", fail_on="error")
    except vips.Error as error:
        raise OSError(str(error)) from error
    if found.format != "ushort":
        raise OSError(f"libvips gives {found.format} of a file with 16 bits")
    return found.height, _strips(found, rows)


def has_alpha(image: Image.Image, channels: int) -> bool:
    """Whether the last of the channels that ``read`` gives is alpha: in a PNG always, in a TIFF where it says so."""
    return channels in (2, 4) and (image.format == "PNG" or getattr(image, "tag_v2", {}).get(_EXTRA, ())[:1] == (2,))


def _strips(found: Any, rows: int) -> Iterator[UInt16[np.ndarray, "h w c"]]:
    vips = _vips()
    region = vips.Region.new(found)
    for top in range(0, found.height, rows):
        height = min(rows, found.height - top)
        try:
            strip = np.frombuffer(region.fetch(0, top, found.width, height), np.uint16)
        except vips.Error as error:
            raise OSError(str(error)) from error
        yield strip.reshape(height, found.width, found.bands)


def _vips() -> Any:
    import pyvips  # only here: it is wanted for few photos

    pyvips.cache_set_max(0)  # it would hold on to the last photos
    return pyvips
