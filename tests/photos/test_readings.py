"""How trainers read photos: nothing changes by default, and each kernel, crop and turn is what its trainer's is."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from antidreambooth.photos import readings
from antidreambooth.photos.decoding import load_photos
from antidreambooth.photos.readings import (
    AI_TOOLKIT,
    DIFFUSERS,
    KOHYA,
    ONETRAINER,
    SIMPLETUNER,
    Reading,
    area_taps,
    linear_taps,
    read_photos,
    resize,
    square_at,
)
from tests.conftest import ROOT

PORTRAIT = ROOT / "examples" / "photos" / "obama-1.jpg"
TRAINERS = [DIFFUSERS, KOHYA, ONETRAINER, AI_TOOLKIT, SIMPLETUNER]
RAW = Reading(profile=False)
TURNED = {  # orientation -> how upright pixels (h w c) lie in the file: EXIF 2.32, tag 0x0112
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[::-1],
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p.swapaxes(0, 1)[:, ::-1],
}


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path, pixels, orientation=1, **options):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(TURNED[orientation](pixels))).save(path, exif=exif, **options)
    return path


def adobe_like():
    """A profile that is not sRGB's: its red and blue are swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def rows(taps, pixels):
    """One column of numbers, scaled by taps."""
    return [float(weights @ np.float32(pixels[first : first + len(weights)])) for first, weights in taps]


def scaled(values, count, kernel):
    """A row of grey values in a picture of as many pixels each way, scaled; the same in each row."""
    picture = Image.fromarray(np.stack([np.array([values] * len(values), np.uint8)] * 3, axis=-1))
    result = resize(picture, (count, count), kernel, (0, 0, *picture.size))
    assert (result == result[:1]).all()
    return result[0, :, 0].tolist()


def test_the_default_reads_as_ever(tmp_path):
    saved(tmp_path / "phone.jpg", noise(40, 30), 6)
    saved(tmp_path / "swapped.png", noise(30, 41), icc_profile=adobe_like())
    saved(tmp_path / "tiff.tif", noise(33, 33), 8)
    clear = Image.fromarray(noise(20, 24)).convert("RGBA")
    clear.putalpha(90)
    clear.save(tmp_path / "clear.webp", lossless=True, exact=True)
    before, now = load_photos(tmp_path, 16), read_photos(tmp_path, 16, Reading())
    assert len(now) == 4
    assert now == before
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(now, before, strict=True))


@pytest.mark.parametrize("reading", [*TRAINERS, Reading("face", "area"), Reading("face", "linear", upright=False)])
def test_every_reading_gives_a_square(reading):
    picture = reading(PORTRAIT, 64)
    assert picture.shape == (3, 64, 64)
    assert picture.dtype == torch.uint8
    assert torch.equal(picture, reading(PORTRAIT, 64))
    assert picture.float().std() > 10


def test_trainers_differ(tmp_path):
    path = saved(tmp_path / "phone.jpg", noise(90, 60), 6)
    pictures = [trainer(path, 16, 0.9) for trainer in (DIFFUSERS, KOHYA, AI_TOOLKIT, SIMPLETUNER)]
    for number, one in enumerate(pictures):
        assert not any(torch.equal(one, other) for other in pictures[number + 1 :])


def test_area_is_the_mean_of_what_is_covered():
    assert scaled([10, 20, 30, 50], 2, "area") == [15, 40]
    # 3 -> 2: one and a half pixels each; (10 + 40/2) / 1.5 = 20 and (40/2 + 100) / 1.5 = 80
    assert scaled([10, 40, 100], 2, "area") == [20, 80]
    # 5 -> 2: two and a half each; (10 + 20 + 30/2) / 2.5 = 18 and (30/2 + 40 + 50) / 2.5 = 42
    assert scaled([10, 20, 30, 40, 50], 2, "area") == [18, 42]


def test_linear_looks_at_two_pixels_only():
    # 8 -> 2: centres at 1.5 and 5.5, half-way between pixels 1 and 2, and 5 and 6; the others are not seen
    assert scaled([255, 10, 20, 255, 255, 40, 80, 255], 2, "linear") == [15, 60]
    # 6 -> 2: centres at 1 and 4, on a pixel
    assert scaled([255, 10, 255, 255, 70, 255], 2, "linear") == [10, 70]
    # 2 -> 4: centres at -.25, .25, .75 and 1.25, of which the outer ones repeat the edge
    assert scaled([0, 100], 4, "linear") == [0, 25, 75, 100]


