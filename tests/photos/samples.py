"""Photos that tests make: every kind of pixel, and what phones and programs write beside them."""

import itertools
import struct
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
REDDISH, GREENISH = (200, 30, 90), (30, 200, 90)
T = Image.Transpose


def encoded(image, file_format, **options):
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def plain(mode, colour, size=(32, 32)):
    return Image.new(mode, size, colour)


def noise(*size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*reversed(size), 3), dtype=np.uint8))


# --- colour profiles, by hand (ICC.1:2001-04): Pillow can only make sRGB, which converts to itself ---


def s15(*numbers):
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def icc(space, pcs, kind, tags):
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for signature, data in tags.items():
        table += signature + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s12s4s", start + len(body), b"", 0x02100000, kind, space, pcs, bytes(12), b"acsp")
    head = head.ljust(68, b"\0") + s15(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(*numbers):
    return b"XYZ \0\0\0\0" + s15(*numbers)


def swapped_rgb():
    """SRGB with the primaries red and green exchanged and gamma 2.2."""
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256))
    red, green, blue = xyz(0.3851, 0.7169, 0.0971), xyz(0.4360, 0.2225, 0.0139), xyz(0.1431, 0.0606, 0.7141)
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma)
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249), b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue} | curves
    return icc(b"RGB ", b"XYZ ", b"mntr", tags)


def linear_grey():
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249), b"kTRC": b"curv\0\0\0\0" + struct.pack(">I", 0)}
    return icc(b"GRAY", b"XYZ ", b"mntr", tags)


def odd_ink():
    """CMYK whose cyan ink is a mid grey (L* 50), whose key is black, and whose other inks are white."""
    ramp, inks = bytes(range(256)), itertools.product((0, 1), repeat=4)
    corners = b"".join(bytes((0 if key else 128 if cyan else 255, 128, 128)) for cyan, _, _, key in inks)
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * ramp + corners + 3 * ramp
    return icc(b"CMYK", b"Lab ", b"prtr", {b"wtpt": xyz(0.9642, 1, 0.8249), b"A2B0": lut})


def lab_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


# --- every kind of pixel, with what decode() makes of the first ones ---

DEEP = np.array([[0, 100 * 257, 65535]])
GREYS = [(0, 0, 0), (100, 100, 100), WHITE]


def row(*pixels, mode="RGB"):
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def palette(*colours):
    image = Image.new("P", (len(colours), 1))
    image.putpalette([channel for colour in colours for channel in colour])
    for index in range(len(colours)):
        image.putpixel((index, 0), index)
    return image


def deep(dtype, values=DEEP):
    return Image.fromarray(values.astype(dtype))


