"""Photos of 16 bits a channel, of which Pillow gives eight without a word; libvips reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt16
from PIL import Image

DEEP = np.dtype(np.uint16)
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


def read(image: Image.Image, data: bytes) -> UInt16[np.ndarray, "h w c"]:
    """All channels of a file for which ``is_deep`` holds, as they are stored: not upright, alpha last.

    Raises:
        OSError: libvips cannot decode it.
    """
    vips = _vips()
    load = vips.Image.pngload_buffer if image.format == "PNG" else vips.Image.tiffload_buffer
    try:
        pixels: UInt16[np.ndarray, "h w c"] = load(data, access="sequential", fail_on="error").numpy()
    except vips.Error as error:
        raise OSError(str(error)) from error
    if pixels.dtype != DEEP:
        raise OSError(f"libvips gives {pixels.dtype} of a file with 16 bits")
    return pixels if pixels.ndim == 3 else pixels[..., None]


def has_alpha(image: Image.Image, channels: int) -> bool:
    """Whether the last of the channels that ``read`` gave is alpha: in a PNG always, in a TIFF where it says so."""
    return channels in (2, 4) and (image.format == "PNG" or getattr(image, "tag_v2", {}).get(_EXTRA, ())[:1] == (2,))


def _vips() -> Any:
    import pyvips  # only here: it is wanted for few photos

    pyvips.cache_set_max(0)  # it would hold on to the last photos
    return pyvips