def test_halves_are_rounded_upward_as_by_opencv():
    assert scaled([10, 11], 1, "area") == [11]
    assert scaled([11, 12], 1, "linear") == [12]


@given(length=st.integers(1, 300), share=st.floats(0, 1))
def test_area_spreads_every_pixel_evenly(length, share):
    count = 1 + int(share * (length - 1))
    weights = np.zeros((count, length))
    for index, (first, own) in enumerate(area_taps(length, count)):
        weights[index, first : first + len(own)] = own
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(0), count / length, rtol=1e-4)
    for index in range(count):  # exactly, by fractions
        low, high = Fraction(index * length, count), Fraction((index + 1) * length, count)
        covered = [min(high, Fraction(x + 1)) - max(low, Fraction(x)) for x in range(length)]
        exact = [float(max(Fraction(0), one) / (high - low)) for one in covered]
        np.testing.assert_allclose(weights[index], exact, atol=1e-5)


@given(length=st.integers(1, 300), count=st.integers(1, 300))
def test_linear_keeps_ramps(length, count):
    """What is linear between the first and the last pixel's centres stays so."""
    centres = np.clip((np.arange(count) + 0.5) * length / count - 0.5, 0, length - 1)
    assert rows(linear_taps(length, count), np.arange(length)) == pytest.approx(centres, abs=1e-3)


