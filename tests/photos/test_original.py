"""Photos as their files hold them: numbers, depth, alpha, profile, what is kept and what is not."""

import struct
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, TiffImagePlugin

from antidreambooth.errors import InputError
from antidreambooth.photos import exif, sixteen
from antidreambooth.photos.decoding import decode
from antidreambooth.photos.original import original_of, read_original, turn, turn_back
from tests.photos.samples import (
    ARTIST,
    FILM,
    KINDS,
    PHOTOS,
    RED,
    SECRETS,
    T,
    deep,
    display_p3,
    encoded,
    exif_block,
    fine,
    lab_profile,
    linear_grey,
    noise,
    odd_ink,
    phone_jpeg,
    plain,
    png16,
    png_chunk,
    swapped_rgb,
    tiff16,
    with_alpha,
)

STORED = {
    1: None,
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}


def tagged(orientation):
    """EXIF with nothing but an orientation."""
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    return block.tobytes()


# --- numbers ---

RGB, DEEP_RGB = noise(24, 16), fine(noise(24, 16))
RGBA, DEEP_RGBA = with_alpha(noise(24, 16)), fine(with_alpha(noise(24, 16)))
GREY = RGB.convert("L")
EXACT = {  # file -> what it holds, bit for bit: numbers, alpha
    "RGB png": (encoded(RGB, "PNG"), RGB, None),
    "RGB webp": (encoded(RGB, "WEBP", lossless=True), RGB, None),
    "RGB tiff": (encoded(RGB, "TIFF", compression="tiff_lzw"), RGB, None),
    "RGB bmp": (encoded(RGB, "BMP"), RGB, None),
    "RGB jpeg 2000": (encoded(RGB, "JPEG2000"), RGB, None),
    "RGBA png": (encoded(RGBA, "PNG"), RGBA.convert("RGB"), RGBA.getchannel("A")),
    "RGBA tiff": (encoded(RGBA, "TIFF"), RGBA.convert("RGB"), RGBA.getchannel("A")),
    "RGBA webp": (encoded(RGBA, "WEBP", lossless=True, exact=True), RGBA.convert("RGB"), RGBA.getchannel("A")),
    "grey png": (encoded(GREY, "PNG"), GREY, None),
    "grey and alpha": (encoded(RGBA.convert("LA"), "PNG"), GREY, RGBA.getchannel("A")),
    "palette": (encoded(RGB.quantize(16), "PNG"), RGB.quantize(16).convert("RGB"), None),
    "black and white": (encoded(GREY.convert("1"), "PNG"), GREY.convert("1").convert("L"), None),
    "16-bit png": (png16(DEEP_RGB), DEEP_RGB, None),
    "16-bit RGBA png": (png16(DEEP_RGBA), DEEP_RGBA[..., :3], DEEP_RGBA[..., 3]),
    "16-bit grey and alpha": (png16(DEEP_RGBA[..., 2:]), DEEP_RGBA[..., 2:3], DEEP_RGBA[..., 3]),
    "16-bit grey png": (png16(DEEP_RGB[..., :1]), DEEP_RGB[..., :1], None),
    "16-bit grey png by Pillow": (encoded(deep(np.uint16, DEEP_RGB[..., 0]), "PNG"), DEEP_RGB[..., :1], None),
    "16-bit grey tiff": (encoded(deep(np.uint16, DEEP_RGB[..., 0]), "TIFF"), DEEP_RGB[..., :1], None),
    "32-bit grey tiff": (encoded(deep(np.int32, DEEP_RGB[..., 0]), "TIFF"), DEEP_RGB[..., :1], None),
    "16-bit tiff": (tiff16(DEEP_RGB), DEEP_RGB, None),
    "16-bit little-endian tiff": (tiff16(DEEP_RGB, order="<"), DEEP_RGB, None),
    "16-bit RGBA tiff": (tiff16(DEEP_RGBA), DEEP_RGBA[..., :3], DEEP_RGBA[..., 3]),
}


