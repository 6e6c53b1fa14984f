"""A photo's numbers, alpha, profile and metadata as the bytes of a file; lossless but for JPEG."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from antidreambooth.photos import exif, sixteen
from antidreambooth.photos.metadata import Metadata
from antidreambooth.photos.original import ROWS, Alpha, Numbers

LEVEL = 4  # of zlib, for PNG and TIFF; 6 takes three times as long for 16 bits, and files are 3 % smaller

# Longest side that a format can hold, in pixels; what no format of theirs holds becomes PNG.
LONGEST = {"WEBP": 16383, "JPEG": 65535}


@dataclass(frozen=True, eq=False)
class Content:
    """What goes into a file, as it is to lie there."""

    numbers: Numbers
    alpha: Alpha | None
    profile: bytes | None
    metadata: Metadata
    chunks: bytes = b""  # of a PNG, as they stand in one
    quality: int = 100  # of JPEG

    @property
    def pixels(self) -> np.ndarray:
        """Numbers with alpha as the last channel; ``h w c``, ``h w`` of grey alone."""
        if self.alpha is not None:
            return np.concatenate([self.numbers, self.alpha[..., None]], axis=-1)
        return self.numbers if self.numbers.shape[-1] == 3 else self.numbers[..., 0]


def encoded(content: Content, kind: str) -> bytes:
    """The bytes of a file.

    Args:
        content: with 8 bits, and without alpha where ``kind`` is BMP or JPEG.
        kind: PNG, TIFF, WEBP, BMP or JPEG.
    """
    return {"PNG": _png, "TIFF": _tiff, "WEBP": _webp, "BMP": _bmp, "JPEG": _jpeg}[kind](content)


def _png(content: Content) -> bytes:
    if content.numbers.dtype == sixteen.DEEP:
        plain = sixteen.png(np.atleast_3d(content.pixels), LEVEL)
    else:
        plain = _saved(content, "PNG", compress_level=LEVEL)
    head, pixels = (
        8 + 25,
        plain.index(b"IDAT") - 4,
    )  # signature and IHDR (PNG 3, section 5.6); libvips adds a resolution
    return b"".join([plain[:head], content.chunks, *_beside(content), plain[pixels:]])


def _beside(content: Content) -> Iterator[bytes]:
    """Profile and metadata as chunks of a PNG."""
    metadata = content.metadata
    if content.profile:
        yield _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(content.profile))
    if metadata.exif:
        yield _chunk(b"eXIf", metadata.exif)
    if metadata.xmp:
        yield _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp)
    if metadata.iptc:  # ImageMagick's way, which exiftool reads, too
        text = f"\niptc\n{len(metadata.iptc):8}\n{metadata.iptc.hex()}\n"
        yield _chunk(b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(text.encode()))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _webp(content: Content) -> bytes:
    beside = {"icc_profile": content.profile, "exif": content.metadata.exif, "xmp": content.metadata.xmp}
    given = {name: value for name, value in beside.items() if value}
    return _saved(content, "WEBP", lossless=True, exact=True, quality=20, method=1, **given)  # quality: of the search


def _bmp(content: Content) -> bytes:
    return _saved(content, "BMP")


def _jpeg(content: Content) -> bytes:
    metadata, beside = content.metadata, {"icc_profile": content.profile, "xmp": content.metadata.xmp}
    given = {name: value for name, value in beside.items() if value}
    if metadata.exif:
        given["exif"] = b"Exif\0\0" + metadata.exif
    if metadata.iptc:
        padded = metadata.iptc + bytes(len(metadata.iptc) % 2)
        block = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(metadata.iptc)) + padded
        given["extra"] = b"\xff\xed" + struct.pack(">H", len(block) + 2) + block
    return _saved(content, "JPEG", quality=content.quality, subsampling=0, **given)


def _saved(content: Content, kind: str, **how: object) -> bytes:
    buffer = BytesIO()
    Image.fromarray(content.pixels).save(buffer, kind, **how)
    return buffer.getvalue()


def _tiff(content: Content) -> bytes:
    """A baseline TIFF (TIFF 6.0) with deflate and horizontal differences, in the byte order of its metadata.

    Pillow would write neither 16 bits of colour nor names with accents, and libvips no EXIF.
    """
    block = (exif.parse(content.metadata.exif) if content.metadata.exif else None) or exif.Block()
    pixels = np.atleast_3d(content.pixels)
    strips = [zlib.compress(strip, LEVEL) for strip in _differences(pixels, block.order)]
    places = np.cumsum([8, *map(len, strips)])
    (height, width, channels), bits = pixels.shape, 8 * pixels.itemsize

    def entry(kind: int, *values: int) -> exif.Entry:
        return kind, struct.pack(f"{block.order}{len(values)}{'H' if kind == exif.SHORT else 'I'}", *values)

    entries = {
        256: entry(exif.LONG, width),
        257: entry(exif.LONG, height),
        258: entry(exif.SHORT, *[bits] * channels),
        259: entry(exif.SHORT, 8),  # deflate
        262: entry(exif.SHORT, 2 if channels > 2 else 1),  # RGB, or grey with black as 0
        273: entry(exif.LONG, *places[:-1].tolist()),
        277: entry(exif.SHORT, channels),
        278: entry(exif.LONG, ROWS),
        279: entry(exif.LONG, *map(len, strips)),
        317: entry(exif.SHORT, 2),  # differences along the row
    }
    if content.alpha is not None:
        entries[338] = entry(exif.SHORT, 2)  # alpha that is not multiplied in
    beside = {exif.PROFILE: content.profile, exif.XMP: content.metadata.xmp, exif.IPTC: content.metadata.iptc}
    entries |= {tag: (exif.UNDEFINED, value) for tag, value in beside.items() if value}
    padding = bytes(int(places[-1]) % 2)  # directories begin at even places
    start = int(places[-1]) + len(padding)
    main = exif.Directory(block.main.entries | entries, block.main.below)
    return b"".join([exif.header(block.order, start), *strips, padding, exif.directory(main, block.order, start)])


def _differences(pixels: np.ndarray, order: str) -> Iterator[bytes]:
    for top in range(0, len(pixels), ROWS):
        strip = pixels[top : top + ROWS].copy()
        strip[:, 1:] -= pixels[top : top + ROWS, :-1]  # modulo 256 or 65536, as numpy's integers are
        yield strip.astype(strip.dtype.newbyteorder("<" if order == "<" else ">")).tobytes()
