"""Projection, pixel gradient, PGD."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from antidreambooth.attack.canvas import STEP, SquareCanvas, project
from antidreambooth.attack.cost import counted
from antidreambooth.attack.objectives import ACE, Denoising, EncoderTarget, Targeted, Term, Transformed, Weighted
from antidreambooth.attack.perturbation import PGD, pixel_gradient
from antidreambooth.attack.surrogates import Fixed
from antidreambooth.attack.transforms import Crop, Flip
from antidreambooth.diffusion.backbone import Posterior
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import to_float
from antidreambooth.photos.delivery import to_8bit
from tests.conftest import random_images


@given(seed=st.integers(0, 2**31), budget=st.floats(0, 300), spread=st.floats(0.001, 3))
@settings(max_examples=60)
def test_projection_is_feasible_idempotent_and_nearest(seed, budget, spread):
    originals = to_float(random_images(2, 4, seed))
    images = originals + spread * torch.randn(originals.shape, generator=torch.Generator().manual_seed(seed))
    radius = budget * STEP
    projected = project(images, originals, radius)
    assert projected.abs().max() <= 1
    assert (projected - originals).abs().max() <= radius + 1e-6
    assert torch.equal(project(projected, originals, radius), projected)
    inside = ((images - originals).abs() <= radius) & (images.abs() <= 1)
    assert torch.equal(projected[inside], images[inside])
    assert ((projected - images).abs() <= (originals - images).abs() + 1e-6).all()


@example(seed=0, budget=1.999999999999993)  # 2 in 32 bits
@given(seed=st.integers(0, 2**31), budget=st.floats(1, 64))
@settings(max_examples=40)
def test_budget_survives_projection_and_rounding(seed, budget):
    originals = random_images(2, 4, seed)
    images = to_float(originals)
    moved = project(images + torch.randn(images.shape).sign(), images, budget * STEP)
    written = to_8bit(moved, originals, budget)
    assert (written.int() - originals.int()).abs().max() <= int(budget)


def gradient(backbone, images, micro_batch):
    objective = Denoising()
    draw = objective.draw(backbone, images, Turn(0).generator(images.device))
    embedding = backbone.embed(["a photo of sks person"])
    return pixel_gradient(objective, backbone, images, embedding, [draw], micro_batch)


OBJECTIVES = {
    "denoising": Denoising(),
    "targeted": Targeted("rings"),
    "transformed": Transformed([Flip(), Crop(0.5)], Targeted()),
    "sum": Weighted([Term(Denoising(), 0.5), Term(EncoderTarget()), Term(ACE(), 2.0)]),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_pixel_gradient_is_that_of_a_finite_difference(any_backbone, objective):
    any_backbone.double()
    images = to_float(random_images(2)).double()
    draw = objective.draw(any_backbone, images, Turn(0).generator(images.device))
    embedding = any_backbone.embed([PROMPT])
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(x):
        with torch.no_grad():
            return objective(any_backbone, objective.encode(any_backbone, x, draw), embedding, draw).mean()

    h = 1e-6
    expected = (value(images + h * direction) - value(images - h * direction)) / (2 * h)
    actual, same, latents = pixel_gradient(objective, any_backbone, images, embedding, [draw], 2)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(same, value(images))
    with torch.no_grad():
        seen = objective.encode(any_backbone, images, draw).mean
    torch.testing.assert_close(latents, seen.square().mean().sqrt())
    torch.testing.assert_close((actual * direction).sum(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 8])
def test_micro_batches_do_not_change_the_gradient(any_backbone, objective, micro_batch):
    images = to_float(random_images(5))
    draw = objective.draw(any_backbone, images, Turn(0).generator(images.device))
    embedding = any_backbone.embed([PROMPT])
    expected = pixel_gradient(objective, any_backbone, images, embedding, [draw], 5)
    actual = pixel_gradient(objective, any_backbone, images, embedding, [draw], micro_batch)
    torch.testing.assert_close(actual.gradient, expected.gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_several_draws_give_the_mean_of_their_gradients_for_one_pass_through_the_encoder(any_backbone, objective):
    any_backbone.double()
    images, generator = to_float(random_images(3)).double(), Turn(0).generator(torch.device("cpu"))
    first, *others = (objective.draw(any_backbone, images, generator) for _ in range(3))
    draws = [first, *(replace(draw, transforms=first.transforms) for draw in others)]
    embedding = any_backbone.embed([PROMPT])
    each = [pixel_gradient(objective, any_backbone, images, embedding, [draw], 2) for draw in draws]
    gradients, values, _ = (torch.stack(parts) for parts in zip(*each, strict=True))
    assert not torch.allclose(gradients[0], gradients[1])

    back: list[int] = []

    def passed(module, inputs, output):
        output.register_hook(lambda gradient: back.append(len(gradient)))

    with any_backbone.vae.encoder.conv_in.register_forward_hook(passed), counted([any_backbone]) as passes:
        gradient, value, _ = pixel_gradient(objective, any_backbone, images, embedding, draws, 2)
    torch.testing.assert_close(gradient, gradients.mean(dim=0), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(value, values.mean())
    terms = max(1, sum(not one.encoder_only for one in objective.inner))
    assert (passes.encoder, passes.denoiser, back) == (3, 9 * terms, [2, 1])


def test_a_step_goes_along_the_mean_of_draws_that_differ(backbone):
    """The step rule gets the gradient of as many draws from the round's generator, one after the other."""
    originals, seen = to_float(random_images(2)) * 0.5, []

    def kept(gradient):
        seen.append(gradient)
        return gradient

    attack = PGD(steps=2, draws=3, reduce=kept)
    attack(Fixed(backbone, PROMPT), SquareCanvas(originals), originals, Turn(0), torch.Generator().manual_seed(0))
    generator, objective = torch.Generator().manual_seed(0), Denoising()
    draws = [objective.draw(backbone, originals, generator) for _ in range(3)]
    embedding = backbone.embed([PROMPT])
    each = [pixel_gradient(objective, backbone, originals, embedding, [draw], 4)[0] for draw in draws]
    assert len(seen) == 2  # once a step, so that ranks send no more messages
    torch.testing.assert_close(seen[0], torch.stack(each).mean(dim=0), rtol=1e-4, atol=1e-8)
    assert not torch.allclose(each[0], each[1])


