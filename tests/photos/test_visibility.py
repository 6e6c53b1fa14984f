"""A budget for each pixel: where contrast hides a change, and as visible on the whole as a plain one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from antidreambooth.evaluation.quality import ssim
from antidreambooth.photos.visibility import MOST, Visibility, just_noticeable, visible_bounds
from tests.conftest import ROOT


def portrait(side: int = 128) -> torch.Tensor:
    with Image.open(sorted((ROOT / "examples" / "photos").glob("*.jpg"))[0]) as image:
        return torch.from_numpy(np.array(image.convert("RGB").resize((side, side)))).permute(2, 0, 1)


def test_flat_parts_hide_least_and_contrast_hides_by_the_formula():
    plane = torch.full((20, 20), 80.0)
    assert torch.equal(just_noticeable(plane), torch.full((20, 20), 3.0, dtype=torch.float64))
    plane[:, 10:] = 180.0
    found = just_noticeable(plane)
    weights = np.array([[1, 1, 1, 1, 1], [1, 2, 2, 2, 1], [1, 2, 0, 2, 1], [1, 2, 2, 2, 1], [1, 1, 1, 1, 1]])
    background = (weights * plane[3:8, 8:13].numpy()).sum() / 32
    level = np.array([1, 3, 8, 3, 1])
    contrast = abs((level[:, None] * np.array([0, 1, 0, -1, 0]) * plane[3:8, 8:13].numpy()).sum()) / 16
    assert contrast == 100
    wanted = contrast * (0.0001 * background + 0.115) + 0.5 - 0.01 * background
    assert found[5, 10].item() == pytest.approx(wanted)
    assert found[:, :7].max() == 3


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_no_direction_counts_for_more(turn):
    plane = portrait(40)[0].double()
    assert torch.allclose(just_noticeable(plane.rot90(turn)), just_noticeable(plane).rot90(turn))


def test_visibility_is_the_ssim_that_is_measured():
    """Of random signs, which the formula says without drawing any."""
    picture = portrait()
    signs = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0)).sign()
    middle = (picture.float() * 0.8 + 25).round().to(torch.uint8)  # so that nothing is clipped
    for bounds in (torch.full((128, 128), 8.0), torch.full((128, 128), 2.0), visible_bounds(middle, 8.0)):
        noisy = (middle.float() + signs * bounds).to(torch.uint8)
        assert 1 - Visibility(middle)(bounds) == pytest.approx(ssim(middle[None], noisy[None]).item(), abs=0.01)


@given(
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["noise", "smooth", "flat", "halves"]),
    budget=st.one_of(st.sampled_from([1.0, 255.0]), st.floats(1, 255)),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
)
@settings(max_examples=30)
def test_budgets_are_whole_bounded_and_no_more_visible_than_the_plain_one(seed, kind, budget, height, width):
    generator = torch.Generator().manual_seed(seed)
    picture = {
        "noise": torch.randint(0, 256, (3, height, width), generator=generator),
        "smooth": (torch.arange(width) * 4 + seed % 100).expand(3, height, width).clamp(max=255),
        "flat": torch.full((3, height, width), seed % 256),
        "halves": 255 * (torch.arange(width) > width // 2).expand(3, height, width).int(),
    }[kind].to(torch.uint8)
    bounds, plain = visible_bounds(picture, budget), int(budget)
    assert torch.equal(bounds, bounds.round())
    assert bounds.min() >= 0
    assert bounds.max() <= min(255, MOST * plain)
    visibility = Visibility(picture)
    assert visibility(bounds) <= visibility(torch.full((height, width), float(plain))) * (1 + 1e-6)
    if kind == "flat":
        assert torch.equal(bounds, torch.full((height, width), float(plain)))


def test_a_portrait_gets_more_where_it_is_rough_and_about_as_visible_a_change():
    picture = portrait()
    bounds, visibility = visible_bounds(picture, 8.0), Visibility(picture)
    rough = just_noticeable(picture.float().mean(dim=0)) > 6
    assert bounds[rough].mean() > 8 > bounds[~rough].mean()
    flat = visibility(torch.full((128, 128), 8.0))
    assert 0.8 * flat < visibility(bounds) <= flat
    assert torch.equal(bounds, visible_bounds(picture, 8.7))  # as a plain one allows 8