KINDS: dict[str, tuple[Image.Image, str, dict[str, Any], Sequence[tuple[int, ...]]]] = {
    "RGB bmp": (row(RED, BLUE), "BMP", {}, [RED, BLUE]),
    "L": (row(0, 100, 255, mode="L"), "PNG", {}, GREYS),
    "1-bit": (row(0, 1, mode="1"), "PNG", {}, [(0, 0, 0), WHITE]),
    "1-bit tiff": (row(0, 1, mode="1"), "TIFF", {}, [(0, 0, 0), WHITE]),
    "RGBA": (row((*RED, 255), (*RED, 0), (*RED, 128), mode="RGBA"), "PNG", {}, [RED, WHITE, (255, 127, 127)]),
    "RGBA webp": (
        row((*RED, 255), (*RED, 0), mode="RGBA"),
        "WEBP",
        {"lossless": True, "exact": True},
        [RED, WHITE],
    ),
    "RGBA tiff": (row((*RED, 255), (*RED, 0), mode="RGBA"), "TIFF", {}, [RED, WHITE]),
    "LA": (row((0, 255), (0, 0), (0, 128), mode="LA"), "PNG", {}, [(0, 0, 0), WHITE, (127, 127, 127)]),
    "palette": (palette(RED, BLUE), "PNG", {}, [RED, BLUE]),
    "palette, one clear": (palette(RED, BLUE), "PNG", {"transparency": 1}, [RED, WHITE]),
    "palette, alphas": (palette(RED, BLUE), "PNG", {"transparency": b"\xff\x80"}, [RED, (127, 127, 255)]),
    "palette gif": (palette(RED, BLUE), "GIF", {"transparency": 0}, [WHITE, BLUE]),
    "RGB, one clear": (row(RED, BLUE), "PNG", {"transparency": RED}, [WHITE, BLUE]),
    "L, one clear": (row(0, 100, mode="L"), "PNG", {"transparency": 0}, [WHITE, GREYS[1]]),
    "1-bit, one clear": (row(0, 1, mode="1"), "PNG", {"transparency": 0}, [WHITE, WHITE]),
    "16-bit png": (deep(np.uint16), "PNG", {}, GREYS),
    "16-bit png, one clear": (
        deep(np.uint16, np.array([[1000, 1000 % 256, 65535]])),
        "PNG",
        {"transparency": 1000},
        [WHITE, (1, 1, 1), WHITE],
    ),
    "16-bit tiff": (deep(np.uint16), "TIFF", {}, GREYS),
    "16-bit big-endian tiff": (deep(">u2"), "TIFF", {}, GREYS),
    "32-bit tiff": (deep(np.int32), "TIFF", {}, GREYS),
    "CMYK jpeg": (plain("CMYK", (0, 255, 255, 0)), "JPEG", {}, [RED]),  # written inverted, as Adobe does
    "CMYK tiff": (row((0, 255, 255, 0), (0, 0, 0, 255), mode="CMYK"), "TIFF", {}, [RED, (0, 0, 0)]),
    "YCbCr tiff": (row(RED, BLUE).convert("YCbCr"), "TIFF", {"compression": "tiff_lzw"}, [(254, 0, 0), (0, 0, 254)]),
    "LAB tiff": (row(REDDISH, GREENISH).convert("LAB"), "TIFF", {}, [REDDISH, GREENISH]),
    "first of gif": (palette(RED), "GIF", {"save_all": True, "append_images": [palette(BLUE)]}, [RED]),
    "first of png": (row(RED), "PNG", {"save_all": True, "append_images": [row(BLUE)]}, [RED]),
    "first of webp": (
        plain("RGB", RED),
        "WEBP",
        {"save_all": True, "lossless": True, "append_images": [plain("RGB", BLUE)]},
        [RED],
    ),
    "first of tiff": (row(RED), "TIFF", {"save_all": True, "append_images": [row(BLUE)]}, [RED]),
    "first of mpo": (plain("RGB", RED), "MPO", {"save_all": True, "append_images": [plain("RGB", BLUE)]}, [RED]),
    "RGBA avif": (plain("RGBA", (*RED, 0)), "AVIF", {}, [WHITE]),
    "RGBA jpeg 2000": (row((*RED, 255), (*RED, 0), mode="RGBA"), "JPEG2000", {}, [RED, WHITE]),
    "L jpeg 2000": (row(0, 100, 255, mode="L"), "JPEG2000", {}, GREYS),
    "16-bit jpeg 2000": (deep(np.uint16), "JPEG2000", {}, GREYS),
    "RGB jpeg 2000": (row(REDDISH, GREENISH), "JPEG2000", {"no_jp2": True}, [REDDISH, GREENISH]),
    "L ppm": (row(0, 100, 255, mode="L"), "PPM", {}, GREYS),
    "16-bit ppm": (Image.fromarray(DEEP.astype(np.int32)), "PPM", {}, GREYS),
    "RGBA qoi": (row((*RED, 255), (*RED, 0), mode="RGBA"), "QOI", {}, [RED, WHITE]),
    "first of avif": (plain("RGB", RED), "AVIF", {"save_all": True, "append_images": [plain("RGB", BLUE)]}, [RED]),
    "first of heic": (plain("RGB", RED), "HEIF", {"save_all": True, "append_images": [plain("RGB", BLUE)]}, [RED]),
}


# --- what is in a file beside the photo: some of it is kept, none of the secrets ---

P3_PRIMARIES = (0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)


def display_p3():
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256))
    colours = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), (xyz(*primary) for primary in P3_PRIMARIES), strict=True))
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma)
    return icc(b"RGB ", b"XYZ ", b"mntr", {b"wtpt": xyz(0.9642, 1, 0.8249)} | colours | curves)


