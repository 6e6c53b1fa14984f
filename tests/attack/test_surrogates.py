"""Rounds with surrogates that do not learn, with several of them, and with one on the device at a time."""

from copy import deepcopy

import pytest
import torch

from antidreambooth.attack.canvas import STEP, SquareCanvas
from antidreambooth.attack.cost import counted
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import alternate
from antidreambooth.attack.surrogates import Fixed, Offloaded
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.photos.decoding import to_float
from tests.attack.test_rounds import setup
from tests.conftest import random_images

PROMPT = "a photo of sks person"


@pytest.fixture
def models(small_model, small_v_model):
    return [load_backbone(str(folder)) for folder in (small_model, small_v_model)]


def test_a_round_with_a_fixed_surrogate_is_pgd_and_leaves_it_alone(backbone):
    originals = to_float(random_images(3))
    before = deepcopy(backbone.state_dict())
    outcome = alternate([Fixed(backbone, PROMPT)], SquareCanvas(originals), originals, PGD(), Turn(4, seed=2))
    turn = Turn(4, seed=2)
    wanted = PGD()(Fixed(backbone, PROMPT), SquareCanvas(originals), originals, turn, turn.generator(originals.device))
    assert torch.equal(outcome.state, wanted.state)
    assert torch.equal(outcome.objective, wanted.objective)
    assert outcome.clean_loss == outcome.cloaked_loss == 0
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_an_ensemble_climbs_apart_and_learns_from_the_mean(models):
    """Against the definition, step by step, on copies of the same models."""
    made = [setup(model) for model in models]
    copies = [setup(deepcopy(model)) for model in models]
    originals = made[0][1]
    start = originals * 0.9
    outcome = alternate([surrogate for surrogate, _ in made], SquareCanvas(originals), start, PGD(), Turn(1))

    generator, results = Turn(1).generator(originals.device), []
    for surrogate, _ in copies:
        with surrogate.borrowed():
            surrogate.learn_clean(Turn(1), generator)
            results.append(PGD()(surrogate, SquareCanvas(originals), start, Turn(1), generator).state)
    low, high = (originals - 8 * STEP).clamp(min=-1), (originals + 8 * STEP).clamp(max=1)
    mean = ((results[0] + results[1]) / 2).clamp(low, high)
    for surrogate, _ in copies:
        surrogate.learn_cloaked(mean, Turn(1), generator)

    assert torch.equal(outcome.state, mean)
    assert not torch.equal(results[0], results[1])
    for (surrogate, _), (copy, _) in zip(made, copies, strict=True):
        states = surrogate.backbone.state_dict(), copy.backbone.state_dict()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert (outcome.state - originals).abs().max() <= 8 * STEP + 1e-6


def test_models_that_rest_elsewhere_give_the_same_and_are_present_one_at_a_time(models, monkeypatch):
    originals = to_float(random_images(2))
    together = [setup(deepcopy(model))[0] for model in models]
    present: set[int] = set()
    device, most = torch.device("cpu", 0), 0
    move = Backbone.to

    def recorded(self, where, *args, **kwargs):
        nonlocal most
        (present.add if where is device else present.discard)(id(self))
        most = max(most, len(present))
        return move(self, where, *args, **kwargs)

    monkeypatch.setattr(Backbone, "to", recorded)
    apart = [Offloaded(setup(model)[0], device) for model in models]
    outcomes = [
        alternate(surrogates, SquareCanvas(originals), originals, PGD(), Turn(0)) for surrogates in (together, apart)
    ]
    assert torch.equal(outcomes[0].state, outcomes[1].state)
    assert torch.equal(outcomes[0].cloaked_loss, outcomes[1].cloaked_loss)
    assert most == 1
    assert not present


def test_passes_are_counted_in_images(backbone):
    surrogate, originals = setup(backbone)  # two of four photos and two class images a step, three steps a phase
    with counted([backbone]) as passes:
        alternate([surrogate], SquareCanvas(originals), originals, PGD(micro_batch=3), Turn(0))
    assert passes.denoiser == 6 * 4 + 6 * 4
    assert passes.encoder == 6 * 4 + 4
    with counted([backbone]) as several:
        alternate([surrogate], SquareCanvas(originals), originals, PGD(micro_batch=3, draws=3), Turn(0))
    assert (several.denoiser, several.encoder) == (6 * 4 + 3 * 6 * 4, passes.encoder)
    alternate([surrogate], SquareCanvas(originals), originals, PGD(), Turn(1))
    assert passes.encoder == 28  # nothing is counted afterwards
