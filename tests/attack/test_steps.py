"""What a step does with a gradient: each rule by its formula, the schedule, the random start, what is remembered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antidreambooth.attack.canvas import STEP, SquareCanvas
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import alternate
from antidreambooth.attack.steps import Momentum, NormalizedL2, Sign, StepRule
from antidreambooth.attack.surrogates import Fixed
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import to_float
from tests.conftest import random_images

PROMPT = "a photo of sks person"
RULES = {
    "sign": Sign(),
    "momentum": Momentum(decay=0.9),
    "momentum in a round": Momentum(across_rounds=False),
    "l2": NormalizedL2(),
    "falling": Sign(schedule="linear"),
    "random start": Momentum(random_start=True, schedule="linear"),
}


class Own(StepRule):
    """Somebody's own rule: descends."""

    def direction(self, gradient, memory):
        return -gradient.sign(), memory


def gradients(count, photos=2):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(photos, 3, 4, 5, generator=generator) for _ in range(count)]


def directions(rule, given):
    memory, found = rule.begin(given[0]), []
    for gradient in given:
        direction, memory = rule.direction(gradient, memory)
        found.append(direction)
    return found


def test_momentum_is_the_papers_sum():
    """MI-FGSM (arXiv:1710.06081), equations 6 and 7, photo by photo in plain Python."""
    given_ones = gradients(3)
    for photo in range(2):
        total = torch.zeros(3, 4, 5)
        for gradient, direction in zip(given_ones, directions(Momentum(decay=0.7), given_ones), strict=True):
            total = 0.7 * total + gradient[photo] / sum(abs(float(value)) for value in gradient[photo].flatten())
            assert torch.equal(direction[photo], total.sign())


def test_momentum_outvotes_a_gradient_that_turns_and_none_does_not():
    steady, turned = torch.ones(1, 3, 2, 2), -0.5 * torch.ones(1, 3, 2, 2)
    given_ones = [steady, steady, turned]
    assert (directions(Momentum(decay=1.0), given_ones)[2] == 1).all()
    assert (directions(Momentum(decay=0.0), given_ones)[2] == -1).all()
    pairs = zip(directions(Momentum(decay=0.0), given_ones), directions(Sign(), given_ones), strict=True)
    assert all(torch.equal(without, sign) for without, sign in pairs)


@given(scale=st.floats(1e-6, 1e6))
@settings(max_examples=20)
def test_an_l2_step_is_as_long_as_a_sign_step_and_points_along_the_gradient(scale):
    (gradient,) = gradients(1)
    gradient[0] *= scale  # one photo's gradient does not shorten another's step
    (direction,) = directions(NormalizedL2(), [gradient])
    (sign,) = directions(Sign(), [gradient])
    norms = torch.linalg.vector_norm(direction.flatten(1), dim=1)
    torch.testing.assert_close(norms, torch.linalg.vector_norm(sign.flatten(1), dim=1), rtol=1e-4, atol=0)
    cosines = torch.cosine_similarity(direction.flatten(1), gradient.flatten(1))
    torch.testing.assert_close(cosines, torch.ones(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rule", [Sign(), Momentum(), NormalizedL2()], ids=lambda rule: type(rule).__name__)
def test_a_gradient_of_zero_gives_no_step(rule):
    zero = torch.zeros(2, 3, 4, 5)
    (direction,) = directions(rule, [zero])
    assert torch.equal(direction, zero)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_rounds_resume_from_what_is_remembered(backbone, rule):
    """A round equals one that was given only what a checkpoint keeps; the budget holds throughout."""
    originals = to_float(random_images(2))
    surrogate, attack = Fixed(backbone, PROMPT), PGD(budget=4.0, steps=3, rule=rule)
    cloaked, memory = originals + attack.start(SquareCanvas(originals), 5), None
    for number in range(3):
        turn = Turn(number, seed=5, rounds=3)
        outcome = alternate([surrogate], SquareCanvas(originals), cloaked, attack, turn, memory)
        # A checkpoint keeps the memory of a rule that lasts, and nothing of another.
        apart = alternate([surrogate], SquareCanvas(originals), cloaked, attack, turn, memory if rule.lasting else None)
        assert torch.equal(apart.state, outcome.state)
        cloaked, memory = outcome.state, outcome.memory
        assert (cloaked - originals).abs().max() <= 4 * STEP + 1e-6
        assert cloaked.abs().max() <= 1
    assert not torch.equal(cloaked, originals)


def test_momentum_across_rounds_is_one_long_sum_and_in_a_round_it_is_not(backbone):
    originals = to_float(random_images(2))

    def memories(rule):
        attack, memory, found = PGD(steps=1, rule=rule), None, []
        for number in range(2):
            outcome = alternate(
                [Fixed(backbone, PROMPT)], SquareCanvas(originals), originals, attack, Turn(number), memory
            )
            memory = outcome.memory
            found.append(memory[0])
        return found

    (first, second), (same, anew) = memories(Momentum(1.0)), memories(Momentum(1.0, across_rounds=False))
    assert torch.equal(first, same)
    torch.testing.assert_close(second, first + anew, rtol=1e-4, atol=1e-8)
    assert second.abs().sum() > anew.abs().sum()


def test_a_falling_step_size_ends_at_nothing_and_never_rises(backbone):
    """The step after k of n steps is 1 - k / n of the whole one, over all rounds of the run."""
    originals = to_float(random_images(1)) * 0.5
    attack = PGD(budget=255.0, step_size=10.0, steps=2, rule=Sign(schedule="linear"), reduce=torch.ones_like)
    cloaked = originals
    for number in range(3):
        before = cloaked
        turn = Turn(number, rounds=3)
        cloaked = attack(
            Fixed(backbone, PROMPT), SquareCanvas(originals), cloaked, turn, turn.generator(originals.device)
        ).state
        expected = sum(10 * STEP * (1 - k / 6) for k in (2 * number, 2 * number + 1))
        torch.testing.assert_close((cloaked - before).max(), torch.tensor(expected), rtol=1e-4, atol=0)
    assert Sign(schedule="linear").factor(1.0) == 0


def test_a_random_start_fills_the_budget_is_seeded_and_keeps_to_the_range_of_pixels():
    originals = to_float(random_images(3, side=32))
    attack = PGD(budget=8.0, rule=Sign(random_start=True))
    start = attack.start(SquareCanvas(originals), seed=1)
    assert torch.equal(start, attack.start(SquareCanvas(originals), seed=1))
    assert not torch.equal(start, attack.start(SquareCanvas(originals), seed=2))
    assert (originals + start).abs().max() <= 1
    assert 7.9 * STEP < start.abs().max() <= 8 * STEP + 1e-6
    assert start.abs().mean().item() == pytest.approx(4 * STEP, rel=0.05)  # uniform; less at the range's ends
    assert not PGD().start(SquareCanvas(originals), seed=1).any()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Momentum(decay=1.5), "1.5"),
        (lambda: Momentum(decay=-0.1), "-0.1"),
        (lambda: Own(schedule="cosine"), "cosine"),
    ],
)
def test_impossible_rules_are_refused(make, named):
    with pytest.raises(InputError, match=named):
        make()
