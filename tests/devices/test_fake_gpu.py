"""Every way through the engine, forward, on a GPU that is none: what mixes devices fails, what copies is counted."""

import inspect
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from antidreambooth import cloak
from antidreambooth.attack.methods import METHODS, Assembly
from antidreambooth.diffusion import class_images as class_images_module
from antidreambooth.diffusion.class_images import class_images
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.sampling import noise_of, sample
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.evaluation import brisque, conditions, quality
from antidreambooth.evaluation.conditions import Clean, Scene
from antidreambooth.evaluation.faces import Face, reference
from antidreambooth.evaluation.measures import face_measures
from antidreambooth.finetuning.augmentation import Augmentation
from lightning_modules.victim import Victim
from tests.conftest import random_images
from tests.devices.fake import CUDA, empty_on, fake_gpu, lend
from tests.devices.paths import PROMPT, ROUND, ROUNDS, VICTIMS, a_victims_step, ready
from tests.lightning_modules.fake_faces import FakeFaces

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA")
CPU = torch.device("cpu")
# Copies between host and device in the first round: each prompt's tokens, once for each base model.
COPIES = {
    "aspl": 2,  # the person's prompt and the class's
    "t-aspl": 2,
    "e-aspl": 4,
    "fsmg": 1,
    "t-fsmg": 1,
    "e-fsmg": 2,
    "advdm": 1,
    **{"simac": 2, "caat": 2, "metacloak": 3},  # one for the weights of the pool's member
    **{"mist": 1, "ace": 1, "sds": 1, "photoguard": 0, "pid": 0, "decoy": 1, "ours": 1},
    "momentum": 1,
    "l2": 1,
    "random start": 2,
    "transformed": 2,
    "transformed target": 1,
    "stripes": 1,
    "lora": 2,
    "textual inversion": 2,
    "checkpointing": 2,
    "offload": 6,  # with the norm of each model's weights; the models themselves are counted apart
    "own size": 2,
    "own size of several": 4,
    "own size, momentum": 1,
    "own size, sum": 1,
    "no prior": 1,
}


@pytest.fixture
def models(small_model, small_v_model):
    """Both small models, to be put on the device that is none."""
    return [load_backbone(str(folder)) for folder in (small_model, small_v_model)]


@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_stays_on_the_device(models, name):
    with fake_gpu() as traffic:
        prepared = ready(name, [empty_on(model, CUDA) for model in models], CUDA, lend)
        traffic.copies.clear()
        outcome = prepared.round()
        for place in [place for place in traffic.copies if "attack/pool.py" in place]:
            assert name == "metacloak"  # whose pool rests in main memory
            traffic.copies.pop(place)
        for place in [place for place in traffic.copies if "(_present)" in place]:
            tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
            assert traffic.copies.pop(place) == 2 * len(tensors)  # one way; each model comes and goes twice
    assert {(tensor.device, tensor.dtype) for tensor in outcome[:-1]} == {(CUDA, torch.float32)}
    assert {tensor.device for tensor in outcome.memory} == {CUDA}
    assert traffic.copies.total() == COPIES[name], traffic.copies
    assert not traffic.bytes_at


def test_a_second_round_copies_nothing(models):
    with fake_gpu() as traffic:
        prepared = ready("aspl", [empty_on(model, CUDA) for model in models], CUDA, lend)
        prepared.round()
        traffic.copies.clear()
        prepared.round()
    assert not traffic.copies


@pytest.mark.parametrize("name", VICTIMS)
def test_a_victims_step_stays_on_the_device(models, name):
    backbone, _ = models
    with fake_gpu() as traffic:
        step = a_victims_step(name, empty_on(backbone, CUDA), CUDA, lend)
        traffic.copies.clear()
        assert step().device == CUDA
        assert traffic.copies.total() == 2, traffic.copies  # two prompts
        step()
        assert traffic.copies.total() == 2, traffic.copies
    assert {tensor.device for tensor in (*backbone.parameters(), *backbone.buffers())} == {CUDA}
    assert not traffic.bytes_at


def test_pictures_are_drawn_on_the_device(models):
    backbone, _ = models
    with fake_gpu() as traffic:
        pictures = sample(empty_on(backbone, CUDA), PROMPT, noise_of(backbone, 16, range(2), seed=0), steps=2)
    assert (pictures.device, pictures.dtype) == (CUDA, torch.uint8)
    ours = {place: count for place, count in traffic.copies.items() if "(draw)" not in place}  # diffusers'
    assert sum(ours.values()) == 5, ours  # the noise, the words of two prompts, and whether all is finite: twice
    assert {place.partition(" ")[2] for place in traffic.bytes_at} == {"(eight_bits)"}


def test_class_images_come_to_the_cpu(models, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written = []

    def write(path, picture):
        written.append(picture.device)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path)

    monkeypatch.setattr(class_images_module, "write_png", write)
    monkeypatch.setattr(class_images_module, "blank", lambda pictures: np.zeros(len(pictures), bool))
    backbone, _ = models
    backbone.defaults = Defaults(sampling_steps=2)
    with fake_gpu():
        pictures = class_images(empty_on(backbone, CUDA), PROMPT, 3, 16, batch=2, fingerprint="none")
    assert written == [CPU] * 3
    assert pictures.device == CPU


