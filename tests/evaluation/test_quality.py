"""PSNR, SSIM and the largest difference, against their definitions."""

import math

import pytest
import torch
from torch.nn import functional as F

from antidreambooth.evaluation.quality import cloak_quality
from tests.conftest import random_images


def by_definition(one, other):
    """SSIM (IEEE TIP 13 (4), 2004, equation 13) with its Gaussian window, pictures mirrored at their borders."""
    line = torch.exp(-0.5 * (torch.arange(-5.0, 6.0, dtype=torch.float64) / 1.5).square())
    window = torch.outer(line, line) / line.sum() ** 2
    values = []
    for x, y in zip(*(F.pad(picture.double(), (5, 5, 5, 5), mode="reflect") for picture in (one, other)), strict=True):
        x, y = (picture.unfold(0, 11, 1).unfold(1, 11, 1) for picture in (x, y))
        mean = lambda v: (v * window).sum((-1, -2))  # noqa: E731
        mx, my = mean(x), mean(y)
        vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return torch.stack(values).mean().item()


def test_figures_of_a_known_change():
    original = random_images(1, 32)[0] // 16 + 100  # of so little contrast that SSIM's constants count
    cloaked = original.clone()
    cloaked[:, ::2] += 4
    cloaked[0, 0, 0] -= 11
    quality = cloak_quality(original, cloaked)
    error = (cloaked.double() - original.double()).square().mean().item()
    assert quality["psnr"] == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    assert quality["largest_difference"] == 7
    assert quality["ssim"] == pytest.approx(by_definition(original, cloaked), abs=1e-4)
    assert quality["ssim"] < 1


def test_equal_pictures_have_no_finite_psnr():
    original = random_images(1, 32)[0]
    assert cloak_quality(original, original.clone()) == {"psnr": None, "ssim": 1.0, "largest_difference": 0}


def test_more_noise_is_worse():
    original = random_images(1, 32)[0].clamp(20, 235)
    less, more = (cloak_quality(original, original + torch.tensor(k, dtype=torch.uint8)) for k in (2, 8))
    assert less["psnr"] is not None
    assert more["psnr"] is not None
    assert less["psnr"] > more["psnr"]
    assert less["ssim"] > more["ssim"]


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (100, 4000), (700, 500)])
def test_photos_of_any_size_have_a_quality(size):
    width, height = size
    original = torch.randint(0, 200, (3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    quality = cloak_quality(original, original + 4)
    assert quality["psnr"] == pytest.approx(20 * math.log10(255 / 4), abs=1e-3)
    assert quality["largest_difference"] == 4
    assert 0.5 < quality["ssim"] <= 1
