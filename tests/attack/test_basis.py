"""What PGD moves instead of pixels: the map and its transpose, and the budget of what it gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from antidreambooth.attack.basis import Basis, Coarse, Gaussian, LowFrequencies, Pixels, in_order
from antidreambooth.errors import InputError

BASES: dict[str, Basis] = {
    "pixels": Pixels(),
    "half": Coarse(),
    "third": Coarse(2.7),
    "gaussian": Gaussian(),
    "wide": Gaussian(6.0),
    "dct": LowFrequencies(),
    "one": LowFrequencies(1),
    "all": LowFrequencies(64),
}
SIZES = ((16, 16), (13, 22), (1, 3), (5, 9))
every_basis = pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_basis
def test_the_gradient_is_the_maps_transpose_and_autograds(basis):
    """<A x, g> = <x, A^T g>."""
    for rows, columns in SIZES:
        free = random(2, *basis.shape(rows, columns)).requires_grad_()
        weights = random(2, 3, rows, columns, seed=1)
        change = basis.change(free, rows, columns)
        assert change.shape == weights.shape
        product = (change * weights).sum()
        found = basis.gradient(weights)
        assert found.shape == free.shape
        assert (found * free).sum().item() == pytest.approx(product.item(), rel=1e-4, abs=1e-4)
        (wanted,) = torch.autograd.grad(product, free)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@given(
    name=st.sampled_from(sorted(BASES)),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    size=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    extreme=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80)
def test_whatever_is_projected_changes_no_value_by_more_than_the_budget(name, rows, columns, size, extreme, seed):
    basis, radius = BASES[name], 0.06
    free = size * random(1, *basis.shape(rows, columns), seed=seed)
    kept = basis.project(size * free.sign() if extreme else free, radius)
    assert basis.change(kept, rows, columns).abs().max() <= radius * (1 + 1e-5)
    assert kept.any()
    torch.testing.assert_close(basis.project(kept, radius), kept, rtol=1e-4, atol=1e-6)


@every_basis
def test_what_is_within_the_budget_stays_and_each_photo_is_projected_by_itself(basis):
    free = random(3, *basis.shape(13, 22))
    inside = free / max(basis.change(free, 13, 22).abs().max(), free.abs().max()) * 0.05
    torch.testing.assert_close(basis.project(inside, 0.0501), inside)
    assert torch.equal(basis.project(torch.zeros_like(free), 1.0), torch.zeros_like(free))
    alone = torch.cat([basis.project(one[None], 0.02) for one in free])
    torch.testing.assert_close(basis.project(free, 0.02), alone)


@pytest.mark.parametrize("basis", [Coarse(), Coarse(3.0), Gaussian(), Gaussian(9.0)])
def test_a_free_variable_that_is_the_same_everywhere_is_the_change(basis):
    """The weights of each mean sum to 1, at the border, too; so the whole budget can be used."""
    free = torch.full((1, *basis.shape(17, 30)), 0.3)
    torch.testing.assert_close(basis.change(free, 17, 30), torch.full((1, 3, 17, 30), 0.3))


def test_half_resolution_is_an_enlargement():
    assert Coarse().shape(17, 30) == (3, 9, 15)
    free = random(1, 3, 9, 15)
    wanted = torch.nn.functional.interpolate(free, (17, 30), mode="bilinear")
    torch.testing.assert_close(Coarse().change(free, 17, 30), wanted, rtol=1e-4, atol=1e-5)


def test_a_point_becomes_a_gaussian():
    free = torch.zeros(1, 3, 31, 31)
    free[0, 1, 15, 15] = 1.0
    (change,) = Gaussian(2.0).change(free, 31, 31)
    assert not change[[0, 2]].any()
    places = torch.arange(31) - 15.0
    wanted = torch.exp(-(places[:, None] ** 2 + places**2) / (2 * 2.0**2)) / (2 * torch.pi * 2.0**2)
    torch.testing.assert_close(change[1], wanted, rtol=1e-2, atol=1e-6)


def transformed(block: np.ndarray) -> np.ndarray:
    """ITU-T T.81, A.3.3, as it stands there; rows and columns of the result are v and u."""
    found, places = np.zeros((8, 8)), np.arange(8)
    for v in range(8):
        for u in range(8):
            across, down = (np.cos((2 * places + 1) * k * np.pi / 16) * (0.5**0.5 if k == 0 else 1) for k in (u, v))
            found[v, u] = (block * down[:, None] * across).sum() / 4
    return found


def test_low_frequencies_are_those_of_jpegs_transform_and_luma_alone():
    basis = LowFrequencies(10)
    free = random(1, 10, 2, 3)
    (change,) = basis.change(free, 16, 24)
    assert torch.equal(change[0], change[1])
    assert torch.equal(change[0], change[2])
    found = transformed(change[0, :8, 8:16].numpy())
    lowest = in_order()[:10]
    for number, place in enumerate(lowest):
        assert found[place] == pytest.approx(free[0, number, 0, 1].item() * 8 / 10**0.5, abs=1e-5)
    assert abs(sum(found[p] ** 2 for p in lowest) - (found**2).sum()) < 1e-4
    pixels = np.clip(128 + change.permute(1, 2, 0).numpy() * 20, 0, 255).astype(np.uint8)
    colours = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    assert (colours[..., 1:] == 128).all()


def test_the_order_is_jpegs():
    """ITU-T T.81, figure A.6."""
    assert in_order()[:10] == [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]
    assert in_order()[-3:] == [(6, 7), (7, 6), (7, 7)]
    assert len(set(in_order())) == 64


def test_a_step_of_all_coefficients_is_as_large_as_one_of_all_pixels():
    """In the root mean square, which is what the scale is for."""
    for count in (1, 3, 10, 64):
        basis = LowFrequencies(count)
        step = basis.change(random(1, *basis.shape(32, 32)).sign(), 32, 32)
        assert step.square().mean().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Coarse(0.5), "factor is from 1 to 64"),
        (lambda: Gaussian(0.0), "sigma is"),
        (lambda: LowFrequencies(65), "coefficients is from 1 to 64"),
    ],
)
def test_impossible_bases_are_refused(make, named):
    with pytest.raises(InputError, match=named):
        make()
