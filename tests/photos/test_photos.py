import hashlib
import math
import os
import re
import struct
import unicodedata
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin, features

from antidreambooth.errors import InputError
from antidreambooth.files import write_atomically
from antidreambooth.photos.decoding import BACKGROUND, decode, find_photos, load_photos, square, to_float
from antidreambooth.photos.delivery import cloaked_names, to_8bit, write_png
from antidreambooth.photos.formats import FORMATS as READ
from antidreambooth.photos.formats import SUFFIXES, UNREAD
from tests.photos.samples import (
    BLUE,
    DEEP,
    GREEN,
    GREENISH,
    KINDS,
    RED,
    REDDISH,
    WHITE,
    T,
    deep,
    encoded,
    lab_profile,
    linear_grey,
    noise,
    odd_ink,
    palette,
    plain,
    swapped_rgb,
)

FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".mpo": "MPO",
    ".png": "PNG",
    ".apng": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
    ".jp2": "JPEG2000",
    ".j2k": "JPEG2000",
    ".jpx": "JPEG2000",
    ".jpf": "JPEG2000",
    ".gif": "GIF",
}


def quarters(size=(64, 96)):
    """Red, green / blue, white: no rotation or reflection of it is like another."""
    (width, height), image = size, Image.new("RGB", size, WHITE)
    for x, y, colour in ((0, 0, RED), (1, 0, GREEN), (0, 1, BLUE)):
        image.paste(colour, (x * width // 2, y * height // 2, (x + 1) * width // 2, (y + 1) * height // 2))
    return image


def centres(image):
    """Colours in the middle of the four quarters, row by row."""
    (width, height) = image.size
    return [image.getpixel((x * width // 4, y * height // 4)) for y in (1, 3) for x in (1, 3)]


def assert_close(found, expected, tolerance=12):
    assert np.abs(np.array(found, int) - np.array(expected, int)).max() <= tolerance, (found, expected)


# --- finding ---


def test_every_suffix_in_any_case_is_found_and_sorted_by_name(tmp_path):
    assert set(FORMATS) == set(SUFFIXES)
    names = [f"b{suffix}" for suffix in SUFFIXES] + [f"A{suffix.upper()}" for suffix in SUFFIXES]
    for name in names:
        (tmp_path / name).write_bytes(encoded(plain("RGB", RED), FORMATS[Path(name).suffix.lower()]))
    assert [path.name for path in find_photos(tmp_path)] == sorted(names)
    for photo in load_photos(tmp_path, 8):  # the suffixes' decoders are there
        assert_close(photo.pixels[:, 4, 4].tolist(), RED)


@pytest.mark.parametrize("file_format", [*READ, "MPO"])
def test_contents_decide_and_not_the_suffix(tmp_path, file_format):
    data = encoded(plain("RGB", REDDISH), file_format)
    for name in ("photo.jpg", "photo.png"):
        (tmp_path / name).write_bytes(data)
    for photo in load_photos(tmp_path, 8):
        assert_close(photo.pixels[:, 4, 4].tolist(), REDDISH)


@pytest.mark.parametrize("file_format", ["AVIF", "HEIF"])
def test_a_brand_that_two_formats_share_is_read(file_format):
    data = encoded(plain("RGB", REDDISH), file_format)
    assert data[4:8] == b"ftyp"
    assert_close(decode(data[:8] + b"mif1" + data[12:], "x").getpixel((0, 0)), REDDISH)


@pytest.mark.parametrize("suffix", UNREAD)
def test_photos_that_are_not_read_are_refused_by_name(tmp_path, suffix):
    for name in (f"IMG_1{suffix.upper()}", "IMG_2.jpg", f".hidden{suffix}"):
        (tmp_path / name).touch()
    for source in (tmp_path, tmp_path / f"IMG_1{suffix.upper()}"):
        with pytest.raises(InputError, match=rf"^not read: IMG_1{suffix.upper()} \(.*\): export such a photo as PNG"):
            find_photos(source)


def test_a_raw_file_beside_its_jpeg_is_skipped_with_a_warning(tmp_path):
    for name in ("IMG_1.CR2", "img_1.jpg"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"^skipped, as no photos: IMG_1\.CR2$"):
        assert find_photos(tmp_path) == [tmp_path / "img_1.jpg"]


def test_one_file_is_found(tmp_path, monkeypatch):
    (tmp_path / "me.JPG").touch()
    (tmp_path / "notes.txt").touch()
    assert find_photos(tmp_path / "me.JPG") == [tmp_path / "me.JPG"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_photos(Path("~/me.JPG")) == [tmp_path / "me.JPG"]


def test_other_files_are_skipped_with_one_warning(tmp_path):
    skipped = [".DS_Store", "._IMG.jpg", ".hidden.png", "Thumbs.db", "gone.jpg", "movie.mov", "photo", "pipe.png"]
    for name in (*skipped, "a.jpg"):
        if name == "gone.jpg":
            (tmp_path / name).symlink_to("nowhere")
        elif name == "pipe.png":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    with pytest.warns(UserWarning, match="skipped") as caught:
        assert find_photos(tmp_path) == [tmp_path / "a.jpg"]
    (warning,) = caught
    assert str(warning.message).endswith(": " + ", ".join(skipped))


def test_long_lists_are_cut_short(tmp_path):
    for number in range(25):
        (tmp_path / f"{number:02}.txt").touch()
    (tmp_path / "a.jpg").touch()
    with pytest.warns(UserWarning, match=r"18\.txt, 19\.txt and 5 more$"):
        find_photos(tmp_path)


@pytest.mark.parametrize(
    ("make", "source", "words"),
    [
        ([], "nowhere", ["nowhere", "does not exist"]),
        ([], "~nobody-of-this-name/photos", ["~nobody-of-this-name/photos", "does not exist"]),
        (["notes.txt"], "notes.txt", ["notes.txt", *SUFFIXES]),
        (["photo"], "photo", ["photo", *SUFFIXES]),
        (["mine/"], "mine", ["mine", "holds no photo", *SUFFIXES]),
        (["mine/.DS_Store", "mine/notes.txt"], "mine", ["mine", "holds no photo"]),
        (
            ["mine/ann/1.jpg", "mine/ann/2.jpg", "mine/bob/1.HEIC", "mine/docs/1.txt"],
            "mine",
            ["mine holds no photo", "sub-folder: ann, bob$"],
        ),
    ],
)
def test_what_is_no_source_is_named_with_the_fix(tmp_path, monkeypatch, make, source, words):
    monkeypatch.chdir(tmp_path)
    for name in make:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(InputError) as caught:
        find_photos(Path(source))
    for word in words:
        assert re.search(word, str(caught.value)), word


@pytest.mark.parametrize(("method", "named"), [("iterdir", "mine"), ("read_bytes", "a.jpg")])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, method, named, error):
    def fail(path):
        raise error

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jpg").write_bytes(encoded(plain("RGB", RED), "JPEG"))
    monkeypatch.setattr(Path, method, fail)
    with pytest.raises(InputError, match=rf"{named} cannot be read: {error.strerror}; make it readable"):
        load_photos(tmp_path / "mine", 8)


# --- decoding ---


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {}),
        ("MPO", {}),
        ("PNG", {}),
        ("WEBP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("AVIF", {}),
        ("HEIF", {}),
    ],
)
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, None),
        (2, T.FLIP_LEFT_RIGHT),
        (3, T.ROTATE_180),
        (4, T.FLIP_TOP_BOTTOM),
        (5, T.TRANSPOSE),
        (6, T.ROTATE_90),
        (7, T.TRANSVERSE),
        (8, T.ROTATE_270),
    ],
)
def test_photos_are_upright(file_format, options, orientation, stored):
    upright, exif = quarters(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(
        upright.transpose(stored) if stored is not None else upright, file_format, exif=exif.tobytes(), **options
    )
    decoded = decode(data, "x")
    assert decoded.size == upright.size
    assert_close(centres(decoded), centres(upright))


def odd_exif(header=b"MM\0*\0\0\0\x08", orientation=6):
    """Orientation, and a resolution that claims to be text: ImageOps.exif_transpose fails on it."""
    orientation = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    text = struct.pack(">HHI4s", 0x011A, 2, 3, b"ab")
    return b"Exif\0\0" + header + struct.pack(">H", 2) + orientation + text + bytes(4)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("exif", "stored"),
    [
        (odd_exif(), T.ROTATE_90),
        (odd_exif()[:-12], T.ROTATE_90),  # cut short: Pillow warns
        (odd_exif(orientation=99), None),  # undefined
        (odd_exif(b"garbage!"), None),
        (b"Exif\0\0", None),
    ],
)
def test_odd_exif_does_not_hinder(file_format, exif, stored):
    upright = quarters()
    data = encoded(upright.transpose(stored) if stored is not None else upright, file_format, exif=exif)
    assert_close(centres(decode(data, "x")), centres(upright))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixel_becomes_rgb(kind):
    image, file_format, options, expected = KINDS[kind]
    data = encoded(image, file_format, **options)
    if "first of" in kind:
        assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 2
    decoded = decode(data, "x")
    assert decoded.mode == "RGB"
    assert_close([decoded.getpixel((x, 0)) for x in range(len(expected))], expected, tolerance=3)


