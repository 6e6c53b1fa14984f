"""Photos at their own size: what a step sees, how its gradient comes back, and what is written in the end."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from antidreambooth.attack.canvas import STEP, OwnSizeCanvas, SquareCanvas
from antidreambooth.attack.parametrisation import OwnSize
from antidreambooth.attack.perturbation import PGD, random_change
from antidreambooth.attack.rounds import alternate
from antidreambooth.attack.steps import Momentum, NormalizedL2, Sign
from antidreambooth.attack.surrogates import Fixed
from antidreambooth.attack.views import Part, Views
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.photos.resampling import viewing
from antidreambooth.photos.whole import Reduced, reduced

SIDE = 16
FACE = (40, 30, 60, 50)
PROMPT = "a photo of sks person"


def photo(width: int, height: int, points: int = 32, faces=(), grey: bool = False, seed: int = 0) -> Reduced:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return reduced(pixels[..., :1].repeat(3, axis=2) if grey else pixels, points, faces, grey)


@pytest.fixture
def canvas() -> OwnSizeCanvas:
    """Photos of three shapes: landscape with a face, upright and grey, smaller than the model's square."""
    photos = [photo(120, 90, faces=(FACE,)), photo(60, 100, grey=True, seed=1), photo(12, 10, seed=2)]
    return OwnSizeCanvas(photos, SIDE)


def noise(canvas: OwnSizeCanvas, seed: int = 0) -> torch.Tensor:
    """A state within the budget 8."""
    return (torch.rand(canvas.blank.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * 8 * STEP


def test_a_step_sees_what_a_trainer_makes_of_the_delivered_photo():
    """The whole way by matrices against: enlarge, add, round, resize with Pillow."""
    for size in ((300, 200), (96, 130)):
        pixels = np.array(Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 60).convert("RGB")) // 2 + 64
        one = OwnSizeCanvas([reduced(pixels, 64)], SIDE)
        state = noise(one)
        change = one.change(state, 0, 8.0).numpy()
        delivered = Image.fromarray((pixels + change).astype(np.uint8))
        assert abs(change).max() in (7, 8)
        width, height = size
        side = min(size)
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        for before, cloaked in ((Image.fromarray(pixels), delivered),):
            wanted = np.array(cloaked.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box), np.float32)
            clean = np.array(before.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box), np.float32)
            seen = ((one.images(state)[0] + 1) * 127.5).permute(1, 2, 0).numpy()
            blank = ((one.images(one.blank)[0] + 1) * 127.5).permute(1, 2, 0).numpy()
            assert abs(seen - blank - (wanted - clean)).max() < 1.2  # rounding, twice
            assert abs(blank - clean).mean() < 2  # the photo is known at its grid's size