PROMPT = "a photo of sks person"


def test_latents_without_a_spread_are_attacked(backbone, monkeypatch):
    """As Sana's are: no gradient goes through the spread, and nothing of it to the pixels."""
    usual = backbone.to_latents
    images = to_float(random_images(3))
    whole = gradient_through(backbone, images)

    def sharp(pixels):
        mean, std = usual(pixels)
        return Posterior(mean, std.detach())

    monkeypatch.setattr(backbone, "to_latents", sharp)
    found = gradient_through(backbone, images)
    assert found.isfinite().all()
    assert found.abs().max() > 0
    assert not torch.equal(found, whole)


def gradient_through(backbone, images):
    """Of the loss, with the same draw each time."""
    draw = Denoising().draw(backbone, images, Turn(0).generator(images.device))
    return pixel_gradient(Denoising(), backbone, images, backbone.embed(["a photo"]), [draw], 2)[0]


def test_attack_raises_the_objective_and_leaves_the_model_alone(backbone):
    backbone.requires_grad_(True)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    originals = to_float(random_images(3))
    generator = Turn(0).generator(originals.device)
    cloaked = PGD(budget=8.0, steps=20)(
        Fixed(backbone, PROMPT), SquareCanvas(originals), originals, Turn(0), generator
    ).state
    before_it, after_it = gradient(backbone, originals, 3), gradient(backbone, cloaked, 3)
    assert after_it.objective > before_it.objective
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in backbone.parameters())
    assert 0 < (cloaked - originals).abs().max() <= 8 * STEP + 1e-6


def test_step_size_defaults_to_a_tenth_of_the_budget(backbone):
    originals = to_float(random_images(1)) * 0.5
    surrogate, attack = Fixed(backbone, PROMPT), PGD(budget=10.0, steps=1)
    cloaked = attack(surrogate, SquareCanvas(originals), originals, Turn(0), torch.Generator()).state
    torch.testing.assert_close((cloaked - originals).abs().max(), torch.tensor(STEP), rtol=1e-4, atol=0)


def test_the_gradient_is_averaged_over_processes(backbone):
    seen = []

    def turned(gradient):
        seen.append(gradient)
        return -gradient

    attack = PGD(steps=1, reduce=turned)
    originals = to_float(random_images(1)) * 0.5
    down, up = (
        one(
            Fixed(backbone, PROMPT), SquareCanvas(originals), originals, Turn(0), torch.Generator().manual_seed(0)
        ).state
        for one in (attack, PGD(steps=1))
    )
    (gradient,) = seen
    torch.testing.assert_close(up, originals + 0.8 * STEP * gradient.sign())
    torch.testing.assert_close(down, originals - 0.8 * STEP * gradient.sign())  # what `reduce` gives back is climbed


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"budget": 0.5}, "0.5"),
        ({"budget": 300.0}, "300"),
        ({"step_size": 0.0}, "0.0"),
        ({"micro_batch": 0}, "micro"),
        ({"draws": 0}, "draws"),
    ],
)
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        PGD(**settings)