@pytest.mark.parametrize("kind", EXACT)
def test_numbers_and_alpha_are_the_files_own(kind):
    data, numbers, alpha = EXACT[kind]
    original = read_original(data, "x")
    assert np.array_equal(original.numbers, np.atleast_3d(np.asarray(numbers)))
    assert original.numbers.dtype == np.asarray(numbers).dtype
    assert (original.size, original.turned) == ((24, 16), 1)
    if alpha is None:
        assert original.alpha is None
    else:
        assert original.alpha is not None
        assert original.alpha.dtype == original.numbers.dtype
        assert np.array_equal(original.alpha, np.asarray(alpha))


@pytest.mark.parametrize(
    ("image", "clear", "alpha"),
    [
        (Image.merge("RGB", [Image.new("L", (2, 1), value) for value in RED]), RED, [0, 0]),
        (plain("L", 7, (2, 1)), 7, [0, 0]),
        (plain("L", 7, (2, 1)), 8, [255, 255]),
        (deep(np.uint16, np.array([[263, 7]])), 263, [0, 65535]),  # 263 is 7 modulo 256
    ],
)
def test_a_transparent_colour_becomes_alpha_and_stays_itself(image, clear, alpha):
    original = read_original(encoded(image, "PNG", transparency=clear), "x")
    assert original.alpha is not None
    assert original.alpha.tolist() == [alpha]
    assert np.array_equal(original.numbers, np.atleast_3d(np.asarray(image)))


def test_a_transparent_colour_of_16_bits_becomes_alpha():
    pixels = np.array([[[1, 2, 3], [1, 2, 259]]], np.uint16)  # alike in the low byte
    original = read_original(png16(pixels, png_chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))), "x")
    assert original.alpha is not None
    assert original.alpha.tolist() == [[0, 65535]]
    assert np.array_equal(original.numbers, pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_people_see_what_decode_shows(kind):
    image, file_format, options, _ = KINDS[kind]
    data = encoded(image, file_format, **options)
    original = read_original(data, "x")
    seen, expected = np.asarray(original.looks(), int), np.asarray(decode(data, "x"), int)
    assert np.abs(seen - expected).max() <= (1 if original.numbers.dtype == np.uint16 else 0)


def test_trainers_see_the_high_byte_and_grey_three_times():
    assert np.array_equal(read_original(png16(DEEP_RGBA), "x").pixels(), DEEP_RGBA[..., :3] >> 8)
    grey = read_original(encoded(GREY, "PNG"), "x").pixels()
    assert np.array_equal(grey, np.asarray(GREY.convert("RGB")))
    with Image.open(BytesIO(png16(DEEP_RGBA))) as image:  # which is what Pillow gives them
        assert np.array_equal(np.asarray(image.convert("RGB")), DEEP_RGBA[..., :3] >> 8)


@pytest.mark.parametrize("orientation", STORED)
def test_turning_is_pillows_and_back_again(orientation):
    transpose = STORED[orientation]
    stored = np.asarray(RGB if transpose is None else RGB.transpose(transpose))
    assert np.array_equal(turn(stored, orientation), np.asarray(RGB))
    assert np.array_equal(turn_back(np.asarray(RGB), orientation), stored)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "16-bit PNG", "16-bit TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", STORED)
def test_photos_are_upright_and_say_how_they_lay(kind, orientation):
    transpose = STORED[orientation]
    lying = RGB if transpose is None else RGB.transpose(transpose)
    if kind == "16-bit PNG":
        data = png16(fine(lying), png_chunk(b"eXIf", tagged(orientation)[6:]))
    elif kind == "16-bit TIFF":
        data = tiff16(fine(lying), [(274, 3, [orientation])])
    else:
        data = encoded(lying, kind, exif=tagged(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    original = read_original(data, "x")
    assert (original.size, original.turned) == (RGB.size, orientation)
    if kind != "JPEG":
        assert np.array_equal(original.pixels(), np.asarray(RGB))
    assert np.array_equal(np.asarray(original.looks()), np.asarray(decode(data, "x")))


def test_a_heic_is_upright_by_its_own_rules():
    original = read_original(encoded(RGB.transpose(T.ROTATE_90), "HEIF", exif=tagged(6)), "x")
    assert (original.size, original.turned) == (RGB.size, 1)


# --- profiles ---


@pytest.mark.parametrize(
    ("image", "file_format", "profile"),
    [
        (RGB, "JPEG", display_p3()),
        (RGB, "PNG", swapped_rgb()),
        (RGB, "WEBP", display_p3()),
        (RGB, "TIFF", display_p3()),
        (RGB, "HEIF", display_p3()),
        (RGB, "AVIF", display_p3()),
        (RGB.quantize(8), "PNG", display_p3()),
        (GREY, "JPEG", linear_grey()),
        (GREY.convert("1"), "PNG", linear_grey()),
        (deep(np.uint16, DEEP_RGB[..., 0]), "PNG", linear_grey()),
    ],
)
def test_profiles_are_kept_and_not_applied(image, file_format, profile):
    with_it, without = (
        read_original(encoded(image, file_format, **how), "x") for how in ({"icc_profile": profile}, {})
    )
    assert with_it.profile == profile
    assert without.profile is None
    assert np.array_equal(with_it.numbers, without.numbers)


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"garbage"),
        ("RGB", swapped_rgb()[:300]),
        ("RGB", linear_grey()),
        ("L", swapped_rgb()),
        ("RGB", lab_profile()),
    ],
)
def test_profiles_that_cannot_be_used_are_left_out_and_that_is_said(mode, profile):
    original = read_original(encoded(plain(mode, 3 if mode == "L" else RED), "TIFF", icc_profile=profile), "x")
    assert original.profile is None
    assert original.removed == ("a colour profile that cannot be used",)


