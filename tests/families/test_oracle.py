"""Every family of base models against what the official code of diffusers computes, on tiny models made anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from antidreambooth.diffusion.backbone import Backbone, Conditioning
from antidreambooth.diffusion.defaults import FILE
from antidreambooth.diffusion.families import FAMILIES
from antidreambooth.diffusion.layout import read_defaults, resolution_of
from antidreambooth.diffusion.loading import load_backbone
from tests.families import oracle as official
from tests.families.conftest import Case, same
from tests.families.oracle import PROMPTS, STEPS, Drawing, Step
from tests.families.tiny import SIDE, TINY, build, save

GUIDANCE = 3.0  # what the oracle's guided pictures are drawn with


@pytest.fixture(scope="module")
def shared(case) -> Backbone:
    """For tests that change nothing of it."""
    return loaded(case)


@pytest.fixture(scope="module")
def told(shared) -> Conditioning:
    with torch.no_grad():
        return shared.embed(list(PROMPTS))


@pytest.fixture(params=range(STEPS))
def step(request, case) -> Step:
    """One of those of the official pipeline, without guidance."""
    return case.oracle.drawing.steps[request.param]


def loaded(case: Case) -> Backbone:
    return load_backbone(str(case.folder))


def same_parts(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tensors, or lists of them, by name; a mask may be of numbers or of truth values."""
    for key, value in expected.items():
        pairs = [(actual[key], value)] if isinstance(value, Tensor) else list(zip(actual[key], value, strict=True))
        for ours, theirs in pairs:
            same(ours.float(), theirs.float())


def test_every_family_has_a_tiny_model():
    assert {type(build(name)).__name__ for name in TINY} == set(FAMILIES)


def test_a_tiny_model_says_its_resolution(case):
    assert (case.folder / FILE).is_file()
    assert resolution_of(str(case.folder)) == SIDE
    assert read_defaults(str(case.folder)).sampling_steps == STEPS


@torch.no_grad()
def test_encode(case, shared):
    posterior = shared.encode(case.oracle.images)
    same(posterior.sample(case.oracle.posterior_noise), case.oracle.latents)
    assert shared.latent_shape(*official.SIZE) == case.oracle.latents.shape[1:]


@torch.no_grad()
def test_embed(case, shared, told):
    same_parts(shared.given(told), case.oracle.told)
    same_parts(shared.given(shared.negative(len(PROMPTS)), "negative_"), case.oracle.against)


def test_the_noise_law(case, shared):
    oracle, noising = case.oracle, shared.noising
    same(noising.times[oracle.rows].double(), oracle.times.double())
    same(noising.add_noise(oracle.clean, oracle.rows, oracle.noise), oracle.noisy)
    same(noising.target(oracle.clean, oracle.rows, oracle.noise), oracle.target)
    same(noising.step_back(oracle.noisy, oracle.rows, oracle.guess), oracle.back, atol=1e-4)
    clean = noising.clean(oracle.noisy, oracle.rows, oracle.target)
    signal = noising.signal[oracle.rows].view(-1, 1, 1, 1)  # at the noisy end little is left of the latents to find
    same(clean * signal, oracle.clean * signal)


@torch.no_grad()
def test_the_denoiser_is_told_what_the_pipeline_tells_it(shared, told, step):
    with official.heard_inputs(shared.denoiser) as calls:
        shared.denoise(step.noisy, step.time.expand(len(step.noisy)), told)
    (inputs,) = calls
    assert inputs.keys() == step.inputs.keys()
    for name, expected in step.inputs.items():
        ours, theirs = torch.broadcast_tensors(inputs[name], expected)  # one time for all, or the same for each
        assert torch.equal(ours.double(), theirs.double()), name


@torch.no_grad()
def test_prediction_has_the_schedulers_sign(shared, told, step):
    same(shared.denoise(step.noisy, step.time.expand(len(step.noisy)), told), step.prediction)


@torch.no_grad()
def test_predict_tells_the_times_of_rows(case, shared, told):
    rows = torch.tensor([250, 800])
    expected = shared.denoise(case.oracle.start, shared.noising.times[rows], told)
    same(shared.predict(case.oracle.start, rows, told), expected)
    assert not torch.allclose(shared.predict(case.oracle.start, rows.flip(0), told), expected, atol=1e-4)


