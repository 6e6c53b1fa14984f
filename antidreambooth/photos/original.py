"""A photo as its file holds it: its own size, its own numbers, and what is kept beside them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from antidreambooth.photos import sixteen
from antidreambooth.photos.decoding import (
    decode_pixels,
    decoding,
    is_usable,
    on_background,
    open_photo,
    orientation,
    read,
    separate,
    to_srgb,
)
from antidreambooth.photos.formats import FORMATS, why_undecoded, why_unknown
from antidreambooth.photos.metadata import Metadata, colour_chunks, metadata_of

ROWS = 256  # worked on at a time, so that nothing of a large photo's size is held but the photo

Numbers = UInt8[np.ndarray, "h w c"] | UInt16[np.ndarray, "h w c"]
Alpha = UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"]

_INKS = {"CMYK": "the inks of CMYK, as it is RGB now", "LAB": "the L*a*b* numbers, as it is RGB now"}
_DEPTH_OF_AVIF = re.compile(rb"pixi\0{4}.(.)", re.DOTALL)  # ISO 23008-12, 6.5.6
_DEPTH_OF_JPEG_2000 = re.compile(rb"\xff\x4f\xff\x51.{38}(.)", re.DOTALL)  # ITU T.800, A.5.1: bits less one
_BEGINNING = 4096  # bytes that are searched for them


@dataclass(frozen=True, eq=False)
class Original:
    """A photo as its file holds it, upright."""

    name: str  # what messages call it
    format: str  # Pillow's name of the file's format: JPEG, MPO, PNG, TIFF, WEBP, HEIF ...
    numbers: Numbers = field(repr=False)  # of grey or RGB, as they are stored: no profile is applied to them
    alpha: Alpha | None = field(repr=False)
    profile: bytes | None = field(repr=False)  # the ICC profile that says which colours the numbers are
    turned: int  # how the file stored it, 1 to 8 as in EXIF; a HEIC is upright by its own rules, so it says 1
    kept: Metadata = field(repr=False)
    whole: Metadata = field(repr=False)  # what is kept where all is to be kept that is no second picture
    chunks: bytes = field(repr=False)  # of a PNG: its own words on colour and resolution

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in upright pixels."""
        return self.numbers.shape[1], self.numbers.shape[0]

    @property
    def exif(self) -> bytes | None:
        """The EXIF block anew, from a list of what is kept, with orientation 1."""
        return self.kept.exif

    @property
    def removed(self) -> tuple[str, ...]:
        """What the file holds and this does not, in plain words."""
        return self.kept.removed

    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """What a trainer reads: RGB of 8 bits (the high byte of 16), without alpha or the profile."""
        seen: UInt8[np.ndarray, "h w c"] = high_byte(self.numbers)
        return seen if seen.shape[-1] == 3 else np.repeat(seen, 3, axis=-1)

    def looks(self) -> Image.Image:
        """What people see: sRGB, transparent parts on white as ``decode`` puts them; mode RGB."""
        seen = high_byte(self.numbers)
        colours = Image.fromarray(seen if seen.shape[-1] == 3 else seen[..., 0])
        alpha = None if self.alpha is None else Image.fromarray(high_byte(self.alpha))
        return on_background(to_srgb(colours, self.profile, self.name), alpha)


def read_original(data: bytes, name: str) -> Original:
    """A photo's file as it is: upright, at its own size, in its own numbers and depth.

    What no trainer reads as it is becomes what it reads: a palette and YCbCr become RGB, inks and L*a*b* become sRGB
    (through the profile, which is gone then), black and white becomes grey. A profile that cannot be used is left out.

    Args:
        data: bytes of the file; they decide the format, not the suffix.
        name: what messages call the file.

    Raises:
        InputError: as ``decode``.
    """
    return original_of(open_photo(data, name), name, data)