THUMBNAIL = encoded(noise(48, 32, seed=9), "JPEG")
ARTIST = "Zoë © Ärger".encode()
LATITUDE = struct.pack(">6I", 52, 1, 31, 1, 123456, 1000)
XMP = (
    b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description tiff:Orientation='6' exif:GPSLatitude='SECRET'/></x:xmpmeta>"
)
IPTC = b"\x1c\x02\x5a\x00\x0bSecretville"
FILM = b"\0\0\0\x18ftypmp42" + b"SECRETFILM" * 30
CLAIM = b"JP\0\1\0\0\0\1\0\0\0\x40jumb\0\0\0\x20jumdc2pa" + bytes(12) + b"SECRETCLAIM"
SECRETS = {
    "a thumbnail of the photo": THUMBNAIL[-400:],
    "the location": LATITUDE,
    "the camera maker's note": b"Apple iOS\0\0\1MMSECRETNOTE" * 5,
    "serial numbers": b"SERIAL-4711",
    "the owner's name": b"Olga Owner",
    "comments": b"ASCII\0\0\0my secret comment",
    "other EXIF data": b"Secret Software 1.0",
}


def exif_block(orientation=6):
    """A phone's, big-endian, with all that is kept and all that is not."""

    def text(value):
        return 2, len(value) + 1, value + b"\0"

    def ratio(*values):
        return 5, len(values) // 2, struct.pack(f">{len(values)}I", *values)

    def short(value):
        return 3, 1, struct.pack(">H", value)

    def directory(entries, start, following=0):
        table, place, body = struct.pack(">H", len(entries)), start + 2 + 12 * len(entries) + 4, b""
        for tag, (kind, count, value) in sorted(entries.items()):
            table += struct.pack(">HHI", tag, kind, count)
            table += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(">I", place + len(body))
            body += (value + bytes(len(value) % 2)) if len(value) > 4 else b""
        return table + struct.pack(">I", following) + body

    main = {
        0x010E: text(SECRETS["comments"][8:]),
        0x010F: text(b"Phone"),
        0x0110: text(b"Phone 17"),
        0x0112: short(orientation),
        0x011A: ratio(72, 1),
        0x0131: text(SECRETS["other EXIF data"]),
        0x0132: text(b"2026:11:26 18:00:00"),
        0x013B: text(ARTIST),
        0x013C: text(SECRETS["the owner's name"]),
    }
    photo = {
        0x829A: ratio(1, 60),
        0x8827: short(100),
        0x9000: (7, 4, b"0232"),
        0x9003: text(b"2026:11:26 18:00:00"),
        0x9011: text(b"+01:00"),
        0x927C: (7, len(SECRETS["the camera maker's note"]), SECRETS["the camera maker's note"]),
        0x9286: (7, len(SECRETS["comments"]), SECRETS["comments"]),
        0xA001: short(65535),
        0xA430: text(SECRETS["the owner's name"]),
        0xA431: text(SECRETS["serial numbers"]),
        0xA434: text(b"Lens 24mm"),
    }
    location = {1: text(b"N"), 2: (5, 3, LATITUDE)}
    long = 4, 1, bytes(4)
    size = len(directory(main | {0x8769: long, 0x8825: long}, 8))
    parts, place = [], 8 + size
    for tag, entries in ((0x8769, photo), (0x8825, location)):
        main[tag] = 4, 1, struct.pack(">I", place)
        parts.append(directory(entries, place))
        place += len(parts[-1])
    small = {
        0x0103: short(6),
        0x0201: (4, 1, struct.pack(">I", place + 42)),
        0x0202: (4, 1, struct.pack(">I", len(THUMBNAIL))),
    }
    parts += [directory(small, place), THUMBNAIL]
    return b"MM\0*\0\0\0\x08" + directory(main, 8, place) + b"".join(parts)