def test_transparency_is_flattened_on_the_background():
    assert decode(encoded(plain("RGBA", (*RED, 0)), "PNG"), "x").getpixel((0, 0)) == BACKGROUND == WHITE


MID_GREY = deep(np.uint16, np.full((2, 2), 128 * 257))


@pytest.mark.parametrize(
    ("image", "file_format", "profile", "expected"),
    [
        (plain("RGB", REDDISH), "JPEG", swapped_rgb, GREENISH),
        (plain("RGB", REDDISH), "PNG", swapped_rgb, GREENISH),
        (plain("RGB", REDDISH), "WEBP", swapped_rgb, GREENISH),
        (plain("RGB", REDDISH), "TIFF", swapped_rgb, GREENISH),
        (plain("RGB", REDDISH), "HEIF", swapped_rgb, GREENISH),
        (plain("RGB", REDDISH), "AVIF", swapped_rgb, GREENISH),
        (plain("RGBA", (*REDDISH, 255)), "PNG", swapped_rgb, GREENISH),
        (plain("RGBA", (*REDDISH, 0)), "PNG", swapped_rgb, WHITE),
        (palette(REDDISH), "PNG", swapped_rgb, GREENISH),
        (plain("L", 128), "JPEG", linear_grey, (188, 188, 188)),
        (plain("LA", (128, 255)), "PNG", linear_grey, (188, 188, 188)),
        (MID_GREY, "PNG", linear_grey, (188, 188, 188)),
        (MID_GREY, "TIFF", linear_grey, (188, 188, 188)),
        (plain("CMYK", (255, 0, 0, 0)), "JPEG", odd_ink, (119, 119, 119)),
        (plain("CMYK", (0, 255, 255, 0)), "JPEG", odd_ink, WHITE),
        (plain("CMYK", (255, 0, 0, 0)), "TIFF", odd_ink, (119, 119, 119)),
    ],
)
def test_colour_profiles_are_converted_to_srgb(image, file_format, profile, expected):
    decoded = decode(encoded(image, file_format, icc_profile=profile()), "x")
    assert decoded.mode == "RGB"
    assert_close(decoded.getpixel((0, 0)), expected, tolerance=6)