def test_inks_go_through_their_profile_which_is_gone_then():
    data = encoded(plain("CMYK", (255, 0, 0, 0)), "TIFF", icc_profile=odd_ink())
    original = read_original(data, "x")
    assert np.array_equal(original.numbers, np.asarray(decode(data, "x")))
    assert original.profile is None
    assert original.removed == ("the inks of CMYK, as it is RGB now",)


@pytest.mark.parametrize("profile", [b"garbage", swapped_rgb()])
def test_inks_with_a_profile_that_is_none_are_converted_without_it(profile):
    inks = plain("CMYK", (0, 255, 255, 0))
    original = read_original(encoded(inks, "TIFF", icc_profile=profile), "x")
    assert np.array_equal(original.numbers, np.asarray(inks.convert("RGB")))


# --- metadata ---


def test_a_phones_exif_is_kept_from_a_list():
    original = read_original(phone_jpeg(RGB), "x")
    assert original.exif is not None
    found = Image.Exif()
    found.load(original.exif)
    photo = found.get_ifd(ExifTags.IFD.Exif)
    assert {*found} == {0x010F, 0x0110, 0x0112, 0x011A, 0x0132, 0x013B, 0x8769}
    assert {*photo} == {0x829A, 0x8827, 0x9000, 0x9003, 0xA001, 0xA434}
    assert (found[0x0110], found[0x0112], photo[0x829A], photo[0x8827]) == ("Phone 17", 1, 1 / 60, 100)
    assert ARTIST + b"\0" in original.exif  # as the camera wrote it, in UTF-8
    assert not found.get_ifd(ExifTags.IFD.IFD1)
    assert not found.get_ifd(ExifTags.IFD.GPSInfo)


def test_what_is_not_kept_is_named():
    removed = {*read_original(phone_jpeg(RGB), "x").removed}
    film = "what follows the photo in its file, such as a film"
    other = {film, "content credentials (C2PA)", "XMP metadata", "IPTC metadata", "texts in the file"}
    assert removed == {*SECRETS, *other}
    second = {*read_original(phone_jpeg(RGB, second=noise(8, 8)), "x").removed}
    assert second == removed - {film} | {"a second picture in the file, such as a gain map"}


@pytest.mark.parametrize(
    ("data", "removed"),
    [
        (encoded(RGB, "PNG"), ()),
        (encoded(RGB, "JPEG") + bytes(70000), ()),
        (encoded(RGB, "JPEG") + FILM, ("what follows the photo in its file, such as a film",)),
        (encoded(RGB, "GIF", save_all=True, append_images=[noise(24, 16, seed=2)]), ("all frames but the first",)),
        (encoded(RGB, "PNG", save_all=True, append_images=[noise(24, 16, seed=2)]), ("all frames but the first",)),
        (encoded(RGB, "WEBP", save_all=True, append_images=[noise(24, 16, seed=2)]), ("all frames but the first",)),
        (encoded(RGB, "TIFF", save_all=True, append_images=[RGB]), ("all pages but the first",)),
        (encoded(RGB, "HEIF", save_all=True, append_images=[noise(24, 16, seed=2)]), ("all pictures but the first",)),
        (encoded(RGB, "JPEG", comment="hello"), ("texts in the file",)),
        (png16(DEEP_RGB, png_chunk(b"tEXt", b"parameters\0a cat")), ("texts in the file",)),
        (png16(DEEP_RGB, png_chunk(b"caBX", b"\0\0\0\x40jumb\0\0\0\x20jumdc2pa")), ("content credentials (C2PA)",)),
        (encoded(RGB.convert("LAB"), "TIFF"), ("the L*a*b* numbers, as it is RGB now",)),
        (encoded(deep(np.uint16, DEEP_RGB[..., 0]), "JPEG2000"), ()),
    ],
)
def test_each_loss_is_named(data, removed):
    assert read_original(data, "x").removed == removed


