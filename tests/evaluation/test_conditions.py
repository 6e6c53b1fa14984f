"""What happens to photos on their way to the attacker."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.evaluation.conditions import JPEG, Blur, Clean, Mix, Rescale, Scene
from antidreambooth.finetuning.augmentation import jpeg
from tests.conftest import random_images


def nothing():
    pytest.fail("the backbone was loaded, which takes a while, and nothing here needs it")


def scene(clean=4, seed=0, backbone=nothing):
    return Scene(backbone, random_images(clean, seed=9), seed)


@pytest.fixture
def with_model(small_model):
    return scene(backbone=lambda: load_backbone(str(small_model)))


CONDITIONS = [JPEG(), JPEG(10), Rescale(), Rescale(0.01), Blur(), Blur(0.2), Clean(steps=10), Mix(), Mix(0.0), Mix(1.0)]


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: f"{type(c).__name__}-{vars(c)}")
def test_size_and_kind_stay_and_nothing_is_left_to_chance(condition, with_model):
    photos = random_images(4)
    kept = photos.clone()
    first, second = condition(photos, with_model), condition(photos, with_model)
    assert first.shape == photos.shape
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert torch.equal(photos, kept)


@given(count=st.integers(1, 5), height=st.integers(8, 24), width=st.integers(8, 24), factor=st.floats(0.1, 1.0))
@settings(max_examples=30)
def test_any_shape(count, height, width, factor):
    photos = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
    for condition in (JPEG(), Rescale(factor), Blur(factor)):
        assert condition(photos, scene(0)).shape == photos.shape


@given(level=st.integers(0, 255), factor=st.floats(0.1, 1.0), sigma=st.floats(0.1, 2.0))
@settings(max_examples=30)
def test_a_plain_picture_stays(level, factor, sigma):
    photos = torch.full((1, 3, 16, 16), level, dtype=torch.uint8)
    assert torch.equal(Rescale(factor)(photos, scene(0)), photos)
    assert torch.equal(Blur(sigma)(photos, scene(0)), photos)


def test_jpeg_is_that_of_the_attacker():
    photos = random_images(2)
    coded = JPEG(40)(photos, scene())
    assert torch.equal(coded, torch.stack([jpeg(photo, 40) for photo in photos]))
    assert not torch.equal(coded, photos)


def test_rescaling_takes_away_what_is_fine_and_keeps_what_is_coarse():
    stripes = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 200
    assert (Rescale(0.5)(stripes, scene())[..., 4:-4].float() - 100).abs().max() < 30  # 100 before
    halves = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    halves[..., 16:] = 200
    assert (Rescale(0.5)(halves, scene()).float() - halves.float())[..., [4, 27]].abs().max() <= 2
    assert torch.equal(Rescale(1.0)(halves, scene()), halves)


def test_blur_keeps_the_mean_and_spreads_as_a_gaussian():
    photos = random_images(2, 32)
    assert (Blur(2.0)(photos, scene()).float().mean() - photos.float().mean()).abs() < 3
    dot = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    dot[..., 16, 16] = 255
    row = Blur(1.0)(dot, scene())[0, 0, 16].float()
    expected = 255 / (2 * torch.pi) * torch.exp(-((torch.arange(33) - 16.0) ** 2) / 2)
    assert (row - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("share", "photos", "clean", "replaced"),
    [(0.5, 4, 4, 2), (0.5, 3, 4, 2), (0.0, 4, 4, 0), (0.01, 4, 4, 1), (1.0, 4, 4, 4), (1.0, 4, 2, 2), (0.5, 4, 0, 0)],
)
def test_clean_photos_take_the_last_places(share, photos, clean, replaced):
    before, others = random_images(photos), scene(clean)
    after = Mix(share)(before, others)
    assert torch.equal(after[: photos - replaced], before[: photos - replaced])
    assert torch.equal(after[photos - replaced :], others.clean[:replaced])


def cleaned(small_model, photos, seed=0, **settings):
    condition = Clean(**{"steps": 10, **settings})
    return condition(photos, scene(seed=seed, backbone=lambda: load_backbone(str(small_model))))


def far(a, b):
    return (a.float() - b.float()).abs().mean()


def test_cleaning_changes_more_with_more_strength(small_model):
    photos = random_images(2)
    decoded = cleaned(small_model, photos, strength=0.1)  # this model's autoencoder is random: it changes most
    near, off = (far(cleaned(small_model, photos, strength=strength), decoded) for strength in (0.2, 0.9))
    assert 0 < near < off
    assert not torch.equal(decoded, photos)


def test_cleaning_draws_noise_for_each_photo(small_model):
    photos = random_images(1).expand(2, -1, -1, -1).contiguous()
    both = cleaned(small_model, photos, strength=0.5)
    assert not torch.equal(both[0], both[1])
    assert torch.equal(cleaned(small_model, photos[:1], strength=0.5)[0], both[0])
    assert torch.equal(cleaned(small_model, photos[:1], seed=1, strength=0.5)[0], both[1])


def test_cleaning_guides_and_steps_as_asked(small_model):
    photos = random_images(1)
    plain = cleaned(small_model, photos, strength=0.5)
    assert not torch.equal(plain, cleaned(small_model, photos, strength=0.5, guidance_scale=7.5))
    assert not torch.equal(plain, cleaned(small_model, photos, strength=0.5, steps=20))
