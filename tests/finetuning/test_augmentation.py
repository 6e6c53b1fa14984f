"""What an attacker's pipeline does to photos: nothing that is not asked for, and the same for the same generator."""

from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from antidreambooth.finetuning.augmentation import Augmentation, jpeg
from tests.conftest import random_images


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(side=32, count=1):
    """Gradients, which compression is made for."""
    ramp = torch.linspace(20, 230, side)
    planes = [ramp.expand(side, side), ramp[:, None].expand(side, side), torch.full((side, side), 90.0)]
    return torch.stack(planes).round().to(torch.uint8).expand(count, -1, -1, -1).contiguous()


def by_pillow(picture, quality):
    buffer = BytesIO()
    pixels = picture.permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def test_nothing_is_the_default():
    pictures = random_images(3)
    assert not Augmentation().active
    assert torch.equal(Augmentation()(pictures, seeded()), pictures)


@pytest.mark.parametrize("augmentation", [Augmentation(crop=0.9), Augmentation(flip=True), Augmentation(jpeg=100)])
def test_anything_asked_for_is_active(augmentation):
    assert augmentation.active


AUGMENTATIONS = st.builds(
    Augmentation, crop=st.floats(0.05, 1.0), flip=st.booleans(), jpeg=st.none() | st.integers(1, 100)
)


@given(augmentation=AUGMENTATIONS, seed=st.integers(0, 2**40), side=st.sampled_from([1, 7, 16]))
@settings(max_examples=40)
def test_the_generator_decides_everything(augmentation, seed, side):
    pictures = random_images(3, side)
    kept = pictures.clone()
    first, second = (augmentation(pictures, seeded(seed)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(pictures, kept)
    assert first.shape == pictures.shape
    assert first.dtype == torch.uint8


def test_another_draw_is_another_crop():
    pictures, augmentation, generator = random_images(1), Augmentation(crop=0.5), seeded()
    first, second = augmentation(pictures, generator), augmentation(pictures, generator)
    assert not torch.equal(first, second)


def test_a_photo_is_mirrored_or_not():
    pictures, kinds = random_images(64), []
    for before, after in zip(pictures, Augmentation(flip=True)(pictures, seeded()), strict=True):
        mirrored = torch.equal(after, before.flip(-1))
        assert mirrored or torch.equal(after, before)
        kinds.append(mirrored)
    assert 16 < sum(kinds) < 48  # even chance: 8 standard deviations


def test_draws_do_not_depend_on_what_is_switched_on():
    pictures = random_images(8)
    flipped, cropped = Augmentation(flip=True), Augmentation(crop=0.5, flip=True)
    plain = Augmentation(crop=0.5)(pictures, seeded())
    mirrored = [torch.equal(b, a.flip(-1)) for a, b in zip(pictures, flipped(pictures, seeded()), strict=True)]
    assert any(mirrored)
    for index, picture in enumerate(cropped(pictures, seeded())):
        assert torch.equal(picture, plain[index].flip(-1) if mirrored[index] else plain[index])


def test_a_crop_enlarges_a_part():
    """Of a ramp: every crop is a ramp again, not steeper, within the values that were there."""
    picture = smooth(64)[:, :, :, :]
    for seed in range(8):
        ramp = Augmentation(crop=0.25)(picture, seeded(seed))[0, 0].float()
        assert ramp.min() >= 20
        assert ramp.max() <= 230
        assert 0.2 * 210 < ramp[32, -1] - ramp[32, 0] < 210
        assert (ramp[32].diff() >= 0).all()
        assert (ramp - ramp[32]).abs().max() <= 1


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_is_pillows(quality):
    for picture in (smooth()[0], random_images(1, 32)[0]):
        difference = (jpeg(picture, quality).int() - by_pillow(picture, quality).int()).abs().float()
        assert difference.mean() < 1  # one encoder rounds unlike the other
        assert difference.max() <= 8
    assert torch.equal(jpeg(picture, quality), Augmentation(jpeg=quality)(picture[None], seeded())[0])


def test_jpeg_costs_little_and_less_at_higher_quality():
    picture = smooth(64)[0]
    errors = [(jpeg(picture, quality).float() - picture.float()).abs().mean() for quality in (5, 30, 95)]
    assert 0 < errors[2] < 2
    assert errors[2] < errors[1] < errors[0]


def test_jpeg_halves_the_colours_resolution():
    """4:2:0: one-pixel stripes of two colours of equal brightness become one colour."""
    stripes = torch.zeros(3, 32, 32)
    stripes[0, :, ::2], stripes[1] = 118.0, 60.0  # red in every second column
    stripes[2, :, 1::2] = 118.0 * 0.299 / 0.114  # as bright in blue
    coded = jpeg(stripes.clamp(0, 255).round().to(torch.uint8), 95).float()
    assert (coded[0, :, ::2] - coded[0, :, 1::2]).abs().mean() < 20  # 118 before
