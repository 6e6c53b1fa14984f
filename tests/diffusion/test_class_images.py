"""Class images: cached by what made them, safe for several runs at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from antidreambooth.diffusion import class_images as module
from antidreambooth.diffusion.class_images import class_images
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.sampling import noise_of, sample


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def quick(small_model):
    """Samples in two steps; counts how often it is asked."""
    backbone = load_backbone(str(small_model))
    backbone.defaults = Defaults(sampling_steps=2)
    return backbone


@pytest.fixture
def sampled(monkeypatch):
    calls = []

    def counting(backbone, prompt, noise):
        calls.append(len(noise))
        return sample(backbone, prompt, noise)

    monkeypatch.setattr(module, "sample", counting)
    return calls


def test_sampled_once_then_cached(quick, sampled):
    first = class_images(quick, "a photo of person", 6, 16)
    assert first.shape == (6, 3, 16, 16)
    assert first.dtype == torch.uint8
    assert sampled == [4, 4]
    assert torch.equal(class_images(quick, "a photo of person", 6, 16), first)
    assert sampled == [4, 4]
    assert len({picture.numpy().tobytes() for picture in first}) == 6


def test_more_images_keep_the_first_ones(quick, sampled):
    few = class_images(quick, "a photo of person", 3, 16)
    many = class_images(quick, "a photo of person", 8, 16)
    assert torch.equal(many[:3], few)


def test_goes_on_after_a_kill(quick, sampled, tmp_path):
    whole = class_images(quick, "a photo of person", 8, 16)
    (lost,) = tmp_path.rglob("0005.png")
    lost.unlink()
    sampled.clear()
    assert torch.equal(class_images(quick, "a photo of person", 8, 16), whole)
    assert sampled == [4]


def test_other_weights_prompt_or_guidance_are_other_images(quick, sampled):
    first = class_images(quick, "a photo of person", 2, 16)
    other_prompt = class_images(quick, "a photo of a person", 2, 16)
    quick.defaults = Defaults(sampling_steps=2, guidance_scale=1.5)
    other_guidance = class_images(quick, "a photo of person", 2, 16)
    quick.defaults = Defaults(sampling_steps=2)
    with torch.no_grad():
        quick.unet.conv_out.bias += 0.5
    other_weights = class_images(quick, "a photo of person", 2, 16)
    assert len(sampled) == 4
    assert all(not torch.equal(first, other) for other in (other_prompt, other_guidance, other_weights))


def test_two_runs_at_once_sample_once(quick, sampled):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(class_images, quick, "a photo of person", 4, 16) for _ in range(2)]
        first, second = (run.result() for run in runs)
    assert torch.equal(first, second)
    assert sampled == [4]


def test_as_few_at_a_time_as_asked_and_never_more_than_usual(quick, sampled):
    class_images(quick, "a photo of person", 3, 16, batch=1)
    assert sampled == [1, 1, 1]
    sampled.clear()
    class_images(quick, "a photo of person", 8, 16, batch=99)
    class_images(quick, "a photo of person", 8, 16)
    assert sampled == [4, 4]


def test_low_precision_draws_other_images(quick, sampled):
    first = class_images(quick, "a photo of person", 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = class_images(quick, "a photo of person", 2, 16)
        assert torch.equal(class_images(quick, "a photo of person", 2, 16), low)
    assert len(sampled) == 2
    assert not torch.equal(first, low)


def test_a_fingerprint_that_is_known_is_not_computed_again(quick, sampled, monkeypatch):
    first = class_images(quick, "a photo of person", 2, 16)
    known = quick.fingerprint()
    monkeypatch.setattr(type(quick), "fingerprint", lambda _: pytest.fail("hashed again"))
    assert torch.equal(class_images(quick, "a photo of person", 2, 16, fingerprint=known), first)
    assert len(sampled) == 1


def test_a_pictures_noise_depends_on_its_index_only(quick):
    assert torch.equal(noise_of(quick, 16, [0, 1, 2], 0)[2], noise_of(quick, 16, [2], 0)[0])
    assert not torch.equal(noise_of(quick, 16, [0], 0), noise_of(quick, 16, [0], 1))
