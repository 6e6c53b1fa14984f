"""PSNR, SSIM and the largest difference, against scikit-image's definitions."""

import math

import pytest
import torch

from antidreambooth.evaluation.quality import cloak_quality
from tests.conftest import random_images


def test_figures_of_a_known_change():
    original = random_images(1, 32)[0].clamp(10, 240)
    cloaked = original.clone()
    cloaked[:, ::2] += 4
    cloaked[0, 0, 0] -= 11
    quality = cloak_quality(original, cloaked)
    error = (cloaked.double() - original.double()).square().mean().item()
    assert quality["psnr"] == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    assert quality["largest_difference"] == 7
    assert 0.9 < quality["ssim"] < 1


def test_equal_pictures_have_no_finite_psnr():
    original = random_images(1, 32)[0]
    assert cloak_quality(original, original.clone()) == {"psnr": None, "ssim": 1.0, "largest_difference": 0}


def test_more_noise_is_worse():
    original = random_images(1, 32)[0].clamp(20, 235)
    figures = [cloak_quality(original, original + torch.tensor(k, dtype=torch.uint8)) for k in (2, 8)]
    assert figures[0]["psnr"] > figures[1]["psnr"]
