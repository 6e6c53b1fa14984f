"""Bases and budgets of each pixel's own, in squares and at the photos' own size: what is seen, and what is written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from antidreambooth.attack.basis import Basis, Coarse, Gaussian, LowFrequencies, Pixels
from antidreambooth.attack.canvas import STEP, Canvas, OwnSizeCanvas, SquareCanvas
from antidreambooth.attack.parametrisation import Bounds, OwnSize, Square
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import alternate
from antidreambooth.attack.shaped import OwnBudgets, ShapedGrids, ShapedSquares
from antidreambooth.attack.steps import Momentum, NormalizedL2, Sign
from antidreambooth.attack.surrogates import Fixed
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import Photo, to_float
from antidreambooth.photos.delivery import Delivery
from antidreambooth.photos.whole import reduced
from tests.conftest import random_images

SIDE = 16
PROMPT = "a photo of sks person"
BASES: dict[str, Basis] = {
    "pixels": Pixels(),
    "half": Coarse(),
    "gaussian": Gaussian(),
    "dct": LowFrequencies(),
}
SHAPES = ("flat", "visible")
every_basis = pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES)


def grids(basis: Basis, shape: str = "flat", budget: float = 8.0) -> ShapedGrids:
    """A landscape with a mask, an upright grey photo, one smaller than the model's square."""
    photos, rng = [], np.random.default_rng(0)
    for number, (width, height) in enumerate(((60, 44), (30, 50), (12, 10))):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        allowed = None
        if number == 0:
            allowed = np.zeros((height, width), bool)
            allowed[:, 20:] = True
        if number == 1:
            pixels = np.repeat(pixels[..., :1], 3, axis=2)
        photos.append(reduced(pixels, 32, grey=number == 1, allowed=allowed))
    budgets = OwnBudgets([photo.picture for photo in photos], budget) if shape == "visible" else None
    return ShapedGrids(photos, SIDE, basis=basis, budgets=budgets)


def squares(basis: Basis, shape: str = "flat", budget: float = 8.0) -> ShapedSquares:
    pictures = random_images(2, SIDE)
    budgets = OwnBudgets([*pictures], budget) if shape == "visible" else None
    return ShapedSquares(to_float(pictures), basis, budgets)