@pytest.mark.parametrize(
    ("mode", "colour", "profile", "expected"),
    [
        ("RGB", REDDISH, b"garbage", REDDISH),
        ("RGB", REDDISH, swapped_rgb()[:300], REDDISH),
        ("RGB", REDDISH, linear_grey(), REDDISH),
        ("RGB", REDDISH, lab_profile(), REDDISH),
        ("L", 128, swapped_rgb(), (128, 128, 128)),
        ("CMYK", (0, 255, 255, 0), swapped_rgb(), RED),
    ],
)
def test_profiles_that_do_not_fit_are_ignored_with_a_warning(mode, colour, profile, expected):
    data = encoded(plain(mode, colour), "TIFF", icc_profile=profile)
    with pytest.warns(UserWarning, match=r"^IMG_1\.tif: its colour profile is ignored"):
        decoded = decode(data, "IMG_1.tif")
    assert decoded.getpixel((0, 0)) == expected


TRUNCATED: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {}),
    "progressive jpeg": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "lzw tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "gif": ("GIF", {}),
    "heic": ("HEIF", {}),
    "avif": ("AVIF", {}),
    "jpeg 2000": ("JPEG2000", {}),
    "jpeg 2000 stream": ("JPEG2000", {"no_jp2": True}),
    "ppm": ("PPM", {}),
    "qoi": ("QOI", {}),
}
IMAGE_ANEW = "cannot be decoded: it is truncated or damaged; remove it or save it anew"