@given(
    kernel=st.sampled_from(["area", "linear"]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    side=st.integers(1, 40),
    level=st.integers(0, 255),
)
@settings(max_examples=50)
def test_plain_stays_plain_and_rows_are_as_columns(kernel, size, side, level):
    plain = Image.new("RGB", size, (level, 0, 255))
    assert (resize(plain, (side, side), kernel, (0, 0, *size)) == (level, 0, 255)).all()
    side, pixels = min(side, *size), noise(*size)  # area enlarges with another kernel
    one, other = (
        resize(Image.fromarray(p), (side, side), kernel, (0, 0, p.shape[1], p.shape[0])).astype(int)
        for p in (pixels, np.ascontiguousarray(pixels.swapaxes(0, 1)))
    )
    assert np.abs(one - other.swapaxes(0, 1)).max() <= 1  # one sums rows first, one columns


@pytest.mark.parametrize("kernel", ["area", "linear", "bilinear", "bicubic", "lanczos"])
def test_at_its_own_size_a_photo_stays(kernel):
    pixels = noise(24, 24)
    assert (resize(Image.fromarray(pixels), (24, 24), kernel, (0, 0, 24, 24)) == pixels).all()


def test_area_enlarges_as_kohya_does():
    picture, size = Image.fromarray(noise(10, 10)), (16, 16)
    by_pillow = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
    assert (resize(picture, size, "area", (0, 0, 10, 10)) == by_pillow).all()


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
def test_the_other_kernels_are_pillows(name, tmp_path):
    path = saved(tmp_path / "a.png", noise(40, 40))
    with Image.open(path) as image:
        expected = np.asarray(image.resize((16, 16), Image.Resampling[name.upper()]))
    assert (Reading(kernel=name)(path, 16).permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize(("upright", "orientation"), [(up, one) for up in (True, False) for one in TURNED])
@pytest.mark.parametrize("profile", [True, False])
@pytest.mark.parametrize("crop", ["centre", "random"])
def test_upright_or_as_stored(tmp_path, upright, orientation, profile, crop):
    """At the photo's own size nothing is scaled; the square is the middle of an even number of rows."""
    pixels = noise(24, 16)
    path = saved(tmp_path / "a.png", pixels, orientation)
    found = Reading(crop, upright=upright, profile=profile).photo(path, 16)
    expected = pixels if crop == "random" else pixels[4:20]
    seen = expected if upright else TURNED[orientation](expected)
    assert (found.pixels.permute(1, 2, 0).numpy() == seen).all()
    assert found.size == (16, 24)
    assert found.box == ((0, 0, 16, 24) if crop == "random" else (0, 4, 16, 20))


def test_trainers_ignore_profiles(tmp_path):
    pixels = noise(16, 16)
    path = saved(tmp_path / "a.png", pixels, icc_profile=adobe_like())
    assert (RAW(path, 16).permute(1, 2, 0).numpy() == pixels).all()
    assert np.abs(Reading()(path, 16).permute(1, 2, 0).numpy().astype(int) - pixels).max() > 20


def test_trainers_see_hidden_colours(tmp_path):
    pixels = np.dstack([noise(16, 16), np.zeros((16, 16), np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (RAW(tmp_path / "a.png", 16).permute(1, 2, 0).numpy() == pixels[..., :3]).all()
    assert (Reading()(tmp_path / "a.png", 16) == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_any_mode_is_read_as_pillow_makes_rgb_of_it(mode, tmp_path):
    image = Image.fromarray(noise(16, 16)).convert(mode)
    path = tmp_path / "a.tif"
    image.save(path)
    assert (RAW(path, 16).permute(1, 2, 0).numpy() == np.asarray(image.convert("RGB"))).all()


def test_a_random_crop_scales_the_shorter_side_and_slides_along_the_longer_one(tmp_path):
    photo = DIFFUSERS.photo(saved(tmp_path / "a.png", noise(30, 41)), 16)
    assert photo.pixels.shape == (3, 16, 21)  # 16 * 41 / 30 = 21.9, rounded down as torchvision does
    for place, left in ((0.0, 0), (0.16, 0), (0.17, 1), (0.5, 3), (0.999999, 5)):
        assert torch.equal(square_at(photo.pixels, place), photo.pixels[:, :, left : left + 16])
        assert torch.equal(DIFFUSERS(photo.path, 16, place), photo.pixels[:, :, left : left + 16])
    assert torch.equal(square_at(photo.pixels.mT, 0.17), photo.pixels[:, :, 1:17].mT)


def test_a_square_has_one_place(tmp_path):
    photo = DIFFUSERS.photo(saved(tmp_path / "a.png", noise(30, 30)), 16)
    assert torch.equal(square_at(photo.pixels, 0.0), photo.pixels)
    assert torch.equal(square_at(photo.pixels, 0.99), photo.pixels)


def test_a_face_is_two_of_its_widths_wide(monkeypatch, tmp_path):
    pixels = noise(60, 90)
    monkeypatch.setattr(readings, "face_boxes", lambda _: [(40, 10, 52, 22), (0, 0, 8, 8)])
    photo = Reading("face").photo(saved(tmp_path / "a.png", pixels), 24)
    assert photo.box == (34, 4, 58, 28)
    assert (photo.pixels.permute(1, 2, 0).numpy() == pixels[4:28, 34:58]).all()
    monkeypatch.setattr(readings, "face_boxes", lambda _: [(80, 50, 92, 62)])
    assert Reading("face").photo(tmp_path / "a.png", 24).box == (66, 36, 90, 60)  # shifted into the photo


def test_a_face_is_found_and_its_square_lies_as_the_photo_does(tmp_path):
    pixels = np.full((900, 1200, 3), 128, np.uint8)
    with Image.open(PORTRAIT) as image:
        pixels[200:800, 450:1050] = np.asarray(image)
    path = saved(tmp_path / "a.png", pixels, 6)
    upright = Reading("face", "bilinear")
    lying = replace(upright, upright=False)
    left, top, right, bottom = box = upright.photo(path, 32).box
    assert lying.photo(path, 32).box == box
    assert 400 < left < right < 1100
    assert 150 < top < bottom < 850
    assert right - left == bottom - top < 600
    assert torch.equal(lying(path, 32), upright(path, 32).mT.flip(1))
    assert not torch.equal(upright(path, 32), Reading(kernel="bilinear")(path, 32))


def test_without_a_face_it_is_the_centred_square(tmp_path):
    path = saved(tmp_path / "nobody.png", np.full((30, 20, 3), 90, np.uint8))
    with pytest.warns(UserWarning, match="no face is found in nobody.png: its centred square is taken"):
        photo = Reading("face").photo(path, 16)
    assert photo.box == (0, 5, 20, 25)
    assert torch.equal(photo.pixels, Reading()(path, 16))


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (1, 200)])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_strange_shapes(trainer, size, tmp_path):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    assert (trainer(tmp_path / "a.png", 4).permute(1, 2, 0).numpy() == (10, 200, 30)).all()