@torch.no_grad()
def test_denoising_loss(case, shared, told):
    """SD3's example has the network's output made latents before the loss is computed, all others compare targets."""
    oracle, rows = case.oracle, torch.tensor([3, 4])  # of the oracle's
    t, clean, noise = oracle.rows[rows], oracle.clean[rows], oracle.noise[rows]
    predicted = shared.predict(oracle.noisy[rows], t, told)
    if case.name == "sd3":
        sigma = oracle.times[rows].view(-1, 1, 1, 1) / 1000
        expected = (oracle.noisy[rows] - sigma * predicted - clean).square().mean(dim=(1, 2, 3))
    else:
        expected = (predicted - oracle.target[rows]).square().mean(dim=(1, 2, 3))
    same(shared.denoising_loss(clean, t, noise, told), expected)


@torch.no_grad()
def test_decode(case, shared):
    same(shared.decode(case.oracle.drawing.latents) / 2 + 0.5, case.oracle.drawing.pictures)


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_draw(case, shared, told, guided):
    expected: Drawing = case.oracle.guided if guided else case.oracle.drawing
    scale = GUIDANCE if guided else shared.guidance[1]
    against = shared.negative(len(PROMPTS)) if shared.guides(scale) else None
    same(shared.draw(case.oracle.start, told, against, STEPS, scale), expected.latents, atol=1e-4)


@torch.no_grad()
def test_prompts_of_two_lengths_in_a_batch_equal_each_alone(case, shared, told):
    start, rows = case.oracle.start, torch.tensor([250, 800])
    together = shared.predict(start, rows, told)
    for i, prompt in enumerate(PROMPTS):
        alone = shared.predict(start[i : i + 1], rows[i : i + 1], shared.embed([prompt]))
        same(alone, together[i : i + 1])
    swapped = shared.predict(start, rows, shared.embed([*reversed(PROMPTS)]))
    assert not torch.allclose(swapped, together, atol=1e-6)


@torch.no_grad()
def test_a_prompt_for_several_images_is_the_same_as_several_prompts(case, shared, told):
    start, rows = case.oracle.start.repeat(2, 1, 1, 1), torch.tensor([250, 800, 250, 800])
    twice = shared.predict(start, rows, told.repeated(2))
    same(twice, shared.predict(start, rows, shared.embed([prompt for prompt in PROMPTS for _ in range(2)])))
    spread = shared.predict(start, rows, shared.embed([PROMPTS[0]]).expanded(4))
    same(spread[:2], twice[:2])


@pytest.fixture(scope="module")
def precise(shared) -> Backbone:
    """In double precision, so that a small difference of losses means something."""
    return copy.deepcopy(shared).double()


def gradient(backbone: Backbone, case: Case, told: Conditioning) -> Tensor:
    """Of the denoising loss to the pixels, through encode and predict."""
    pixels = case.oracle.images.to(backbone.vae.dtype).requires_grad_(True)
    return torch.autograd.grad(loss(backbone, case, told, pixels), pixels)[0]


def loss(backbone: Backbone, case: Case, told: Conditioning, pixels: Tensor) -> Tensor:
    latents = backbone.encode(pixels).sample(case.oracle.posterior_noise.to(pixels))
    noise = case.oracle.start.to(pixels)
    return backbone.denoising_loss(latents, torch.tensor([250, 800]), noise, told).sum()


def test_gradient_to_the_pixels_equals_a_finite_difference(case, precise):
    with torch.no_grad():
        told = precise.embed(list(PROMPTS))
    found = gradient(precise, case, told)
    assert (found.abs().amax((1, 2, 3)) > 0).all()
    way, images = found / found.norm(), case.oracle.images.double()
    with torch.no_grad():
        up, down = (loss(precise, case, told, images + h * way) for h in (1e-4, -1e-4))
    torch.testing.assert_close((up - down) / 2e-4, (found * way).sum(), rtol=1e-3, atol=0)


def test_checkpointing_computes_again_and_changes_no_gradient(case, shared, told):
    backbone = loaded(case)
    with counted(backbone.denoiser) as denoised, counted(backbone.vae) as encoded:
        expected = gradient(backbone, case, told)
        once = len(denoised), len(encoded)
        backbone.checkpoint(True)
        same(gradient(backbone, case, told), expected, atol=1e-6)
    assert len(denoised) > 2 * once[0]
    assert len(encoded) > 2 * once[1]


@contextmanager
def counted(network: Any) -> Iterator[list[str]]:
    """The name of a layer each time that one computes something inside."""
    calls: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, layer in network.named_modules()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def test_fingerprint_tells_models_apart(case, shared, tmp_path):
    assert loaded(case).fingerprint() == shared.fingerprint()
    other = save(case.name, tmp_path / "other", seed=1)
    assert load_backbone(str(other)).fingerprint() != shared.fingerprint()