def segment(marker, data):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def phone_jpeg(image, second=None):
    """As a phone writes it: lying, Display P3, and all that should not be published."""
    lying, options = image.transpose(T.ROTATE_90), {"quality": 95, "icc_profile": display_p3()}
    if second is not None:
        options |= {"save_all": True, "append_images": [second]}
    data = encoded(lying, "JPEG" if second is None else "MPO", exif=b"Exif\0\0" + exif_block(), **options)
    photoshop = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(IPTC)) + IPTC
    beside = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP) + segment(0xED, photoshop) + segment(0xEB, CLAIM)
    return data[:2] + beside + segment(0xFE, b"SECRETCOMMENT") + data[2:] + (FILM if second is None else b"")


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(pixels, *chunks):
    """A PNG of 16 bits a channel (h w c), which Pillow cannot write; chunks lie before the pixels."""
    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    body = png_chunk(b"IHDR", head) + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def tiff16(pixels, tags=(), order=">"):
    """A TIFF of 16 bits a channel (h w c), not compressed, in one strip."""
    height, width, channels = pixels.shape
    extra = [(338, 3, [2])] if channels in (2, 4) else []
    entries = [(256, 4, [width]), (257, 4, [height]), (258, 3, [16] * channels), (259, 3, [1])]
    entries += [(262, 3, [2 if channels > 2 else 1]), (273, 4, [8]), (277, 3, [channels]), (278, 4, [height])]
    entries = sorted([*entries, (279, 4, [pixels.nbytes]), *extra, *tags], key=lambda entry: entry[0])
    start, table, body = 8 + pixels.nbytes, struct.pack(f"{order}H", len(entries)), b""
    for tag, kind, values in entries:
        raw = (
            values
            if isinstance(values, bytes)
            else struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        )
        table += struct.pack(f"{order}HHI", tag, kind, len(values))
        place = start + 2 + 12 * len(entries) + 4 + len(body)
        table += raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(f"{order}I", place)
        body += (raw + bytes(len(raw) % 2)) if len(raw) > 4 else b""
    magic = b"MM\0*" if order == ">" else b"II*\0"
    strip = pixels.astype(f"{order}u2").tobytes()
    return magic + struct.pack(f"{order}I", start) + strip + table + bytes(4) + body


def fine(image, seed=1):
    """A picture in 16 bits, the lower eight of which are noise."""
    eight = np.atleast_3d(np.asarray(image)).astype(np.uint16)
    return eight * 256 + np.random.default_rng(seed).integers(0, 256, eight.shape, dtype=np.uint16)


def with_alpha(image):
    """Its upper quarter clear with its colours hidden below, the next one half clear."""
    alpha = np.full(image.size[::-1], 255, np.uint8)
    alpha[: len(alpha) // 4], alpha[len(alpha) // 4 : len(alpha) // 2] = 0, 128
    clear = image.copy()
    clear.putalpha(Image.fromarray(alpha))
    return clear


# The photos of the project's promise, of a picture of any size: name of the file, its bytes.
PHOTOS: dict[str, tuple[str, Callable[[Image.Image], bytes]]] = {
    "phone JPEG": ("IMG_1.JPG", phone_jpeg),
    "MPO with a second picture": ("IMG_2.jpg", lambda image: phone_jpeg(image, second=image.resize((40, 30)))),
    "16-bit TIFF": (
        "scan.tiff",
        lambda image: tiff16(fine(image), [(34675, 7, display_p3()), (315, 2, ARTIST + b"\0")]),
    ),
    "16-bit PNG": (
        "scan.png",
        lambda image: png16(fine(image), png_chunk(b"iCCP", b"P3\0\0" + zlib.compress(display_p3()))),
    ),
    "RGBA PNG": (
        "logo.png",
        lambda image: encoded(with_alpha(image), "PNG", icc_profile=display_p3(), compress_level=1),
    ),
    "16-bit RGBA PNG": ("deep.png", lambda image: png16(fine(with_alpha(image)))),
    "WebP": ("web.webp", lambda image: encoded(image, "WEBP", icc_profile=display_p3(), exif=exif_block(1), xmp=XMP)),
    "HEIC": (
        "IMG_3.HEIC",
        lambda image: encoded(image, "HEIF", icc_profile=display_p3(), exif=b"Exif\0\0" + exif_block(1)),
    ),
    "grey": ("grey.jpg", lambda image: encoded(image.convert("L"), "JPEG", icc_profile=linear_grey())),
    "palette": ("old.png", lambda image: encoded(image.quantize(64), "PNG", transparency=3)),
    "CMYK": ("print.jpg", lambda image: encoded(image.convert("CMYK"), "JPEG", icc_profile=odd_ink())),
}
