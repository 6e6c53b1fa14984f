"""What is worth running on a GPU (``pytest -m gpu``); where there is none, the same on the CPU."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from antidreambooth import cloak
from antidreambooth.attack.canvas import STEP
from antidreambooth.attack.methods import METHODS
from antidreambooth.attack.objectives import LikelihoodRatio
from antidreambooth.diffusion.class_images import class_images
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.sampling import noise_of, sample
from antidreambooth.evaluation import conditions, quality
from antidreambooth.evaluation.conditions import Scene
from antidreambooth.evaluation.faces import reference
from antidreambooth.evaluation.measures import face_measures
from benchmarks.fake_faces import FakeFaces
from benchmarks.host import waits
from cli import main
from tests.conftest import random_images
from tests.devices.noise import same_noise
from tests.devices.paths import EACH, PROMPT, RATE, ROUND, VICTIMS, a_victims_step, ready
from tests.helpers import files, fit_of_a_victim, pixels

pytestmark = pytest.mark.gpu
CONDITIONS = (conditions.JPEG, conditions.Rescale, conditions.Blur, conditions.Clean, conditions.Mix)
TRAINER = ("--trainer.accelerator=auto", "--trainer.devices=1")
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")


@pytest.fixture(autouse=True)
def _usual() -> Iterator[None]:
    """No TF32, so that what a GPU computes in fp32 can be compared with a CPU."""
    rooms: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    usual = [room.fp32_precision for room in rooms]
    for room in rooms:
        room.fp32_precision = "ieee"
    yield
    for room, precision in zip(rooms, usual, strict=True):
        room.fp32_precision = precision
    torch.use_deterministic_algorithms(False)  # a trainer leaves it on


@pytest.fixture
def _deterministic() -> None:
    """As configs/trainer/deterministic.yaml has it."""
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def load(small_model, small_v_model):
    """Both small models, fresh, on a device."""
    return lambda where: [load_backbone(str(folder)).to(where) for folder in (small_model, small_v_model)]


@pytest.mark.parametrize("name", EACH)
def test_a_round_moves_the_photos_within_the_budget_and_never_waits(load, device, name):
    """On a GPU the host waits for nothing; on a CPU only reads of what is computed can be seen."""
    prepared = ready(name, load(device), device)
    outcome = prepared.round()
    assert {tensor.device for tensor in (*outcome[:-1], *outcome.memory)} == {device}
    assert outcome.vital_signs.isfinite().all()
    assert 0 < (outcome.state - prepared.canvas.blank).abs().max() <= 8 * STEP + 1e-6
    assert outcome.state.abs().max() <= 1
    if name != "offload":  # whose models come and go
        assert not waits(prepared.round, device.type)  # what the first round has made stays


@needs_gpu
@pytest.mark.parametrize("name", EACH)
def test_a_round_is_that_of_the_cpu(load, device, name):
    with same_noise():
        found, expected = (ready(name, load(where), where).round() for where in (device, CPU))
    torch.testing.assert_close(found.vital_signs.cpu(), expected.vital_signs, rtol=1e-3, atol=1e-5)
    assert ((found.state.cpu() - expected.state).abs() > 1e-5).float().mean() < 0.01


@needs_gpu
@pytest.mark.parametrize("name", VICTIMS)
def test_a_victims_step_is_that_of_the_cpu(load, device, name):
    moved = []
    with same_noise():
        for where in (device, CPU):
            backbone, _ = load(where)
            loss = a_victims_step(name, backbone, where)()
            moved.append((loss.cpu(), torch.cat([weight.detach().flatten().cpu() for weight in backbone.learned()])))
    (loss, weights), (wanted, others) = moved
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-5)
    assert (weights - others).abs().mean() < 0.1 * RATE  # Adam's first step is a sign


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("name", ["aspl", "t-aspl", "lora", "textual inversion", "checkpointing"])
def test_the_same_round_is_the_same_bytes(load, device, name):
    first, second = (ready(name, load(device), device).round() for _ in range(2))
    assert torch.equal(first.state, second.state)
    assert torch.equal(first.vital_signs, second.vital_signs)


@pytest.mark.parametrize("name", VICTIMS)
def test_a_victim_learns_where_it_is(load, device, name):
    backbone, _ = load(device)
    assert a_victims_step(name, backbone, device)().isfinite()
    assert {tensor.device for tensor in (*backbone.parameters(), *backbone.buffers())} == {device}
    assert torch.cat([weight.flatten() for weight in backbone.learned()]).isfinite().all()


def test_a_round_under_autocast_is_near_the_one_in_fp32(load, device):
    with same_noise():
        exact = ready("aspl", load(device), device).round()
        with torch.autocast(device.type, torch.bfloat16):
            low = ready("aspl", load(device), device).round()
    assert {value.dtype for value in low[:-1]} == {torch.float32}
    torch.testing.assert_close(torch.stack(low.losses), torch.stack(exact.losses), rtol=5e-2, atol=1e-2)
    assert not torch.equal(low.state, exact.state)


def test_pictures_are_drawn_and_measured(load, device):
    backbone, _ = load(device)
    pictures = sample(backbone, PROMPT, noise_of(backbone, 32, range(3), seed=0), guidance_scale=2.0, steps=3)
    assert pictures.device == device
    model = FakeFaces()
    known = reference(model, [("a", picture) for picture in random_images(2)])
    measures = face_measures(model, known, stability=True).to(device)
    columns = measures.forward_images(pictures)
    expected = face_measures(model, known, stability=True).forward_images(pictures.cpu())
    for name, column in columns.items():
        assert (column.device, column.dtype) == (device, torch.float32)
        torch.testing.assert_close(column.cpu(), expected[name])
    assert torch.stack([*measures.compute().values()]).isfinite().all()


def test_cloaks_are_measured_where_they_are(device):
    pair = random_images(2, 32), random_images(2, 32, seed=1)
    for kind in (quality.PSNR, quality.SSIM, quality.LargestDifference):
        found, expected = kind().to(device), kind()
        found.update(*(pictures.to(device) for pictures in pair))
        expected.update(*pair)
        torch.testing.assert_close(found.compute().cpu(), expected.compute())


def test_class_images_are_the_cpus(load, device, tmp_path, monkeypatch):
    """To two levels: what differs is how sums are rounded."""
    found = []
    for where in (device, CPU):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / where.type))
        backbone, _ = load(where)
        found.append(class_images(backbone, PROMPT, 3, 16, batch=2))
    assert (found[0].int() - found[1].int()).abs().max() <= 2
    assert len({picture.numpy().tobytes() for picture in found[0]}) == 3


@pytest.mark.parametrize(
    "kind", [conditions.JPEG, conditions.Rescale, conditions.Blur, conditions.Clean, conditions.Mix]
)
def test_photos_go_through_a_condition(small_model, kind):
    photos = random_images(2)
    after = kind()(photos, Scene(lambda: load_backbone(str(small_model)), random_images(1, seed=1)))
    assert (after.shape, after.dtype, after.device) == (photos.shape, torch.uint8, CPU)
    assert not torch.equal(after, photos)


@pytest.mark.parametrize("method", METHODS)
def test_a_notebook_cloaks(small_model, small_v_model, device, method):
    unchecked: Any = inspect.unwrap(cloak)
    given = random_images(3).permute(0, 2, 3, 1).numpy()
    ratio = LikelihoodRatio(str(small_v_model)) if method in ("decoy", "ours") else None
    settings = replace(ROUND, objective=ratio)
    options = {"ensemble": [small_v_model] if METHODS[method].several else [], "settings": settings, "rounds": 2}
    cloaked = np.stack(unchecked(given, small_model, method, device=device, **options))
    change = np.abs(cloaked.astype(np.int32) - given).max(axis=(1, 2, 3))
    assert ((change > 0) & (change <= 8)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "precision"),
    [("aspl", "32-true"), ("aspl", "bf16-mixed"), ("t-fsmg", "bf16-mixed"), ("e-aspl", "bf16-mixed")],
)
def test_a_run_resumes_to_the_same_photos(command, tmp_path, device, config, precision):
    where = [*TRAINER, f"--trainer.precision={precision}", "--trainer.deterministic=true"]
    main(command(*where, config=config, out="whole"))
    main(command(*where, config=config, out="cut", rounds=1))
    main(command(*where, "--ckpt_path=last", config=config, out="cut"))
    whole, cut = (files(tmp_path / out) for out in ("whole", "cut"))
    assert {name for name in whole if whole[name] != cut[name]} <= {"manifest.json"}
    assert len(whole) > 3


CHANGED = ["--model.augmentation.crop=0.7", "--model.augmentation.flip=true", "--model.augmentation.jpeg=70"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "more"), [("dreambooth", []), ("dreambooth-lora", CHANGED), ("textual-inversion", [])]
)
def test_a_victim_is_trained_and_tested(small_model, photos, tmp_path, config, more):
    where = [*TRAINER, "--trainer.precision=bf16-mixed", *more]
    words = fit_of_a_victim(small_model, photos, tmp_path / "out", *where, config=config)
    main(words)
    main(
        [
            "test",
            *[word for word in words[1:] if not word.startswith(("--checkpoint", "--data"))],
            f"--data.reference_photos={photos}",
            "--model.faces=benchmarks.fake_faces.FakeFaces",
            "--model.generation.images=2",
            "--model.generation.sampling_steps=2",
        ]
    )
    assert pixels(tmp_path / "out" / "images" / "0-000.png").std() > 0
