"""Which timesteps are drawn: a range, and the window of the largest gradient."""

import copy

import pytest
import torch

from antidreambooth.attack.cost import counted
from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
from antidreambooth.attack.objectives import Denoising, Targeted, Transformed
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.transforms import Flip
from antidreambooth.diffusion.densities import LargestGradient, Range, Uniform
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from tests.devices.paths import canvas_of, photos

CPU = torch.device("cpu")


def generator(number=0):
    return Turn(number).generator(CPU)


def test_a_range_draws_all_of_it_and_nothing_else():
    drawn = Range(0.2, 0.5)(5000, 100, generator())
    assert drawn.unique().tolist() == list(range(20, 50))
    assert Range(0.999, 1.0)(4, 10, generator()).tolist() == [9] * 4
    for low, high in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(InputError):
            Range(low, high)


def loudest(total=1000):
    """Two images: the gradient of the first is largest in the third of five windows, of the second in the last."""
    return lambda drawn: torch.where(drawn * 5 // total == torch.tensor([2, 4]), 1.0, 0.3)


def played(sampler, steps, size, total=1000):
    """What is drawn in so many steps, for images whose gradients have known sizes."""
    drawn = []
    for step in range(steps):
        drawn.append(sampler(2, total, generator(step)))
        sampler.observe(size(drawn[-1]), lambda table: table)
    return torch.stack(drawn)


def test_each_image_finds_the_window_of_its_own_largest_gradient():
    windows = played(LargestGradient(5, visits=2, explore=0.1), 310, loudest()) * 5 // 1000
    for column in windows[:10].T:
        assert sorted(column.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # first it looks everywhere
    shares = (windows[10:] == torch.tensor([2, 4])).float().mean(dim=0)
    assert torch.allclose(shares, torch.tensor(0.92), atol=0.06)  # nine in ten, and by chance a fifth of the others
    places = played(LargestGradient(5, explore=0.0), 2000, loudest())[10:, 0]
    assert 400 <= places.min() < 405
    assert 595 <= places.max() < 600


def test_two_ranks_know_the_mean_of_what_each_has_seen():
    def seen(rank, reduce):
        sampler = LargestGradient(5)
        sampler(2, 1000, generator(rank))
        sampler.observe(torch.tensor([1.0, 2.0]), reduce)
        return sampler.known(2, CPU)

    mean = (seen(0, torch.clone) + seen(1, torch.clone)) / 2
    assert not torch.equal(seen(0, torch.clone), mean)
    assert torch.equal(seen(0, lambda _: mean), seen(1, lambda _: mean))
    assert torch.allclose(mean.sum(dim=2), torch.tensor([[1.0, 2.0], [1.0, 1.0]]))


def rounds(assembly, model, count, passes=None):
    """The perturbation after some rounds of a surrogate that learns one step a phase."""
    canvas, state = canvas_of(assembly.settings, CPU), None
    with counted([model]) as seen:
        (surrogate,) = assembly.surrogates(canvas.images(canvas.blank), photos(3, CPU, 1), plain_weights)
        state = canvas.blank + assembly.attack.start(canvas, 0)
        for number in range(count):
            turn = Turn(number, rounds=count)
            noise = turn.generator(CPU)
            with surrogate.borrowed():
                surrogate.learn_clean(turn, noise)
                state = assembly.attack(surrogate, canvas, state, turn, noise).state
    if passes is not None:
        passes.append((seen.denoiser, seen.encoder))
    return state


def assembled(model, timesteps):
    training = DreamBooth(learning_rate=1e-3, steps=1, batch_size=1, prior=PriorPreservation(weight=0.0))
    settings = Settings(training=training, objective=Transformed([Flip()], Denoising(timesteps)), pgd_steps=6)
    assembly = Assembly(METHODS["simac"], settings)
    assembly.adopt([model], lambda *_: None, seed=0)
    return assembly


def test_the_choice_takes_no_more_passes_than_none_and_every_run_begins_anew(backbone):
    passes: list[tuple[int, int]] = []
    sampler = LargestGradient(3, visits=1)
    assembly = assembled(backbone, sampler)
    weights = copy.deepcopy(backbone.state_dict())
    first = rounds(assembly, backbone, 2, passes)
    assert sampler.table is not None
    assert sampler.known(3, CPU)[1].sum(dim=1).tolist() == [12.0] * 3  # two rounds of six steps, seen once each
    backbone.load_state_dict(weights)
    assert torch.equal(rounds(assembly, backbone, 2, passes), first)
    backbone.load_state_dict(weights)
    rounds(assembled(backbone, Uniform()), backbone, 2, passes)
    assert len({*passes}) == 1  # a tenth more would be allowed


def test_magnitudes_are_of_one_draw_and_found_at_any_depth():
    sampler = LargestGradient()
    nested = Transformed([Flip()], Transformed([Flip()], Targeted(timesteps=sampler)))
    assert PGD(objective=nested).samplers == [sampler]
    assert PGD().samplers == []
    with pytest.raises(InputError, match="leave out draws"):
        PGD(objective=nested, draws=2)