class Everywhere(FakeFaces):
    """Finds a face in every picture, and says where it looked."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def faces(self, image):
        self.seen.append(image.device)
        side = float(image.shape[-1])
        return [Face((0.0, 0.0, side, side), torch.zeros(5, 2))]


def test_faces_are_looked_for_on_the_cpu_and_measured_on_the_device():
    model = Everywhere()
    with fake_gpu():
        pictures = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=CUDA)
        known = reference(model, [("a", pictures[0])])
        columns = face_measures(model, known).to(CUDA).forward_images(pictures)
    assert model.seen == [CPU] * 3
    assert {(column.device, column.dtype) for column in columns.values()} == {(CUDA, torch.float32)}


def test_photos_are_augmented_where_they_are():
    with fake_gpu():
        pictures = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=CUDA)
        changed = Augmentation(crop=0.5, flip=True)(pictures, Turn(0).generator(CUDA))
    assert (changed.device, changed.dtype) == (CUDA, torch.uint8)


def test_photos_of_a_victim_are_numbers_before_anything_is_computed(models, small_model):
    victim = Victim(backbone=str(small_model))
    with fake_gpu() as traffic:
        victim.backbone = empty_on(models[0], CUDA)
        pictures = torch.zeros(3, 3, 16, 16, dtype=torch.uint8, device=CUDA)
        traffic.bytes_at.clear()
        (chosen,) = Turn(0).batches(1, 2, 3, CUDA)
        assert victim._instances(pictures, chosen, Turn(0).generator(CUDA)).mean.device == CUDA
    assert {place.partition(" ")[2] for place in traffic.bytes_at} == {"(to_float)"}


@pytest.mark.parametrize("kind", [quality.PSNR, quality.SSIM, quality.LargestDifference])
def test_cloaks_are_measured_on_the_device(kind):
    with fake_gpu():
        measure = kind().to(CUDA)
        measure.update(*torch.zeros(2, 2, 3, 32, 32, dtype=torch.uint8, device=CUDA))
        assert measure.compute().device == CUDA


def test_brisque_is_computed_on_the_device():
    with fake_gpu():
        assert brisque.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=CUDA)).device == CUDA


def test_photos_are_cleaned_on_the_device_and_come_back(models, monkeypatch):
    monkeypatch.setattr(conditions, "usual_device", lambda: CUDA)
    backbone, seen = models[0], []
    backbone.unet.register_forward_hook(lambda _, given, __: seen.append(given[0].device))
    with fake_gpu():
        photos = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        after = Clean(strength=0.5, steps=4)(photos, Scene(lambda: empty_on(backbone, CPU), photos))
        assert (after.device, after.dtype) == (CPU, torch.uint8)
    assert set(seen) == {CUDA}
    assert {weight.device for weight in backbone.parameters()} == {CPU}


@pytest.mark.parametrize("name", ["lora", "advdm", "no prior"])
def test_text_encoders_rest_while_a_round_runs(models, name):
    method, settings = ROUNDS[name]
    still = replace(settings, training=replace(settings.training, train_text_encoder=False))
    asked = Assembly(METHODS[method], still).asks(models[0])
    assert asked is not None
    with fake_gpu() as traffic, patch.dict(ROUNDS, {name: (method, still)}):
        backbone = empty_on(models[0], CUDA)
        backbone.rest_text_encoders(CUDA, asked)
        encoder = backbone.text_encoder
        assert {weight.device for weight in encoder.parameters()} == {CPU}
        assert {tensor.device for tensor in (*backbone.parameters(), *backbone.buffers())} == {CUDA}  # as DDP wants it
        prepared = ready(name, [backbone], CUDA, lend)
        traffic.copies.clear()
        prepared.round()
        assert traffic.copies.total() == 0, traffic.copies
        assert sample(backbone, "another one", torch.zeros(1, 4, 8, 8, device=CUDA), 2.0, 2).device == CUDA
        assert {weight.device for weight in encoder.parameters()} == {CPU}
        backbone.to(CUDA)
        assert {weight.device for weight in encoder.parameters()} == {CPU}


class Delivered(Exception):  # noqa: N818 (no error)
    """The photos are ready to be written."""


@pytest.mark.parametrize("method", ["aspl", "e-fsmg"])
def test_a_notebook_cloaks_on_the_device_and_gets_pixels_on_the_cpu(models, small_model, small_v_model, method):
    """Up to where tensors become pictures; the rounds are those of the test above."""

    def to_8bit(images, originals, budget):
        assert images.device == originals.device == CPU
        assert images.dtype == torch.float32
        raise Delivered

    left, several = list(models), METHODS[method].several
    options = {"ensemble": [small_v_model] if several else [], "settings": ROUND, "rounds": 1}
    given = random_images(2).permute(0, 2, 3, 1).numpy()
    with (
        patch("antidreambooth.api.device_named", lambda _: CUDA),
        patch("antidreambooth.api.shared_resolution", lambda *_: 16),  # looks at values of the noise schedule
        patch("antidreambooth.api.load_backbone", lambda *_: empty_on(left.pop(0), CPU)),
        patch("antidreambooth.api.plain_weights", lend),
        patch("antidreambooth.api.class_images", lambda *_, **__: random_images(3, seed=2)),
        patch("antidreambooth.attack.parametrisation.to_8bit", to_8bit),
        fake_gpu() as traffic,
        pytest.raises(Delivered),
    ):
        inspect.unwrap(cloak)(given, small_model, method, **options)
    assert not traffic.bytes_at