def original_of(image: Image.Image, name: str, data: bytes = b"") -> Original:
    """The same of a picture that is open already.

    Args:
        image: from Pillow, decoded or not yet.
        name: what messages call it.
        data: bytes of its file, where there is one. Without them the depth is Pillow's, and a TIFF has no metadata.

    Raises:
        InputError: as ``decode``, or it has been closed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with decoding(name, lambda: why_undecoded(image.format)):
            stored = getattr(image, "tag_v2", {}).get(0x0112, 1)  # Pillow turns a TIFF and forgets how it lay
            decode_pixels(image, name)
            kept, whole = metadata_of(image, data)
        lies = orientation(image)
        turned = stored if stored in range(2, 9) else lies
        profile, lost = _profile(image)
        if sixteen.is_deep(image, data):
            with decoding(name, lambda: why_undecoded(image.format)):
                numbers, alpha = _deep(image, data)
            lies = turned  # libvips turns nothing
        else:
            lost += _lost_depth(image, data)
            numbers, alpha = _assembled(_shallow(image, name), image.height)
    return Original(
        name=name,
        format=image.format or "",
        numbers=turn(numbers, lies),
        alpha=None if alpha is None else turn(alpha, lies),
        profile=profile,
        turned=turned,
        kept=Metadata(kept.exif, removed=(*kept.removed, *lost)),
        whole=Metadata(whole.exif, whole.xmp, whole.iptc, (*whole.removed, *lost)),
        chunks=colour_chunks(data),
    )


def uncompressed(path: Path) -> int:
    """Bytes of a photo's numbers, alpha included, at the most: from its header, without decoding it.

    Raises:
        InputError: the file cannot be read, or is no photo.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with decoding(path.name, lambda: why_unknown(read(path))), path.open("rb") as file:
            image = Image.open(file, formats=FORMATS)
            file.seek(0)
            deep = image.mode.startswith("I") or sixteen.is_deep(image, file.read(_BEGINNING))
            grey = image.mode in ("1", "L") or image.mode.startswith("I")
            channels = 4 if image.has_transparency_data else 1 if grey else 3
            return image.width * image.height * channels * (2 if deep else 1)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels that lie as an EXIF orientation (1 to 8) says, upright; ``h w`` or ``h w c``."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def turn_back(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright pixels as they lie in a file with this orientation."""
    return turn(pixels, {6: 8, 8: 6}.get(orientation, orientation))


def high_byte(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 8 bits as they are; of 16 bits, their upper half, which is what Pillow gives trainers."""
    return numbers if numbers.dtype == np.uint8 else (numbers >> 8).astype(np.uint8)


def _profile(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    """The profile's bytes where it can be used and its numbers are kept, and what is lost."""
    profile = image.info.get("icc_profile")
    inks = (_INKS[image.mode],) if image.mode in _INKS else ()
    if not profile or inks:
        return None, inks
    mode = "L" if image.mode in ("1", "L", "LA") or image.mode.startswith("I") else "RGB"
    return (profile, ()) if is_usable(profile, mode) else (None, ("a colour profile that cannot be used",))


def _lost_depth(image: Image.Image, data: bytes) -> tuple[str, ...]:
    """What is lost of a file with more than 8 bits a channel that is read as 8."""
    bits = image.info.get("bit_depth", 8)
    tags = getattr(image, "tag_v2", {}).get(258, (8,))
    if image.format == "AVIF" and (match := _DEPTH_OF_AVIF.search(data[:_BEGINNING])):
        bits = match[1][0]
    if image.format == "JPEG2000" and (match := _DEPTH_OF_JPEG_2000.search(data[:_BEGINNING])):
        bits = (match[1][0] & 127) + 1
    deep = max(bits, *tags) > 8 and not image.mode.startswith("I")
    return ("all but the upper 8 bits of each number",) if deep else ()


Strip = tuple[np.ndarray, np.ndarray | None]  # some rows: numbers (h w c), alpha (h w)


def _deep(image: Image.Image, data: bytes) -> Strip:
    image.close()  # lets go of Pillow's pixels; what it knows of the file stays
    height, strips = sixteen.read(image, data, ROWS)

    def separated() -> Iterator[Strip]:
        for pixels in strips:
            channels = pixels.shape[-1]
            alpha = pixels[..., -1] if sixteen.has_alpha(image, channels) else None
            yield pixels[..., : 1 if channels < 3 else 3], alpha

    return _assembled(separated(), height)


def _shallow(image: Image.Image, name: str) -> Iterator[Strip]:
    if image.mode == "CMYK":
        profile = image.info.get("icc_profile")
        image = to_srgb(image, profile if profile and is_usable(profile, "CMYK") else None, name)
    width, height = image.size
    for top in range(0, height, ROWS):
        yield _rows(image.crop((0, top, width, min(top + ROWS, height))), name)


def _assembled(strips: Iterable[Strip], height: int) -> Strip:
    """A whole photo, of which each strip is let go before the next one is made."""
    top, numbers, alpha = 0, np.empty((0, 0, 3), np.uint8), None
    for colours, clear in strips:
        if not top:
            numbers = np.empty((height, *colours.shape[1:]), colours.dtype)
            alpha = None if clear is None else np.empty((height, colours.shape[1]), clear.dtype)
        rows = slice(top, top + len(colours))
        numbers[rows] = colours
        if alpha is not None and clear is not None:
            alpha[rows] = clear
        top = rows.stop
    return numbers, alpha


def _rows(image: Image.Image, name: str) -> Strip:
    colours, alpha = separate(image, name)
    if not image.mode.startswith("I"):
        return np.atleast_3d(np.asarray(colours)), None if alpha is None else np.asarray(alpha)
    levels, clear = (
        np.asarray(image).astype(np.uint16),
        image.info.get("transparency"),
    )  # separate() made 8 bits of them
    opaque = None if clear is None else np.where(levels == clear, 0, 65535).astype(np.uint16)
    return levels[..., None], opaque
