"""Nothing in the engine depends on torch's default device or dtype: under hostile ones, the same to the bit."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from antidreambooth.attack.perturbation import random_noise
from antidreambooth.attack.targets import PATTERNS, target_image
from antidreambooth.diffusion.class_images import class_images
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.sampling import noise_of, sample
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.evaluation import brisque, conditions, quality
from antidreambooth.evaluation.conditions import Clean, Scene
from antidreambooth.evaluation.faces import reference
from antidreambooth.evaluation.measures import face_measures
from antidreambooth.finetuning.augmentation import Augmentation
from antidreambooth.photos.decoding import to_float
from antidreambooth.photos.delivery import to_8bit
from benchmarks.fake_faces import FakeFaces
from tests.conftest import hostile, random_images
from tests.devices.paths import OF_EACH_KIND, PROMPT, VICTIMS, a_victims_step, ready

CPU = torch.device("cpu")


def measured(pictures):
    known = reference(FakeFaces(), [(str(number), picture) for number, picture in enumerate(pictures[:2])])
    found = face_measures(FakeFaces(), known, stability=True)
    return [found.forward_images(pictures), found.compute()]


def compared(pictures):
    measures = [kind() for kind in (quality.PSNR, quality.SSIM, quality.LargestDifference)]
    for measure in measures:
        measure.update(pictures[:2], pictures[1:])
    return [measure.compute() for measure in measures], quality.cloak_quality(*pictures[:2])


def after(kind, pictures):
    return kind()(pictures, Scene(pytest.fail, pictures))


PARTS = {
    "photos": lambda pictures: to_8bit(to_float(pictures) * 0.9, pictures, 8.0),
    "random noise": lambda pictures: random_noise(pictures, 8.0, 0),
    "targets": lambda pictures: [target_image(name, 16) for name in PATTERNS],
    "augmentation": lambda pictures: Augmentation(0.5, True, 70)(pictures, Turn(0).generator(CPU)),
    "measures": measured,
    "quality": compared,
    "brisque": brisque.features,
    "batches": lambda pictures: Turn(3).batches(2, 2, 5, CPU),
    **{
        kind.__name__: partial(after, kind)
        for kind in (conditions.JPEG, conditions.Rescale, conditions.Blur, conditions.Mix)
    },
}


def assert_same(found, expected):
    """Trees of tensors and numbers, to the bit, all on the CPU."""
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    assert pairs
    for one, other in pairs:
        if isinstance(one, Tensor):
            assert (one.device, one.dtype) == (CPU, other.dtype)
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_a_part(part):
    pictures = random_images(3, 32)
    expected = part(pictures)
    with hostile():
        found = part(pictures)
    assert_same(found, expected)


@pytest.fixture
def load(small_model, small_v_model):
    """Both small models, fresh."""
    return lambda: [load_backbone(str(folder)) for folder in (small_model, small_v_model)]


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_round(load, name):
    expected = ready(name, load(), CPU).round()
    with hostile():
        found = ready(name, load(), CPU).round()
    assert_same(found, expected)


@pytest.mark.parametrize("name", VICTIMS)
def test_a_victims_step(load, name):
    (usual, _), (other, _) = load(), load()
    expected = a_victims_step(name, usual, CPU)()
    with hostile():
        found = a_victims_step(name, other, CPU)()
    assert_same([found, usual.learned()], [expected, other.learned()])


def drawn(load):
    backbone, _ = load()
    return sample(backbone, PROMPT, noise_of(backbone, 16, range(2), seed=0), guidance_scale=2.0, steps=2)


def cleaned(load):
    return Clean(strength=0.5, steps=4)(random_images(2), Scene(lambda: load()[0], random_images(1)))


def of_the_class(load):
    backbone, _ = load()
    backbone.defaults = Defaults(sampling_steps=2)
    return class_images(backbone, PROMPT, 3, 16, batch=2)


@pytest.mark.parametrize("pictures", [drawn, cleaned, of_the_class])
def test_pictures(load, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "usual_device", lambda: CPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "usual"))
    expected = pictures(load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "hostile"))
    with hostile():
        found = pictures(load)
    assert_same(found, expected)