@pytest.mark.parametrize("kind", TRUNCATED)
@pytest.mark.parametrize("kept", [0.01, 0.1, 0.5, 0.9, 0.98])
def test_truncated_files_are_named(kind, kept):
    file_format, options = TRUNCATED[kind]
    data = encoded(noise(80, 60), file_format, **options)
    assert decode(data, "x").size == (80, 60)
    with pytest.raises(InputError, match=f"^IMG_1.jpg {IMAGE_ANEW}$"):
        decode(data[: int(kept * len(data))], "IMG_1.jpg")


def png_head(width, height):
    """First bytes of a PNG that promises this size and holds no pixel."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + checksum + bytes(4) + b"IDAT"


def dng(tag, value):
    """A TIFF whose first picture says in a tag that it is not the photo."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[tag] = value
    return encoded(plain("RGB", RED), "TIFF", tiffinfo=tags)


UNREAD_FORMAT = "cannot be decoded: its format {} is not read: save it as PNG or JPEG"
OTHERS = [
    ("EPS", encoded(plain("RGB", RED), "EPS")),  # Pillow could: it would start Ghostscript
    ("PDF", b"%PDF-1.7\n"),
    ("PSD", b"8BPS\0\1" + bytes(20)),
    ("ICO", encoded(plain("RGB", RED), "ICO")),
    ("WMF", b"\xd7\xcd\xc6\x9a" + bytes(20)),
    ("SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ("SVG", b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg/>"),
    ("JPEG XL", b"\xff\n\xfa\x1f"),
    ("JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n"),
    ("camera raw", b"II*\0\x10\0\0\0CR\2\0"),
    ("camera raw", b"\0\0\0\x18ftypcrx \0\0\0\1"),
    ("camera raw", b"FUJIFILMCCD-RAW 0201"),
    (r"MP4 or QuickTime \(a film\)", b"\0\0\0\x18ftypmp42" + bytes(20)),
    (r"MP4 or QuickTime \(a film\)", b"\0\0\0\x14ftypqt  " + bytes(20)),
]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be decoded: it is empty; remove it or save it anew"),
        (b"hello", "cannot be decoded: it is no image: it begins with hello; remove it or save it anew"),
        (
            b"<!doctype html>\n<html>" + 5000 * "ä".encode(),
            ".* it is no image: it begins with <!doctype html> <html>ä.*",
        ),
        (b"\xef\xbb\xbf{}\r\n{}", r".* it is no image: it begins with \{\} \{\}; remove it .*"),
        (b"ab", ".* unknown format: it begins with the bytes 61 62; save it as PNG or JPEG"),
        (b"\0\1\2\3\4\5\6\7\x08", ".* unknown format: it begins with the bytes 00 01 02 03 04 05 06 07; save .*"),
        (b"gr\xfcn", ".* unknown format: it begins with the bytes 67 72 fc 6e; save .*"),
        *((beginning, UNREAD_FORMAT.format(kind)) for kind, beginning in OTHERS),
        (dng(50706, 0x01040000), UNREAD_FORMAT.format("camera raw")),
        (dng(254, 1), UNREAD_FORMAT.format("camera raw")),  # NEF, ARW and others begin with a thumbnail
        (png_head(10, 10), IMAGE_ANEW),
        (png_head(20000, 10000), r"is too large .* exceeds limit of 178956970 pixels; scale it down"),
        (encoded(deep(np.float32), "TIFF"), "has floating-point pixels, .*; save it with 8 bits"),
        (encoded(deep(np.int32, DEEP + 1), "TIFF"), r"has grey values outside 0\.\.65535; save it .*"),
        (encoded(deep(np.int32, DEEP - 1), "TIFF"), r"has grey values outside 0\.\.65535; save it .*"),
    ],
)
def test_what_is_no_usable_image_is_named_with_the_fix(tmp_path, data, message):
    (tmp_path / "IMG_1.jpg").write_bytes(data)
    with pytest.raises(InputError, match=f"^IMG_1.jpg {message}$"):
        load_photos(tmp_path, 8)


