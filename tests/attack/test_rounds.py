"""The round against a plain reference with deep copies, and the seed rule."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import AdamW

from antidreambooth.attack.canvas import STEP, SquareCanvas
from antidreambooth.attack.objectives import Denoising
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import alternate, require_vital
from antidreambooth.attack.surrogates import Alternating
from antidreambooth.diffusion.backbone import Checkpointing, Posterior
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.weights import Weights
from antidreambooth.photos.decoding import to_float
from tests.conftest import random_images

TRAINING = DreamBooth(learning_rate=1e-3, batch_size=2, prior=PriorPreservation(weight=0.5)).completed(Defaults())
ROUNDS = 3


def setup(backbone, training=TRAINING):
    Full().apply(backbone, training, seed=0)
    parameters = backbone.learned()
    rate, decay = training.learning_rate, training.weight_decay
    weights = Weights(parameters, AdamW(parameters, lr=rate, weight_decay=decay, fused=True))
    originals, clean = to_float(random_images(4)), to_float(random_images(3, seed=1))
    classes = backbone.encode_all(to_float(random_images(5, seed=2)), 8) if training.prior.weight else None
    surrogate = Alternating(backbone, training, weights, backbone.encode_all(clean, 8), classes)
    return surrogate, originals


def autocast(enabled):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def reference(backbone, training, originals, clean, classes, bf16):
    """The published loop, plainly: deep copies, a new AdamW a phase, weight gradients on, the prompt in every step."""

    def denoising(model, posterior, t, noise, posterior_noise, embeddings):
        with autocast(bf16):  # a context of its own for every forward pass: no cast outlives it
            return model.denoising_loss(posterior.sample(posterior_noise), t, noise, embeddings)

    def train(model, posterior, turn, generator):
        model.unet.train(), model.text_encoder.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
        k = turn.number * training.steps * 2
        for _ in range(training.steps):
            i, j = [(k + b) % len(posterior.mean) for b in (0, 1)], [(k + b) % len(classes.mean) for b in (0, 1)]
            both = Posterior(*(torch.cat([a[i], b[j]]) for a, b in zip(posterior, classes, strict=True)))
            t = torch.randint(1000, (4,), generator=generator)
            noise, posterior_noise = torch.randn((2, *both.mean.shape), generator=generator)
            with autocast(bf16):
                prompts = model.embed([training.instance_prompt, "a photo of person"]).repeated(2)
            losses = denoising(model, both, t, noise, posterior_noise, prompts)
            (losses[:2].mean() + training.prior.weight * losses[2:].mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            k += 2
        model.eval()

    theta, images = deepcopy(backbone), originals
    for number in range(ROUNDS):
        turn = Turn(number, seed=7)
        generator = turn.generator(originals.device)
        prime = deepcopy(theta)
        train(prime, clean, turn, generator)
        for _ in range(6):
            images = images.detach().requires_grad_()
            t = torch.randint(1000, (4,), generator=generator)
            noise, posterior_noise = torch.randn((2, 4, 4, 8, 8), generator=generator)
            with autocast(bf16):
                posterior, prompt = prime.encode(images), prime.embed([training.instance_prompt])
            loss = denoising(prime, posterior, t, noise, posterior_noise, prompt.expanded(4))
            loss.mean().backward()
            low, high = (originals - 8 * STEP).clamp(min=-1), (originals + 8 * STEP).clamp(max=1)
            images = (images + 0.8 * STEP * images.grad.sign()).clamp(low, high)
        with torch.no_grad(), autocast(bf16):
            cloaked = theta.encode(images.detach())
        train(theta, cloaked, turn, generator)
    return theta, images.detach()


@pytest.mark.parametrize("bf16", [False, True])
def test_three_rounds_equal_a_plain_reference_bit_for_bit(backbone, bf16):
    surrogate, originals = setup(backbone)
    theta, expected = reference(backbone, TRAINING, originals, surrogate.clean, surrogate.classes, bf16)
    cloaked = originals
    for number in range(ROUNDS):
        with autocast(bf16):  # as a trainer does: one context for the whole round
            outcome = alternate([surrogate], SquareCanvas(originals), cloaked, PGD(), Turn(number, seed=7))
        cloaked = outcome.state
    assert torch.equal(cloaked, expected)
    assert not torch.equal(cloaked, originals)
    for (name, actual), wanted in zip(backbone.state_dict().items(), theta.state_dict().values(), strict=True):
        assert torch.equal(actual, wanted), name
    assert not any(torch.isnan(value) for value in outcome.losses)


def test_fp32_weights_learn_at_the_published_rate_and_bf16_ones_do_not(backbone):
    """A step of the published rate is less than what bf16 can tell apart in nearly all weights."""
    training = replace(TRAINING, learning_rate=5e-7, train_text_encoder=False)  # most of whose tokens have no gradient
    surrogate, _ = setup(backbone, training)
    before = [weight.detach().clone() for weight in surrogate.weights.parameters]
    halves = [weight.bfloat16().requires_grad_() for weight in before]
    with autocast(True):
        surrogate.learn_clean(Turn(0), Turn(0).generator(before[0].device))
    optimizer = AdamW(halves, lr=5e-7, weight_decay=1e-2)
    for step in range(3):
        for weight in halves:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.step()

    def changed(now, then):
        return float(torch.cat([(a != b).flatten() for a, b in zip(now, then, strict=True)]).float().mean())

    assert changed(surrogate.weights.parameters, before) > 0.9
    assert changed(halves, [weight.bfloat16() for weight in before]) < 0.1


def test_only_the_surrogate_and_the_photos_change(backbone):
    surrogate, originals = setup(backbone)
    kept = originals.clone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    alternate([surrogate], SquareCanvas(originals), originals, PGD(), Turn(0))
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert torch.equal(originals, kept)
    assert changed
    assert all(name.startswith(("unet.", "text_encoder.")) for name in changed)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not surrogate.weights.optimizer.state
    assert not any(module.training for module in backbone.modules())


def test_the_text_encoder_can_stay_frozen(backbone):
    training = DreamBooth(
        learning_rate=1e-3, batch_size=1, train_text_encoder=False, prior=PriorPreservation(weight=0.0)
    ).completed(Defaults())
    surrogate, originals = setup(backbone, training)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    alternate([surrogate], SquareCanvas(originals), originals, PGD(), Turn(0))
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("unet.") for name in changed)


def test_gradient_checkpointing_changes_nothing(small_model):
    results = []
    choices: list[tuple[Checkpointing, tuple[bool, bool]]] = [
        (False, (False, False)),
        ("vae", (False, True)),
        (True, (True, True)),
    ]
    for which, networks in choices:
        backbone = load_backbone(str(small_model))
        backbone.checkpoint(which)
        assert (backbone.unet.is_gradient_checkpointing, backbone.vae.is_gradient_checkpointing) == networks
        surrogate, originals = setup(backbone)
        results.append(alternate([surrogate], SquareCanvas(originals), originals, PGD(), Turn(0)))
    for result in results[1:]:
        assert torch.equal(results[0].state, result.state)
        assert torch.equal(results[0].cloaked_loss, result.cloaked_loss)


def test_borrowed_weights_come_back_after_an_error(backbone):
    surrogate, _ = setup(backbone)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}

    def interrupted():
        with surrogate.borrowed():
            surrogate.learn_clean(Turn(0), torch.Generator())
            assert any(not torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_the_generator_depends_on_seed_rank_and_round():
    turns = [Turn(0), Turn(1), Turn(0, seed=1), Turn(0, rank=1, ranks=2), Turn(1, seed=1)]
    draws = [torch.randn(8, generator=turn.generator(torch.device("cpu"))) for turn in turns]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draws[0], torch.randn(8, generator=Turn(0).generator(torch.device("cpu"))))


@given(steps=st.integers(1, 5), size=st.integers(1, 4), count=st.integers(1, 30), ranks=st.integers(1, 3))
def test_every_image_gets_its_turn(steps, size, count, ranks):
    seen = torch.zeros(count)
    per_round = steps * size * ranks
    for number in range(count):
        for rank in range(ranks):
            for batch in Turn(number, rank=rank, ranks=ranks).batches(steps, size, count, torch.device("cpu")):
                assert len(batch) == size
                seen[batch] = seen.scatter_add(0, batch, torch.ones(size))[batch]
    assert seen.sum() == count * per_round
    assert seen.max() - seen.min() == 0  # `count` rounds are a whole number of passes over the images


def signs_after(backbone, spoil=lambda surrogate: None, attack=None):
    surrogate, originals = setup(backbone)
    spoil(surrogate)
    return alternate(
        [surrogate], SquareCanvas(originals), originals, attack or PGD(steps=1), Turn(2, rounds=5)
    ).vital_signs.tolist()


def test_a_round_that_works_passes(backbone):
    signs = signs_after(backbone)
    require_vital(signs, Turn(2, rounds=5))
    assert all(sign > 0 for sign in signs)


def spoil_weight(surrogate):
    surrogate.backbone.unet.conv_in.weight.data[0, 0, 0, 0] = torch.nan


def spoil_rate(surrogate):
    surrogate.weights.optimizer.param_groups[0]["lr"] = 1e30


class Flat(Denoising):
    """Nothing to climb."""

    def __call__(self, backbone, posterior, embedding, draw):
        return (0 * posterior.mean).sum(dim=(1, 2, 3)) + 1


class Steep(Denoising):
    """A finite value with a gradient that is not."""

    def __call__(self, backbone, posterior, embedding, draw):
        return (posterior.mean - posterior.mean.detach()).abs().sqrt().sum(dim=(1, 2, 3)) + 1


@pytest.mark.parametrize(
    ("spoil", "attack", "named"),
    [
        (spoil_weight, None, "loss on clean photos is no finite number any more in round 3 of 5"),
        (spoil_rate, None, "no finite number any more in round 3 of 5"),
        (lambda surrogate: None, PGD(steps=1, objective=Steep()), "the gradient in the pixels is no finite number"),
        (lambda surrogate: None, PGD(steps=1, objective=Flat()), "the gradient in the pixels is 0 in round 3 of 5"),
    ],
    ids=["weight", "rate", "gradient", "nothing"],
)
def test_a_round_that_does_not_work_says_what_went_wrong(backbone, spoil, attack, named):
    with pytest.raises(InputError, match=named):
        require_vital(signs_after(backbone, spoil, attack), Turn(2, rounds=5))


def test_a_weight_that_the_last_step_spoils_is_seen(backbone):
    surrogate, _ = setup(backbone)
    assert torch.isfinite(surrogate.weight_norm())
    spoil_weight(surrogate)
    assert not torch.isfinite(surrogate.weight_norm())