def random(shape: torch.Size, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def photos_of(pictures: torch.Tensor) -> list[Photo]:
    """Photos that are squares already."""
    return [
        Photo(Path(f"{n}.png"), f"{n}.png", "", (SIDE, SIDE), (0, 0, SIDE, SIDE), p) for n, p in enumerate(pictures)
    ]


@every_basis
@every_shape
@pytest.mark.parametrize("make", [squares, grids])
def test_the_gradient_is_autograds_in_what_the_change_is_made_of(make, basis, shape):
    canvas: Canvas = make(basis, shape)
    state = canvas.project(random(canvas.blank.shape) * STEP, 8 * STEP).requires_grad_()
    looks = canvas.looks(Turn(3, seed=1), 1)
    images = canvas.images(state, looks)
    weights = random(images.shape, seed=1) * (images.detach().abs() < 1)  # where it is clipped, ours goes on
    if isinstance(canvas, ShapedGrids):
        weights[1] = weights[1].mean(dim=0)  # grey: its gradient is made even
    (wanted,) = torch.autograd.grad((images * weights).sum(), state)
    torch.testing.assert_close(canvas.gradient(weights, looks), wanted, atol=1e-5, rtol=1e-3)


def test_pixels_and_a_flat_budget_are_the_published_squares_and_the_usual_grids(backbone):
    usual = OwnSizeCanvas(grids(Pixels()).photos, SIDE)
    published = SquareCanvas(to_float(random_images(2, SIDE)))
    for plain, shaped in ((published, squares(Pixels())), (usual, grids(Pixels()))):
        attack, found = PGD(steps=2, rule=Sign()), []
        for canvas in (plain, shaped):
            state = alternate([Fixed(backbone, PROMPT)], canvas, canvas.blank, attack, Turn(0)).state
            found.append(canvas.images(state))
        # A sum that rounds otherwise may turn the sign of a gradient of next to nothing.
        assert ((found[1] - found[0]).abs() > 1e-6).float().mean() < 0.01
        assert not torch.equal(found[1], canvas.images(canvas.blank))


@given(
    name=st.sampled_from(sorted(BASES)),
    shape=st.sampled_from(SHAPES),
    budget=st.one_of(st.sampled_from([1.0, 255.0]), st.floats(1, 255)),
    size=st.sampled_from([0.3, 1.0, 50.0]),
    extreme=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20)
def test_the_budget_of_each_pixel_holds_in_what_is_delivered(name, shape, budget, size, extreme, seed):
    """After enlarging, rounding and clipping, whatever the state, projected or not."""
    for make in (squares, grids):
        canvas = make(BASES[name], shape, budget)
        state = random(canvas.blank.shape, seed) * budget * STEP * size
        state = state.sign() * budget * STEP * size if extreme else state
        for reached in (state, canvas.project(state, budget * STEP)):
            if isinstance(canvas, ShapedSquares):
                originals = random_images(2, SIDE)
                cloaked = Square().shown(canvas, reached, photos_of(originals), budget)
                changes = [(cloaked.int() - originals.int()).abs()]
                bounds = [canvas.bound(budget)]
            else:
                changes = [canvas.change(reached, i, budget).permute(2, 0, 1).abs() for i in range(3)]
                bounds = [canvas.bound(i, budget) for i in range(3)]
            for change, bound in zip(changes, bounds, strict=True):
                assert (change <= torch.as_tensor(bound).floor()).all()
                assert int(change.max()) <= (min(255, 4 * int(budget)) if shape == "visible" else int(budget))


@every_basis
@every_shape
@pytest.mark.parametrize("rule", [Sign(random_start=True, schedule="linear"), Momentum(), NormalizedL2()])
def test_rounds_with_several_surrogates_move_it_within_the_budget_and_resume(backbone, basis, shape, rule):
    """Every rule works on what the change is made of; a round needs no more than a checkpoint keeps."""
    attack = PGD(budget=8.0, step_size=4.0, steps=1, rule=rule)
    surrogates = [Fixed(backbone, PROMPT), Fixed(backbone, "a photo")]
    for canvas in (squares(basis, shape), grids(basis, shape)):
        perturbation, memory = attack.start(canvas, 1), None
        for number in range(2):
            turn = Turn(number, seed=1, rounds=3)
            outcome = alternate(surrogates, canvas, canvas.blank + perturbation, attack, turn, memory)
            kept = memory if rule.lasting else None
            again = alternate(surrogates, canvas, canvas.blank + perturbation, attack, turn, kept)
            assert torch.equal(outcome.state, again.state)
            perturbation, memory = outcome.state - canvas.blank, outcome.memory
        change = canvas.pixel_change(canvas.blank + perturbation)
        assert change.any()
        if shape == "flat":
            assert change.abs().max() <= 8 * STEP * (1 + 1e-4)


@every_basis
@every_shape
def test_masks_and_grey_hold(backbone, basis, shape):
    canvas = grids(basis, shape)
    state = PGD(steps=2)(Fixed(backbone, PROMPT), canvas, canvas.blank, Turn(0), torch.Generator().manual_seed(0)).state
    masked, grey, _ = canvas.grids(state)
    allowed = canvas.photos[0].allowed
    assert allowed is not None
    assert not masked[:, ~allowed].any()
    assert masked.any()
    torch.testing.assert_close(grey, grey[:1].expand_as(grey))


@every_shape
@pytest.mark.parametrize("kind", [OwnSize, Square])
def test_files_hold_each_pixels_budget_and_say_what_it_was(tmp_path, kind, shape):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(40, 216, (6, 8, 3), np.uint8))
    small.resize((64, 48), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    small.convert("L").resize((40, 40), Image.Resampling.BICUBIC).save(tmp_path / "b.png")
    parametrisation = kind(basis=Gaussian()).shaped(shape, 8.0)
    photos = parametrisation.load(tmp_path, SIDE)
    canvas = parametrisation.canvas(photos, SIDE)
    state = canvas.project(canvas.blank + random(canvas.blank.shape).sign(), 8 * STEP)
    for index, one in enumerate(parametrisation.finish(canvas, state, photos, 8.0, Delivery())):
        change = np.abs(one.after.astype(int) - one.before)
        assert change.max() == one.file.largest
        if shape == "flat":
            assert one.bounds is None
            assert int(change.max()) <= 8
        else:
            bound = canvas.bound(8.0)[index] if kind is Square else canvas.bound(index, 8.0)[None]
            assert (change <= bound.floor().permute(1, 2, 0).numpy()).all()
            assert one.bounds == Bounds(int(bound.max()), round(bound.floor().double().mean().item(), 3))
            assert one.bounds.largest > 8


def test_the_shape_of_a_budget_is_said_once_and_changes_nothing_else():
    form = OwnSize(oversampling=3.0)
    visible: Any = form.shaped("visible", 6.0)
    assert (visible.plain, form.plain, visible.oversampling) == (6.0, None, 3.0)
    assert visible.shaped("flat", 6.0).plain is None
    with pytest.raises(InputError, match=r"flat or visible: got 'round'"):
        form.shaped("round", 6.0)


def test_a_canvas_is_the_same_after_it_was_moved_to_a_device():
    for canvas in (squares(Gaussian(), "visible"), grids(Gaussian(), "visible")):
        state = canvas.project(random(canvas.blank.shape), 8 * STEP)
        moved = canvas.to(torch.device("cpu"))
        assert torch.equal(moved.images(state), canvas.images(state))