def test_the_gradient_is_autograds(canvas):
    state = noise(canvas).requires_grad_()
    looks = canvas.looks(Turn(3, seed=1), 1)
    images = canvas.images(state, looks)
    weight = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    inside = images.detach().abs() < 1  # where a value is clipped, ours goes on
    (wanted,) = torch.autograd.grad((images * weight * inside).sum(), state)
    found = canvas.gradient(weight * inside, looks)
    expected = [
        g.mean(0).expand_as(g) if p.grey else g for g, p in zip(canvas.grids(wanted), canvas.photos, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat([part.flatten() for part in expected]), atol=1e-5, rtol=1e-4)


def test_a_grey_photo_stays_grey(canvas, backbone):
    moved = PGD(steps=3)(Fixed(backbone, PROMPT), canvas, canvas.blank, Turn(0), torch.Generator().manual_seed(0)).state
    coloured, grey, _ = (canvas.change(moved, index, 8.0) for index in range(3))
    assert torch.equal(grey[..., 0], grey[..., 1])
    assert torch.equal(grey[..., 0], grey[..., 2])
    assert not torch.equal(coloured[..., 0], coloured[..., 1])


@pytest.mark.parametrize("rule", [Sign(random_start=True), Momentum(), NormalizedL2()])
@pytest.mark.parametrize("budget", [1.0, 8.0, 12.7, 200.0])
def test_every_rule_keeps_the_budget_at_the_photos_own_size(canvas, backbone, rule, budget):
    attack = PGD(budget=budget, step_size=budget, rule=rule, steps=2)
    state = canvas.blank + attack.start(canvas, 0)
    for number in range(2):
        outcome = alternate([Fixed(backbone, PROMPT)], canvas, state, attack, Turn(number))
        state = outcome.state
    for index, one in enumerate(canvas.photos):
        change = canvas.change(state, index, budget)
        assert change.shape == (one.size[1], one.size[0], 3)
        assert 0 < change.abs().max() <= int(budget)


def test_each_photo_is_moved_as_it_would_be_alone(backbone):
    """Step rules have norms of their own for each photo, whatever the others' sizes."""
    photos = [photo(120, 90), photo(60, 100, seed=1)]
    together = OwnSizeCanvas(photos, SIDE)
    gradient = torch.randn(together.blank.shape, generator=torch.Generator().manual_seed(1))
    for rule in (Sign(), Momentum(), NormalizedL2()):
        step, memory = together.direction(rule, gradient, together.begin(rule))
        _, second = together.grids(gradient)
        alone = OwnSizeCanvas(photos[1:], SIDE)
        own, kept = alone.direction(rule, second.flatten(), alone.begin(rule))
        assert torch.equal(together.grids(step)[1].flatten(), own)
        assert torch.equal(memory[len(memory) - len(kept) :], kept)


@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    numbers=st.tuples(*[st.floats(0, 0.999)] * 4),
    close=st.booleans(),
)
@settings(max_examples=200)
def test_every_part_lies_in_its_photo(width, height, numbers, close):
    face = (width * 2 // 5, height // 5, max(1, width * 9 // 10), height // 2)
    for faces in ((), (face,)):
        part = Views().part(Reduced(torch.zeros(3, 1, 1, dtype=torch.uint8), (width, height), faces), close, numbers)
        assert 0 < part.side <= min(width, height) + 1e-6
        assert part.left >= 0
        assert part.top >= 0
        assert part.left + part.side <= width + 1e-6
        assert part.top + part.side <= height + 1e-6


def test_whole_views_and_faces_by_turns(canvas):
    kinds = [Views(close=share) for share in (0.0, 0.5, 1.0)]
    assert [[views.is_close(n) for n in range(6)] for views in kinds] == [
        [False] * 6,
        [False, True] * 3,
        [True] * 6,
    ]
    one = canvas.photos[0]
    assert Views().part(one, False, (0.0, 0.0, 0.0, 0.0)) == Part(0.0, 0.0, 90.0)
    assert Views().part(one, False, (0.0, 0.0, 0.999, 0.5)).left == pytest.approx(30, abs=0.1)  # along the long side
    middle = Views().part(one, True, (0.0, 0.5, 0.5, 0.5))
    assert middle == Part(25.0, 15.0, 50.0)  # 2.5 widths of the face around its middle
    closest = Views().part(canvas.photos[1], True, (0.0, 0.0, 0.5, 0.5))
    assert closest.side == pytest.approx(0.6 * 60)  # no face is known: a random square


def test_other_steps_rounds_and_ranks_see_other_parts(canvas):
    def seen(turn: Turn, number: int) -> torch.Tensor:
        return torch.cat([look.rows.flatten() for look in canvas.looks(turn, number)])

    first = seen(Turn(0, seed=1), 1)
    assert torch.equal(first, seen(Turn(0, seed=1), 1))
    for turn, number in (
        (Turn(0, seed=2), 1),
        (Turn(1, seed=1), 1),
        (Turn(0, seed=1, rank=1), 1),
        (Turn(0, seed=1), 3),
    ):
        assert not torch.equal(first, seen(turn, number))


def test_a_surrogate_learns_the_whole_view_and_the_face(canvas):
    lessons = canvas.lessons(canvas.blank)
    assert lessons.shape == (4, 3, SIDE, SIDE)
    whole = canvas.images(canvas.blank)
    assert torch.equal(lessons[[0, 2, 3]], whole)
    assert not torch.equal(lessons[1], whole[0])
    without = OwnSizeCanvas(canvas.photos, SIDE, Views(close=0.0))
    assert torch.equal(without.lessons(without.blank), whole)


def test_small_faces_have_a_finer_grid():
    points = OwnSize().points
    assert points((3000, 4000), (), 512) == 1024
    assert points((3000, 4000), ((0, 0, 600, 600),), 512) == 1280  # a square of two face widths is 1200 of 3000 pixels
    assert points((3000, 4000), ((0, 0, 100, 100),), 512) == 2048  # and no finer than twice
    assert OwnSize(views=Views(close=0.0)).points((3000, 4000), ((0, 0, 100, 100),), 512) == 1024


def test_a_finer_grid_and_the_same_change_are_seen_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    coarse, fine = (OwnSizeCanvas([reduced(pixels, points)], SIDE) for points in (32, 128))
    change = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * STEP
    finer = torch.nn.functional.interpolate(change, (128, 128), mode="bilinear")
    seen = [c.images(s.flatten()) - c.images(c.blank) for c, s in ((coarse, change), (fine, finer))]
    assert (seen[0] - seen[1]).abs().max() < 0.15 * STEP


def test_wrong_views_are_refused():
    with pytest.raises(InputError, match="close is from 0 to 1"):
        Views(close=1.5)
    with pytest.raises(InputError, match="narrowest is at most widest"):
        Views(narrowest=3.0, widest=2.0)
    with pytest.raises(InputError, match="oversampling is from 1 to 8"):
        OwnSize(oversampling=0.5)


def test_a_square_canvas_is_its_photos():
    originals = torch.rand(2, 3, 4, 4) * 2 - 1
    square = SquareCanvas(originals)
    assert square.images(originals) is originals
    assert square.lessons(originals) is originals
    assert square.gradient(originals, ()) is originals


def test_the_control_reaches_a_trainer_and_signs_of_full_size_do_not():
    size, side = (800, 600), 32
    cpu = torch.device("cpu")
    rows, columns = viewing(600, 0.0, 600.0, side, cpu), viewing(800, 100.0, 600.0, side, cpu)

    def share(change: torch.Tensor) -> float:
        """Of the budget's energy, what is left in a trainer's square."""
        seen = rows @ change.permute(2, 0, 1).float() @ columns.T
        return seen.square().mean().item() / 64

    control = random_change(size, side, 8.0, seed=1)
    assert control.shape == (600, 800, 3)
    assert control.abs().max() <= 8
    assert torch.equal(control, random_change(size, side, 8.0, seed=1))
    full = torch.randint(0, 2, (600, 800, 3), generator=torch.Generator().manual_seed(1)) * 16 - 8
    assert share(control) > 0.15
    assert share(full) < 0.03