def test_a_tiff_of_several_pages_is_no_raw_file():
    assert decode(dng(254, 2), "x").getpixel((0, 0)) == RED


@pytest.mark.parametrize(("file_format", "part"), [("AVIF", "avif"), ("JPEG2000", "jpg_2000")])
def test_a_pillow_without_a_decoder_is_what_is_blamed(monkeypatch, file_format, part):
    data, check = encoded(plain("RGB", RED), file_format), features.check
    monkeypatch.setattr(features, "check", lambda name: False if name == part else check(name))
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    monkeypatch.setattr(Image, "_getdecoder", raising_no_decoder)
    with pytest.raises(
        InputError, match=rf"^x cannot be decoded: the installed Pillow was built without {file_format}: "
    ):
        decode(data, "x")


def raising_no_decoder(mode, decoder_name, args, extra=()):
    raise OSError(f"decoder {decoder_name} not available")


@pytest.mark.parametrize("file_format", [*READ])
def test_large_photos_are_decoded_silently_up_to_the_hard_limit(monkeypatch, file_format):
    data = encoded(noise(80, 60), file_format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 60 // 2)  # Pillow warns from here, and refuses from twice it
    assert decode(data, "x").size == (80, 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 60 // 2 - 1)
    with pytest.raises(InputError, match=r"^IMG_1\.jpg is too large .*limit of 4798 pixels; scale it down$"):
        decode(data, "IMG_1.jpg")


def test_want_of_memory_is_not_blamed_on_the_photo(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(b"data", "x")


# --- cutting out ---


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((80, 60), (10, 0, 70, 60)),
        ((60, 80), (0, 10, 60, 70)),
        ((61, 80), (0, 9, 61, 70)),
        ((64, 64), (0, 0, 64, 64)),
        ((1, 9), (0, 4, 1, 5)),
    ],
)
def test_the_square_is_centred(size, box):
    image, side = noise(*size), box[2] - box[0]
    pixels, found = square(image, side)
    assert found == box
    assert pixels.is_contiguous()
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(image.crop(box)))  # at its own size nothing is resampled


@pytest.mark.parametrize("resolution", [16, 100])  # smaller and larger than the image
def test_the_square_is_scaled_with_lanczos(resolution):
    pixels, _ = square(noise(64, 64), resolution)
    assert pixels.shape == (3, resolution, resolution)
    scaled = noise(64, 64).resize((resolution, resolution), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(scaled))


def test_photos_know_where_they_come_from(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(quarters((64, 96)).transpose(T.ROTATE_90), "PNG", exif=exif)
    (tmp_path / "b.png").write_bytes(data)
    (tmp_path / "a.png").write_bytes(encoded(plain("RGB", RED, (8, 8)), "PNG"))
    other, photo = load_photos(tmp_path, 32)
    assert (photo.path, photo.name, photo.size) == (tmp_path / "b.png", "b.png", (64, 96))
    assert (photo.sha256, photo.box) == (hashlib.sha256(data).hexdigest(), (0, 16, 64, 80))
    assert torch.equal(photo.pixels, square(quarters((64, 96)), 32)[0])
    assert load_photos(tmp_path / "b.png", 32) == [photo] != [other]
    assert "tensor" not in repr(photo)


# --- names ---


@pytest.mark.parametrize(
    ("names", "cloaked"),
    [
        ([], []),
        (["IMG_1.jpg", "IMG_2.HEIC"], ["IMG_1.png", "IMG_2.png"]),
        (["IMG_1.JPG", "IMG_1.heic", "b.png"], ["IMG_1-jpg.png", "IMG_1-heic.png", "b.png"]),
        (["IMG_1.jpg", "img_1.heic"], ["IMG_1-jpg.png", "img_1-heic.png"]),
        (["a.JPG", "a.jpg"], ["a-jpg.png", "a-jpg-2.png"]),
        (["a.jpg", "A.jpg", "a.JPG"], ["a-jpg.png", "A-jpg-2.png", "a-jpg-3.png"]),
        (["a-jpg.bmp", "a.heic", "a.jpg"], ["a-jpg.png", "a-heic.png", "a-jpg-2.png"]),
        (["a.jpg", "a.heic", "a-jpg.bmp"], ["a-jpg.png", "a-heic.png", "a-jpg-2.png"]),
        (["a.b.jpg", "a.jpg"], ["a.b.png", "a.png"]),
        (["\u00e9.jpg", "e\u0301.heic"], ["\u00e9-jpg.png", "e\u0301-heic.png"]),  # one name to a Mac
    ],
)
def test_cloaked_names(names, cloaked):
    assert cloaked_names(names) == cloaked


stems = st.sampled_from(["a", "A", "a-jpg", "A-JPG", "a-jpg-2", "a-2", "\u00e9", "e\u0301", "\u00df", "ss"])
suffixes = st.sampled_from([*SUFFIXES, ".JPG", ".Jpg", "", "."])
clashing = st.builds("".join, st.tuples(stems, suffixes))
anything = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1)


