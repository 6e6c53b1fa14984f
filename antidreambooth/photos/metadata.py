"""What a photo's file holds beside the photo: which of it is kept, and what is not, in plain words."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image

from antidreambooth.photos import exif

# PNG's own words on colour and resolution, which say nothing of a person: kept as they stand.
_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"pHYs")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# XMP that holds a picture (a thumbnail, a depth map) or tells of one that is gone (a gain map, a film).
_XMP_PICTURES = re.compile(rb"xmpGImg|Thumbnails|hdrgm|GainMap|GDepth|GImage|MotionPhoto|MicroVideo|Container:")
_RESOURCE = 0x0404  # of a Photoshop block: IPTC-NAA; others hold thumbnails
_C2PA = re.compile(rb"jumb.{0,64}c2pa|\xd8\xfe\xc3\xd6\x1b\x0e\x48\x3c\x92\x97\x58\x28\x87\x7e\xc4\x81", re.DOTALL)


@dataclass(frozen=True)
class Metadata:
    """What is written beside the pixels."""

    exif: bytes | None = None  # a block without the words "Exif\0\0" before it; its orientation is 1
    xmp: bytes | None = None
    iptc: bytes | None = None  # IPTC-NAA records
    removed: tuple[str, ...] = ()  # what the file held and this does not, in plain words


def metadata_of(image: Image.Image, data: bytes) -> tuple[Metadata, Metadata]:
    """What is kept of a photo's metadata: by default, and where all is to be kept that is no second picture.

    Args:
        image: decoded.
        data: the file that it was read from; without it, nothing is known but what Pillow remembers.
    """
    block = _exif_of(image, data)
    xmp, iptc = _xmp_of(image, block), _iptc_of(image, block)
    others = [*_other_pictures(image, data)]
    texts = _texts_of(image, data)
    words = [*(exif.removed(block) if block else ()), *others]
    words += ["XMP metadata"] * (xmp is not None) + ["IPTC metadata"] * (iptc is not None) + texts
    default = Metadata(exif=_serialised(exif.kept(block)) if block else None, removed=_once(words))
    words = [*(exif.pictures(block) if block else ()), *others, *texts]
    if xmp and _XMP_PICTURES.search(xmp):
        xmp, words = None, [*words, "XMP metadata, as it tells of other pictures"]
    whole = _serialised(exif.without_pictures(block)) if block else None
    return default, Metadata(whole, xmp, iptc, _once(words))


def colour_chunks(data: bytes) -> bytes:
    """The chunks of a PNG that say what its numbers mean and how many make an inch; nothing of other files."""
    return b"".join(bytes(whole) for kind, whole in _chunks(data) if kind in _CHUNKS)


def _exif_of(image: Image.Image, data: bytes) -> exif.Block | None:
    block = image.info.get("exif")
    if image.format == "TIFF":
        block = data
    elif block is None and isinstance(text := image.info.get("Raw profile type exif"), str):  # ImageMagick's PNGs
        with suppress(ValueError):
            block = bytes.fromhex("".join(text.split("\n")[3:]))
    parsed = exif.parse(block) if isinstance(block, bytes) else None
    if parsed is not None and image.format == "TIFF":
        parsed.thumbnail = False  # its second directory is its second page
    return parsed


def _xmp_of(image: Image.Image, block: exif.Block | None) -> bytes | None:
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if image.format == "TIFF" and block is not None:
        xmp = block.main.entries.get(exif.XMP, (0, None))[1]
    return xmp.encode() if isinstance(xmp, str) else xmp if isinstance(xmp, bytes) else None


def _iptc_of(image: Image.Image, block: exif.Block | None) -> bytes | None:
    if image.format == "TIFF" and block is not None:
        return block.main.entries.get(exif.IPTC, (0, None))[1]
    resources = image.info.get("photoshop")
    found = resources.get(_RESOURCE) if isinstance(resources, dict) else None
    return found if isinstance(found, bytes) else None


def _other_pictures(image: Image.Image, data: bytes) -> Iterator[str]:
    """What else is in the file and is, or tells of, the photo as it was."""
    info, frames = image.info, 1
    with suppress(OSError, EOFError, SyntaxError, ValueError, struct.error):  # what is broken behind the photo
        frames = getattr(image, "n_frames", 1)
    if image.format == "MPO" or "mp" in info:
        yield "a second picture in the file, such as a gain map"
    elif image.format == "TIFF" and frames > 1:
        yield "all pages but the first"
    elif frames > 1:
        yield "all pictures but the first" if image.format == "HEIF" else "all frames but the first"
    elif image.format == "JPEG" and _follows_jpeg(data):
        yield "what follows the photo in its file, such as a film"
    if info.get("thumbnails"):
        yield "a thumbnail of the photo"
    if info.get("aux") or (image.format in ("HEIF", "AVIF") and b"tmap" in data[:4096]):
        yield "a gain map or another auxiliary picture"
    if info.get("depth_images"):
        yield "a depth map"
    if {330} & set(getattr(image, "tag_v2", ())):
        yield "previews"
    if _C2PA.search(data):
        yield "content credentials (C2PA)"


def _texts_of(image: Image.Image, data: bytes) -> list[str]:
    texts = [whole for kind, whole in _chunks(data) if kind in _TEXTS]
    own = [text for text in texts if b"XML:com.adobe.xmp" not in bytes(text[:40])]
    comment = image.format != "JPEG2000" and image.info.get("comment")  # there, it is the name of the encoder
    return ["texts in the file"] if own or comment else []


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and bytes of each chunk of a PNG (PNG 3, section 5); nothing of other files."""
    if not data.startswith(b"\x89PNG"):
        return
    view, place = memoryview(data), 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        yield kind, view[place : place + 12 + length]
        place += 12 + length


def _follows_jpeg(data: bytes) -> bool:
    """Whether anything but zeros follows the end of a JPEG (ITU T.81, Annex B)."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    end = data.find(b"\xff\xd9", place)  # which no coded pixels hold
    return end >= 0 and bool(data[end + 2 :].strip(b"\0"))


def _serialised(block: exif.Block) -> bytes | None:
    return exif.serialised(block, 1) if block.main else None


def _once(words: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))
