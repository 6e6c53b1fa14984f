"""Cloaked photos come back as they were: read with other readers than the ones that wrote them."""

import math
import struct
import tracemalloc
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from antidreambooth.errors import InputError
from antidreambooth.photos import delivery as delivery_module
from antidreambooth.photos.delivery import Delivery, cloaked_names, deliver, delivered_format, delivered_suffix
from antidreambooth.photos.encoding import encoded as encoded_content
from antidreambooth.photos.original import Original, read_original, turn, turn_back
from tests.photos.samples import (
    ARTIST,
    CLAIM,
    FILM,
    IPTC,
    PHOTOS,
    SECRETS,
    THUMBNAIL,
    XMP,
    display_p3,
    encoded,
    fine,
    linear_grey,
    noise,
    phone_jpeg,
    png16,
    png_chunk,
    tiff16,
    with_alpha,
)

PICTURE = noise(48, 32)
NO_SECRET = [*SECRETS.values(), XMP, IPTC, FILM, CLAIM, b"SECRET", b"Secretville", b"+01:00"]


def change_of(original: Original, budget: int = 8, seed: int = 0) -> np.ndarray:
    """Any whole steps within the budget; the same ones for all channels of grey."""
    steps = np.random.default_rng(seed).integers(-budget, budget + 1, original.numbers.shape).astype(np.int8)
    return np.broadcast_to(steps, (*steps.shape[:2], 3))