def test_more_than_8_bits_that_are_read_as_8_are_named():
    data, lost = tiff16(DEEP_RGBA), ("all but the upper 8 bits of each number",)
    premultiplied = tiff16(DEEP_RGBA).replace(
        struct.pack(">HHIHH", 338, 3, 1, 2, 0), struct.pack(">HHIHH", 338, 3, 1, 1, 0)
    )
    assert data != premultiplied
    original = read_original(premultiplied, "x")
    assert original.numbers.dtype == np.uint8
    assert original.removed == lost
    import pillow_heif

    deep_heic = BytesIO()
    pillow_heif.encode("RGB;16", (24, 16), DEEP_RGB.astype("<u2").tobytes(), deep_heic, quality=90)
    assert read_original(deep_heic.getvalue(), "x").removed == lost


def test_a_pngs_own_words_on_colour_are_kept():
    words = png_chunk(b"gAMA", struct.pack(">I", 100000)), png_chunk(b"cICP", bytes([9, 16, 0, 1]))
    original = read_original(png16(DEEP_RGB, words[0], png_chunk(b"tEXt", b"a\0b"), words[1]), "x")
    assert original.chunks == b"".join(words)


def test_a_picture_without_its_file_is_taken_as_pillow_has_it():
    image = Image.open(BytesIO(encoded(RGB, "PNG", exif=tagged(6), icc_profile=display_p3())))
    original = original_of(image, "photos[0]")
    assert (original.size, original.turned, original.profile) == ((16, 24), 6, display_p3())
    assert np.array_equal(turn_back(original.numbers, 6), np.asarray(RGB))
    assert np.array_equal(original_of(RGB, "x").numbers, np.asarray(RGB))


# --- blocks that are broken ---


def broken(tag, kind, value):
    """A block with an orientation of 6 and one entry that is not as it should be."""
    entries = [(0x0112, 3, struct.pack(">HH", 6, 0), 1), (tag, kind, value, 4 if kind in (1, 2, 7) else 1)]
    table = b"".join(struct.pack(">HHI", tag, kind, count) + value for tag, kind, value, count in entries)
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", 2) + table + bytes(4)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (broken(0x011A, 2, b"ab\0\0"), 6),  # a resolution that is a text: Pillow's exif_transpose fails on it
        (broken(0x010F, 2, b"ab\0\0")[:-9], 6),
        (broken(0x8769, 4, struct.pack(">I", 8)), 6),  # a directory that is its own
        (broken(0x8825, 4, struct.pack(">I", 99999)), 6),
        (broken(0xFFFF, 99, b"abcd"), 6),
        (b"garbage!", 1),
        (b"", 1),
    ],
)
def test_broken_exif_does_not_hinder(file_format, block, turned):
    original = read_original(encoded(RGB, file_format, exif=b"Exif\0\0" + block), "x")
    assert original.turned == turned
    if original.exif is not None:
        found = Image.Exif()
        found.load(original.exif)
        assert {*found} <= {0x010F, 0x0112}
        assert found[0x0112] == 1


def test_long_values_are_no_names():
    picture = encoded(noise(48, 32), "JPEG")[:3000]
    block = exif.Block(main=exif.Directory({0x010F: (2, picture), 0x0110: (2, b"Phone\0")}))
    assert exif.kept(block).main.entries == {0x0110: (2, b"Phone\0")}
    assert exif.without_pictures(block).main.entries == {0x0110: (2, b"Phone\0")}  # it begins as a JPEG does
    assert exif.without_pictures(exif.Block(main=exif.Directory({0x010F: (2, b"x" * 5000)}))).main.entries == {}