@given(st.lists(clashing | anything, max_size=12))
def test_cloaked_names_never_clash(names):
    cloaked = cloaked_names(names)
    assert len(cloaked) == len(names)
    assert all(name.endswith(".png") for name in cloaked)
    assert len({unicodedata.normalize("NFC", name).casefold() for name in cloaked}) == len(names)
    assert len({unicodedata.normalize("NFD", name).lower() for name in cloaked}) == len(names)
    assert cloaked == cloaked_names(list(names))


# --- pixel ranges ---


def test_all_levels_survive_the_way_to_float_and_back():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, 3, 16, 16)
    assert (to_float(levels).min().item(), to_float(levels).max().item()) == (-1, 1)
    assert to_float(levels).dtype == torch.float32
    assert torch.equal(to_8bit(to_float(levels), torch.zeros_like(levels), 255.0), levels)


values = st.floats(-1.125, 1.125, width=32) | st.floats(allow_nan=False, width=32)
levels_of = st.integers(0, 255) | st.sampled_from([0, 1, 254, 255])


@given(
    st.lists(st.tuples(values, levels_of), min_size=1, max_size=9),
    st.floats(0, 20) | st.integers(0, 300).map(float) | st.floats(min_value=0),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_8_bits_are_the_nearest_that_keep_the_budget(pixels, budget, dtype):
    images = torch.tensor([value for value, _ in pixels]).to(dtype).expand(1, 3, 1, -1)
    originals = torch.tensor([level for _, level in pixels], dtype=torch.uint8).expand(1, 3, 1, -1)
    rounded = to_8bit(images, originals, budget)
    assert rounded.dtype == torch.uint8
    for image, original, found in zip(*(x[0, 0, 0].tolist() for x in (images, originals, rounded)), strict=True):
        allowed = [level for level in range(256) if abs(level - original) <= budget]
        wanted = min(max(127.5 * (image + 1), 0), 255)
        assert found in allowed
        assert abs(found - wanted) <= min(abs(level - wanted) for level in allowed) + 1e-4


def test_8_bits_of_nan_are_refused():
    originals = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="NaN"):
        to_8bit(torch.full((1, 3, 2, 2), math.nan), originals, 8.0)


# --- writing ---


def test_png_is_lossless_and_its_bytes_depend_on_the_pixels_alone(tmp_path):
    pixels, _ = square(noise(32, 32), 32)
    one, two = tmp_path / "new" / "folder" / "a.png", tmp_path / "b.png"
    write_png(one, pixels)
    write_png(two, pixels.permute(0, 2, 1).contiguous().permute(0, 2, 1))  # same pixels, other memory layout
    assert one.read_bytes() == two.read_bytes()
    with Image.open(one) as image:
        assert image.info == {}
    (photo,) = load_photos(one, 32)
    assert torch.equal(photo.pixels, pixels)


def test_files_get_the_permissions_of_any_new_file_and_nothing_else_is_left(tmp_path):
    path, other = tmp_path / ("x" * 246 + ".png"), tmp_path / "other"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    other.touch()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == other.stat().st_mode
    assert set(tmp_path.iterdir()) == {path, other}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step, error):
    path = tmp_path / ("x" * 246 + ".png")
    seen: list[Path] = []

    def fail(*args):
        seen.extend(set(tmp_path.iterdir()) - {path})
        raise error

    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        write_atomically(path, b"new")
    (temporary,) = seen
    assert temporary.name.startswith(".")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
