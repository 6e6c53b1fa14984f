"""Resizing as matrices: against Pillow and torch, which do it pixel by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from antidreambooth.photos.resampling import along, enlarging, grid_size, seeing, viewing

CPU = torch.device("cpu")


@given(grid=st.integers(1, 40), more=st.integers(0, 100))
@settings(max_examples=60)
def test_enlarging_is_torchs_bilinear_interpolation(grid, more):
    values = torch.rand(1, 1, grid, generator=torch.Generator().manual_seed(grid))
    wanted = interpolate(values, grid + more, mode="linear")
    torch.testing.assert_close(enlarging(grid, grid + more, CPU) @ values[0, 0], wanted[0, 0], atol=2e-5, rtol=0)


@given(data=st.data(), width=st.integers(2, 90), height=st.integers(2, 90), side=st.integers(1, 40))
@settings(max_examples=60)
def test_viewing_is_pillows_antialiased_bilinear_resize_of_a_box(data, width, height, side):
    length = data.draw(st.floats(1, min(width, height)))
    left, top = data.draw(st.floats(0, width - length)), data.draw(st.floats(0, height - length))
    pixels = np.random.default_rng(side).random((height, width), np.float32)
    box = (left, top, left + length, top + length)
    wanted = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR, box)
    rows, columns = viewing(height, top, length, side, CPU), viewing(width, left, length, side, CPU)
    np.testing.assert_allclose(rows.numpy() @ pixels @ columns.numpy().T, np.array(wanted), atol=2e-4)


@pytest.mark.parametrize(
    ("grid", "full", "start", "length", "side"),
    [(256, 3000, 0.0, 3000.0, 128), (341, 4000, 500.0, 3000.0, 128), (256, 3000, 800.0, 700.0, 128)],
)
def test_a_long_side_is_stood_for_by_a_shorter_one(grid, full, start, length, side):
    exact = viewing(full, start, length, side, CPU) @ enlarging(grid, full, CPU)
    quick = seeing(grid, full, start, length, side, CPU)
    assert (quick - exact).norm() < 0.01 * exact.norm()
    torch.testing.assert_close(quick.sum(dim=1), torch.ones(side), atol=1e-4, rtol=0)


def test_the_photo_is_seen_where_its_change_is():
    """A bright row of the grid is in the same place of the square, whether it is in the photo or in the change."""
    change, photo = along(64, 640, 100.0, 400.0, 32, CPU)
    middles = (torch.arange(64) + 0.5) * 10
    for matrix in (change, photo):
        seen_at = (matrix @ middles - 100) / (400 / 32)
        torch.testing.assert_close(seen_at, torch.arange(32) + 0.5, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("size", "points", "grid"),
    [
        ((4000, 3000), 1024, (1366, 1024)),
        ((3000, 4000), 1024, (1024, 1366)),
        ((600, 600), 1024, (600, 600)),
        ((1, 1), 1024, (1, 1)),
        ((20000, 100), 256, (400, 100)),  # a panorama's grid is coarser along it
        ((9000, 3000), 256, (768, 256)),
    ],
)
def test_a_grid_has_the_photos_shape_and_never_more_points_than_pixels(size, points, grid):
    assert grid_size(size, points) == grid