@given(st.binary(max_size=200), st.sampled_from([b"II*\0", b"MM\0*"]), st.integers(0, 40))
def test_any_bytes_are_read_and_written_as_a_block(data, magic, start):
    block = exif.parse(magic + struct.pack("<I" if magic[:1] == b"I" else ">I", start) + data)
    assert block is not None
    for part in (exif.kept(block), exif.without_pictures(block)):
        again = exif.parse(exif.serialised(part, 3))
        assert again is not None
        assert again.main.entries.pop(exif.ORIENTATION) == (3, struct.pack(f"{block.order}H", 3))
        below = {tag: inner for tag, inner in part.main.below.items() if inner}
        assert again.main.entries == part.main.entries
        assert {*again.main.below} == {*below}
        assert all(again.main.below[tag].entries == inner.entries for tag, inner in below.items())
    assert [*exif.removed(block)] == [*dict.fromkeys(exif.removed(block))]


@given(st.integers(0, 700), st.integers(0, 255))
def test_a_phones_block_with_one_byte_changed_is_read(place, value):
    data = bytearray(exif_block())
    data[place % len(data)] = value
    block = exif.parse(bytes(data))
    if block is not None:
        assert not any(
            secret in exif.serialised(exif.kept(block), 1) for secret in (SECRETS["a thumbnail of the photo"],)
        )


# --- what cannot be read, as before ---

SHORTENED = png16(DEEP_RGB)[:-60]


def raw():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[50706] = 0x01040000
    return encoded(plain("RGB", RED), "TIFF", tiffinfo=tags)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        raw(),
        b"II*\0\x10\0\0\0CR\2\0",
        encoded(RGB, "JPEG")[:500],
        encoded(RGB, "PNG")[:500],
        SHORTENED,
        encoded(deep(np.float32, DEEP_RGB[..., 0]), "TIFF"),
        encoded(deep(np.int32, DEEP_RGB[..., 0].astype(int) + 70000), "TIFF"),
        encoded(deep(np.int32, DEEP_RGB[..., 0].astype(int) - 70000), "TIFF"),
    ],
)
def test_what_decode_refuses_is_refused_in_the_same_words(data):
    with pytest.raises(InputError) as expected:
        decode(data, "IMG_1.jpg")
    with pytest.raises(InputError) as caught:
        read_original(data, "IMG_1.jpg")
    assert str(caught.value) == str(expected.value)


def test_what_only_libvips_finds_damaged_is_named_too(monkeypatch):
    def fail(image, data, rows):
        raise OSError("libpng read error")

    monkeypatch.setattr(sixteen, "read", fail)
    with pytest.raises(InputError, match=r"^IMG_1\.png cannot be decoded: it is truncated or damaged"):
        read_original(png16(DEEP_RGB), "IMG_1.png")
    monkeypatch.undo()
    with pytest.raises(OSError, match="png"):
        [*sixteen.read(Image.open(BytesIO(SHORTENED)), SHORTENED, 256)[1]]


def test_photos_up_to_the_hard_limit_are_read(monkeypatch):
    data = encoded(RGB, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16 // 2)
    assert read_original(data, "x").size == (24, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16 // 2 - 1)
    with pytest.raises(InputError, match="too large to be decoded safely"):
        read_original(data, "x")


@pytest.mark.parametrize("photo", PHOTOS)
def test_a_large_photo_of_many_rows_is_read_as_a_small_one(photo):
    """More rows than are worked on at a time."""
    name, make = PHOTOS[photo]
    tall = Image.fromarray(np.tile(np.asarray(RGB), (40, 1, 1)))
    data = make(tall)
    original = read_original(data, name)
    assert original.size == tall.size == (24, 640)
    seen = np.asarray(decode(data, name), int)
    assert np.abs(np.asarray(original.looks(), int) - seen).max() == 0


def test_the_samples_hold_what_is_looked_for():
    """So that a test which finds nothing is not blind."""
    data = phone_jpeg(RGB)
    assert all(secret in data for secret in SECRETS.values())
    with Image.open(BytesIO(data)) as image:
        assert image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
        assert {"xmp", "photoshop", "comment"} <= {*image.info}