# --- other readers ---


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 8
    while place < len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        data = png[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", png, place + 8 + length)[0] == zlib.crc32(kind + data)
        found.append((kind, data))
        place += 12 + length
    return found


def read_png(png: bytes) -> np.ndarray:
    """Pixels of a PNG of 8 or 16 bits without a palette (PNG 3, section 9), by nobody's library."""
    chunks = chunks_of(png)
    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    assert not interlaced
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    back, stride = channels * depth // 8, width * channels * depth // 8
    raw = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    above, rows = bytearray(stride), []
    for top in range(0, len(raw), stride + 1):
        way, row = raw[top], bytearray(raw[top + 1 : top + 1 + stride])
        for x in range(stride):
            a, b, c = (row[x - back], above[x], above[x - back]) if x >= back else (0, above[x], 0)
            p = a + b - c
            paeth = min((a, b, c), key=lambda value: abs(p - value))
            row[x] = (row[x] + (0, a, b, (a + b) // 2, paeth)[way]) & 255
        rows.append(bytes(row))
        above = row
    return np.frombuffer(b"".join(rows), f">u{depth // 8}").reshape(height, width, channels)


def read_bmp(data: bytes) -> np.ndarray:
    """Pixels of a Windows bitmap of 24 bits, or of 8 with a palette of grey; rows from the bottom, blue first."""
    (start,), (width, height, _, bits) = struct.unpack_from("<I", data, 10), struct.unpack_from("<iiHH", data, 18)
    channels = bits // 8
    stride = (width * channels + 3) // 4 * 4
    rows = np.frombuffer(data, np.uint8, height * stride, start).reshape(height, stride)
    return rows[::-1, : width * channels].reshape(height, width, channels)[..., ::-1]


def read_with_vips(data: bytes) -> np.ndarray:
    pixels: np.ndarray = np.atleast_3d(pyvips.Image.new_from_buffer(data, "").numpy())
    return pixels


def read_with_another(data: bytes) -> np.ndarray:
    """Pixels as they lie in the file, ``h w c`` with alpha; the reader is not the one that checks what is delivered."""
    if data.startswith(b"\x89PNG"):
        return read_png(data)
    if data.startswith(b"BM"):
        return read_bmp(data)
    pixels = read_with_vips(data)
    with Image.open(BytesIO(data)) as image:
        if pixels.dtype == np.uint16 and image.mode in (
            "RGB",
            "RGBA",
        ):  # Pillow reads half of them
            lies = image.tag_v2.get(274, 1)  # type: ignore[attr-defined]
            assert np.array_equal(np.asarray(image), turn(pixels, lies) >> 8)
    return pixels


def parts(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    channels = pixels.shape[-1]
    return pixels[..., : 1 if channels < 3 else 3], pixels[..., -1] if channels in (2, 4) else None


def moved(numbers: np.ndarray, other: np.ndarray) -> float:
    """Largest difference in 8-bit steps."""
    return float(np.abs(numbers.astype(int) - other.astype(int)).max() / (1 if numbers.dtype.itemsize == 1 else 256))


# --- what comes back ---

BACK = {  # photo -> suffix, Pillow's mode; of the file as it came, and with --format webp
    "phone JPEG": (".png", "RGB", ".webp"),
    "MPO with a second picture": (".png", "RGB", ".webp"),
    "16-bit TIFF": (".tiff", "RGB", ".png"),
    "16-bit PNG": (".png", "RGB", ".png"),
    "RGBA PNG": (".png", "RGBA", ".webp"),
    "16-bit RGBA PNG": (".png", "RGBA", ".png"),
    "WebP": (".webp", "RGB", ".webp"),
    "HEIC": (".png", "RGB", ".webp"),
    "grey": (".png", "L", ".png"),  # a profile of grey does not fit WebP's RGB
    "palette": (".png", "RGBA", ".webp"),
    "CMYK": (".png", "RGB", ".webp"),
}


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("how", [Delivery(), Delivery("webp"), Delivery("png")])
def test_photos_come_back_as_they_were(photo, how):
    name, make = PHOTOS[photo]
    original = read_original(make(PICTURE), name)
    delivered = deliver(original, change_of(original), 8.0, how)
    suffix, mode, webp = BACK[photo]
    assert delivered.suffix == {"own": suffix, "webp": webp, "png": ".png"}[how.format]
    numbers, alpha = parts(read_with_another(delivered.data))
    assert numbers.shape[:2] == original.numbers.shape[:2] == PICTURE.size[::-1]
    assert numbers.dtype.itemsize == original.numbers.dtype.itemsize
    assert 7 < moved(original.numbers, numbers) <= 8
    assert (delivered.largest, delivered.over) == (8, 0)
    if original.alpha is None:
        assert alpha is None
    else:
        assert alpha is not None
        assert np.array_equal(alpha, original.alpha)
        assert np.array_equal(numbers[alpha == 0], original.numbers[alpha == 0])  # the hidden colours, too
        assert moved(original.numbers[alpha > 0], numbers[alpha > 0]) > 7
    with Image.open(BytesIO(delivered.data)) as image:
        image.load()
        assert image.mode == mode
        assert image.info.get("icc_profile") == original.profile
        assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        assert getattr(image, "n_frames", 1) == 1


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("form", ["own", "webp", "jpeg"])
def test_no_secret_is_in_what_comes_back(photo, form):
    name, make = PHOTOS[photo]
    original = read_original(make(PICTURE), name)
    data = deliver(original, change_of(original), 8.0, Delivery(form)).data
    if data.startswith(b"\x89PNG"):
        assert {kind for kind, _ in chunks_of(data)} <= {b"IHDR", b"iCCP", b"eXIf", b"IDAT", b"IEND"}
    for secret in NO_SECRET:
        for piece in (secret[at : at + 16] for at in range(0, len(secret) - 15, 8)):
            assert piece not in data, secret
    if photo == "phone JPEG":
        assert ARTIST in data  # which is looked for in the same way, and is to be there


def test_a_thumbnail_of_the_uncloaked_face_is_nowhere():
    """The whole coded picture, not only a piece of it."""
    original = read_original(phone_jpeg(PICTURE), "x.jpg")
    for how in (Delivery(), Delivery(keep_metadata=True), Delivery("jpeg", keep_metadata=True)):
        data = deliver(original, change_of(original), 8.0, how).data
        coded = THUMBNAIL[THUMBNAIL.index(b"\xff\xda") + 14 :]
        assert not any(coded[at : at + 8] in data for at in range(0, len(coded) - 8))


@pytest.mark.parametrize("photo", ["phone JPEG", "WebP", "16-bit TIFF", "HEIC"])
@pytest.mark.parametrize("form", ["own", "png", "webp", "jpeg"])
def test_kept_exif_is_read_by_others(photo, form):
    name, make = PHOTOS[photo]
    original = read_original(make(PICTURE), name)
    with Image.open(BytesIO(deliver(original, change_of(original), 8.0, Delivery(form)).data)) as image:
        found = image.getexif()
        assert found[0x013B].encode("latin-1") == ARTIST
        if photo != "16-bit TIFF":
            assert found.get_ifd(ExifTags.IFD.Exif)[0xA434] == "Lens 24mm"
        assert not found.get_ifd(ExifTags.IFD.GPSInfo)


SMALL = noise(6, 5)
KINDS = {
    "rgb png": encoded(SMALL, "PNG"),
    "rgb tiff": encoded(SMALL, "TIFF"),
    "rgb webp": encoded(SMALL, "WEBP", lossless=True),
    "rgb bmp": encoded(SMALL, "BMP"),
    "rgba png": encoded(with_alpha(SMALL), "PNG"),
    "rgba tiff": encoded(with_alpha(SMALL), "TIFF"),
    "rgba webp": encoded(with_alpha(SMALL), "WEBP", lossless=True, exact=True),
    "grey": encoded(SMALL.convert("L"), "PNG"),
    "grey tiff": encoded(SMALL.convert("L"), "TIFF"),
    "grey bmp": encoded(SMALL.convert("L"), "BMP"),
    "grey and alpha": encoded(with_alpha(SMALL).convert("LA"), "PNG"),
    "rgb16 png": png16(fine(SMALL)),
    "rgba16 png": png16(fine(with_alpha(SMALL))),
    "grey16 png": png16(fine(SMALL.convert("L"))),
    "grey16 and alpha": png16(fine(with_alpha(SMALL).convert("LA"))),
    "rgb16 tiff": tiff16(fine(SMALL)),
    "rgb16 little-endian tiff": tiff16(fine(SMALL), order="<"),
    "rgba16 tiff": tiff16(fine(with_alpha(SMALL))),
}


@given(data=st.data(), kind=st.sampled_from([*KINDS]), form=st.sampled_from(["own", "png", "webp"]))
def test_any_numbers_and_any_change_within_the_budget_come_back(data, kind, form):
    read = read_original(KINDS[kind], "x")
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng, (height, width, channels) = np.random.default_rng(seed), read.numbers.shape
    budget = data.draw(st.floats(0, 127))
    ends = data.draw(st.booleans())  # near black and white, where numbers are clipped
    top = np.iinfo(read.numbers.dtype).max
    numbers = rng.integers(0, top + 1, read.numbers.shape).astype(read.numbers.dtype)
    numbers = np.where(numbers > top // 2, top, 0).astype(numbers.dtype) if ends else numbers
    alpha = None if read.alpha is None else rng.choice([0, 1, top], (height, width)).astype(read.alpha.dtype)
    photo = Original("x", read.format, numbers, alpha, None, 1, read.kept, read.whole, b"")
    change = rng.integers(-int(budget), int(budget) + 1, (height, width, 3)).astype(np.int8)
    delivered = deliver(photo, change, budget, Delivery(form))
    found, clear = parts(read_with_another(delivered.data))
    assert moved(np.broadcast_to(numbers, (*numbers.shape[:2], found.shape[-1])), found) <= budget
    assert delivered.largest == math.ceil(moved(numbers, found[..., :channels]))
    if alpha is not None:
        assert (clear is None and (alpha == top).all()) or (clear is not None and np.array_equal(clear, alpha))
        assert np.array_equal(found[alpha == 0], np.broadcast_to(numbers, found.shape)[alpha == 0])
    unit = 1 if numbers.dtype == np.uint8 else 256
    steps = np.trunc(change.astype(int).sum(-1, keepdims=True) / 3).astype(int) if channels == 1 else change.astype(int)
    free = np.ones((height, width, 1), bool) if alpha is None else (alpha > 0)[..., None]
    expected = np.where(free, (numbers.astype(int) + unit * steps).clip(0, top), numbers)
    assert np.array_equal(found.astype(int), np.broadcast_to(expected, found.shape))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP", "16-bit PNG", "16-bit TIFF"])
def test_photos_of_many_rows_come_back(kind):
    """More than are worked on at a time."""
    tall = noise(5, 600)
    deep = {"16-bit PNG": png16, "16-bit TIFF": tiff16}
    original = read_original(deep[kind](fine(tall)) if kind in deep else encoded(tall, kind), "x")
    delivered = deliver(original, change_of(original), 8.0, Delivery())
    assert 7 < moved(original.numbers, read_with_another(delivered.data)) <= 8


def test_what_trainers_see_of_16_bits_changes_by_the_change():
    """The high byte, which Pillow gives them, keeps the budget, too."""
    original = read_original(png16(fine(PICTURE)), "x")
    change = change_of(original)
    seen = read_original(deliver(original, change, 8.0, Delivery()).data, "x").pixels().astype(int)
    inner = (original.pixels() >= 8) & (original.pixels() < 247)
    assert np.array_equal((seen - original.pixels())[inner], change[inner])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "16-bit PNG", "16-bit TIFF"])
def test_pixels_may_stay_as_they_were_stored(orientation, kind):
    stored, tag = PICTURE, struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    block = b"MM\0*\0\0\0\x08\0\1" + tag + bytes(4)
    if kind == "16-bit PNG":
        data = png16(fine(stored), png_chunk(b"eXIf", block))
    elif kind == "16-bit TIFF":
        data = tiff16(fine(stored), [(274, 3, [orientation])])
    else:
        data = encoded(stored, kind, exif=block, **({"lossless": True} if kind == "WEBP" else {}))
    original = read_original(data, "x")
    change = change_of(original)
    delivered = deliver(original, change, 8.0, Delivery(keep_orientation=True)).data
    lying, _ = parts(read_with_another(delivered))
    assert 7 < moved(turn_back(original.numbers, orientation), lying) <= 8
    assert lying.shape[:2] == stored.size[::-1]
    assert read_original(delivered, "x").turned == orientation
    upright = deliver(original, change, 8.0, Delivery()).data
    assert read_original(upright, "x").turned == 1
    assert np.array_equal(read_original(upright, "x").numbers, read_original(delivered, "x").numbers)


# --- metadata on request ---


@pytest.mark.parametrize("form", ["own", "webp", "jpeg"])
def test_metadata_is_kept_on_request_but_for_second_pictures(form):
    original = read_original(phone_jpeg(PICTURE), "x.jpg")
    delivered = deliver(original, change_of(original), 8.0, Delivery(form, keep_metadata=True))
    data = delivered.data
    assert all(SECRETS[kept] in data for kept in ("the location", "serial numbers", "the owner's name", "comments"))
    assert SECRETS["the camera maker's note"] not in data
    assert b"SECRETFILM" not in data
    assert b"tiff:Orientation='1'" in data  # as the pixels lie
    with Image.open(BytesIO(data)) as image:
        assert image.info["xmp"] == XMP.replace(b"'6'", b"'1'")
        assert image.getexif()[ExifTags.Base.Orientation] == 1
        assert image.getexif().get_ifd(ExifTags.IFD.GPSInfo)[2] == (52, 31, 123.456)
        if form == "jpeg":
            assert image.info["photoshop"][0x0404] == IPTC
        if form == "own":
            assert bytes.fromhex("".join(image.info["Raw profile type iptc"].split("\n")[3:])) == IPTC
    gone = {"a thumbnail of the photo", "the camera maker's note", "texts in the file", "content credentials (C2PA)"}
    film = "what follows the photo in its file, such as a film"
    assert {*delivered.removed} == gone | {film} | ({"IPTC metadata"} if form == "webp" else set())


def test_a_tiff_keeps_all_metadata_on_request():
    tags = [(700, 1, XMP), (33723, 7, IPTC), (315, 2, ARTIST + b"\0"), (305, 2, b"Program\0")]
    original = read_original(tiff16(fine(PICTURE), tags), "x.tif")
    assert original.removed == ("other EXIF data", "XMP metadata", "IPTC metadata")
    delivered = deliver(original, change_of(original), 8.0, Delivery(keep_metadata=True))
    assert delivered.removed == ()
    with Image.open(BytesIO(delivered.data)) as image:
        kept: Any = image.tag_v2  # type: ignore[attr-defined]
        assert kept[305] == "Program"
        assert bytes(kept[33723]) == IPTC
        assert XMP.replace(b"'6'", b"'1'") in delivered.data


@pytest.mark.parametrize("word", [b"xmpGImg:image", b"hdrgm:Version", b"GDepth:Data", b"GCamera:MotionPhoto"])
def test_xmp_that_holds_or_tells_of_other_pictures_is_never_kept(word):
    data = encoded(PICTURE, "PNG")
    xmp = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta>" + word + b"</x:xmpmeta>")
    original = read_original(data[:33] + xmp + data[33:], "x.png")
    delivered = deliver(original, change_of(original), 8.0, Delivery(keep_metadata=True))
    assert word not in delivered.data
    assert delivered.removed == ("XMP metadata, as it tells of other pictures",)


def test_a_pngs_own_words_on_colour_come_back():
    words = png_chunk(b"gAMA", struct.pack(">I", 100000)), png_chunk(b"pHYs", struct.pack(">IIB", 2835, 2835, 1))
    for data in (encoded(PICTURE, "PNG"), png16(fine(PICTURE))):
        original = read_original(data[:33] + b"".join(words) + data[33:], "x.png")
        chunks = chunks_of(deliver(original, change_of(original), 8.0, Delivery()).data)
        assert [data for kind, data in chunks if kind == b"gAMA"] == [struct.pack(">I", 100000)]
        assert [kind for kind, _ in chunks[:3]] == [b"IHDR", b"gAMA", b"pHYs"]


# --- JPEG on request ---


@pytest.mark.parametrize("quality", [98, 100])
def test_a_jpeg_says_by_how_much_the_budget_is_overstepped(quality):
    original = read_original(phone_jpeg(PICTURE), "IMG_1.JPG")
    delivered = deliver(original, change_of(original), 8.0, Delivery("jpeg", quality))
    with Image.open(BytesIO(delivered.data)) as image:
        assert (image.format, image.size) == ("JPEG", PICTURE.size)
        assert [part[1:3] for part in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]  # 4:4:4
        assert image.info["icc_profile"] == display_p3()
    apart = np.abs(np.atleast_3d(read_with_vips(delivered.data)).astype(int) - original.numbers)
    assert delivered.largest > 8
    assert abs(delivered.largest - apart.max()) <= 1  # decoders of JPEG differ by one
    assert delivered.over == pytest.approx((apart > 8).mean(), abs=0.01)
    assert delivered.over > 0


@pytest.mark.parametrize("quality", [97, 101])
def test_qualities_that_would_not_keep_the_change_are_refused(quality):
    with pytest.raises(InputError, match=rf"^quality is from 98 to 100 for JPEG: got {quality}$"):
        Delivery("jpeg", quality)


# --- formats and names ---


@pytest.mark.parametrize(
    ("name", "data", "form", "suffix"),
    [
        ("a.JPG", encoded(SMALL, "JPEG"), "own", ".png"),
        ("a.JPG", encoded(SMALL, "JPEG"), "jpeg", ".JPG"),
        ("a.jfif", encoded(SMALL, "JPEG"), "jpeg", ".jfif"),
        ("a.heic", encoded(SMALL, "HEIF"), "jpeg", ".jpg"),
        ("a.PNG", encoded(SMALL, "PNG"), "own", ".PNG"),
        ("a.apng", encoded(SMALL, "PNG"), "own", ".png"),
        ("a.tif", encoded(SMALL, "TIFF"), "own", ".tif"),
        ("a.TIFF", encoded(SMALL, "TIFF"), "own", ".TIFF"),
        ("a.jpg", encoded(SMALL, "TIFF"), "own", ".tif"),
        ("a.bmp", encoded(SMALL, "BMP"), "own", ".bmp"),
        ("a.gif", encoded(SMALL, "GIF"), "own", ".png"),
        ("a.avif", encoded(SMALL, "AVIF"), "own", ".png"),
        ("a.jp2", encoded(SMALL, "JPEG2000"), "own", ".png"),
        ("a.webp", encoded(SMALL, "WEBP"), "own", ".webp"),
        ("a.webp", encoded(SMALL, "WEBP"), "png", ".png"),
        ("a.png", encoded(with_alpha(SMALL), "PNG"), "jpeg", ".png"),  # JPEG has no transparency
        ("a.png", png16(fine(SMALL)), "jpeg", ".png"),
        ("a.png", png16(fine(SMALL)), "webp", ".png"),
        ("a.png", encoded(noise(16384, 1), "PNG"), "webp", ".png"),
        ("a.png", encoded(noise(16383, 1), "PNG"), "webp", ".webp"),
        ("a.jpg", encoded(SMALL.convert("L"), "JPEG"), "webp", ".webp"),
        ("a.jpg", encoded(SMALL.convert("L"), "JPEG", icc_profile=linear_grey()), "webp", ".png"),
    ],
)
def test_formats_and_suffixes(name, data, form, suffix):
    original = read_original(data, name)
    assert delivered_suffix(original, Delivery(form)) == suffix
    delivered = deliver(original, change_of(original), 8.0, Delivery(form))
    assert delivered.suffix == suffix
    with Image.open(BytesIO(delivered.data)) as image:
        assert image.format == delivered_format(original, Delivery(form))
        assert Image.registered_extensions()[Path(f"x{suffix}").suffix.lower()] == image.format


def test_names_with_the_suffixes_of_what_is_written():
    names = ["IMG_1.JPG", "scan.TIF", "a.png", "a.webp"]
    assert cloaked_names(names, [".png", ".TIF", ".png", ".webp"]) == [
        "IMG_1.png",
        "scan.TIF",
        "a-png.png",
        "a-webp.webp",
    ]
    with pytest.raises(ValueError, match="shorter"):
        cloaked_names(names, [".png"])


# --- what must not happen ---


def test_a_change_that_oversteps_the_budget_is_refused():
    original = read_original(encoded(PICTURE, "PNG"), "x.png")
    with pytest.raises(ValueError, match=r"^the change of x\.png is up to 9 steps, the budget 8\.5$"):
        deliver(original, change_of(original, budget=9), 8.5, Delivery())


def test_a_change_of_another_size_is_refused():
    original = read_original(encoded(PICTURE, "PNG"), "x.png")
    with pytest.raises(ValueError, match=r"x\.png is \(48, 32, 3\), the photo \(32, 48, 3\)"):
        deliver(original, np.zeros((48, 32, 3), np.int8), 8.0, Delivery())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"numbers": lambda content: content.numbers ^ 1}, "its numbers are not those"),
        ({"numbers": lambda content: content.numbers[:-1]}, "its size"),
        ({"numbers": lambda content: content.numbers * np.uint16(257)}, "its depth"),
        ({"alpha": lambda content: content.alpha ^ 1}, "its transparency"),
        ({"alpha": lambda content: None}, "its transparency"),
        ({"profile": lambda content: None}, "its profile"),
    ],
)
def test_a_file_that_does_not_hold_what_was_written_is_never_delivered(monkeypatch, fault, words):
    def faulty(content, kind):
        parts = {name: make(content) for name, make in fault.items()}
        alpha = parts.get("alpha", content.alpha)
        if "numbers" in parts and alpha is not None:
            alpha = alpha[: len(parts["numbers"])].astype(parts["numbers"].dtype)
        return encoded_content(replace(content, **{**parts, "alpha": alpha}), kind)

    monkeypatch.setattr(delivery_module, "encoded", faulty)
    original = read_original(encoded(with_alpha(PICTURE), "PNG", icc_profile=display_p3()), "x.png")
    with pytest.raises(RuntimeError, match=f"x.png: read back, .*{words}"):
        deliver(original, change_of(original), 8.0, Delivery())


def test_no_copy_of_a_photo_is_made_in_floating_point():
    """numpy's part of the memory; Pillow holds four bytes a pixel beside it."""
    data = encoded(noise(1000, 6000), "BMP")
    tracemalloc.start()
    original = read_original(data, "x.bmp")
    reading = tracemalloc.get_traced_memory()[1]
    change, photo = change_of(original, seed=1), original.numbers.nbytes
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    deliver(original, change, 8.0, Delivery("jpeg"))
    writing = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert reading < 2.5 * photo  # the photo, Pillow's bytes of the file, some rows
    assert writing < 4 * photo
