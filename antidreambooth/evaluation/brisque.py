"""BRISQUE, a no-reference image quality (Mittal, Moorthy and Bovik, IEEE TIP 21 (12), 2012): higher is worse.

The features follow the authors' C++ release, by which the model was trained that the package ``brisque`` ships. Of that
package only the two model files are read: importing it needs OpenCV, and its libsvm fails with NumPy 2.4.
"""

from __future__ import annotations

import pickle
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, UInt8
from torch import Tensor

from antidreambooth.errors import InputError

BRISQUE_MISSING = "BRISQUE is left out: it needs the model of the package brisque (pip install --no-deps brisque)"


class _Model(NamedTuple):
    """Support vector regression with a Gaussian kernel, as LIBSVM writes it."""

    lowest: Float64[Tensor, " 36"]  # of each feature; scaled so that lowest and highest become -1 and 1
    highest: Float64[Tensor, " 36"]
    gamma: float
    rho: float
    weights: Float64[Tensor, " k"]
    vectors: Float64[Tensor, "k 36"]


def brisque_available() -> bool:
    """Whether the package ``brisque`` is installed; if not, see ``BRISQUE_MISSING``."""
    return find_spec("brisque") is not None


@torch.no_grad()
def brisque(images: UInt8[Tensor, "n 3 h w"]) -> Float64[Tensor, " n"]:
    """About 0 (good) to 100 (bad); NaN for a picture without texture.

    Raises:
        InputError: The package ``brisque`` is not installed.
    """
    model = _model()
    found = features(images).to(model.lowest)
    scaled = 2 * (found - model.lowest) / (model.highest - model.lowest) - 1
    kernel = torch.exp(-model.gamma * (scaled[:, None] - model.vectors).square().sum(-1))
    return kernel @ model.weights - model.rho


def features(images: UInt8[Tensor, "n 3 h w"]) -> Float64[Tensor, "n 36"]:
    """Eighteen statistics of the luminance, and the same at half the size."""
    luminance = torch.tensor((0.299, 0.587, 0.114), dtype=torch.float64, device=images.device)
    grey = torch.einsum("nchw,c->nhw", images.double(), luminance)[:, None]
    half = F.interpolate(grey, scale_factor=0.5, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    return torch.cat([_statistics(_normalised(scale)) for scale in (grey, half)], dim=1)


def _normalised(grey: Float64[Tensor, "n 1 h w"]) -> Float64[Tensor, "n h w"]:
    """Equation 1: minus the local mean, over the local standard deviation plus 1 (Gaussian window of 7 pixels)."""
    line = torch.exp(-0.5 * (torch.arange(-3.0, 4.0, dtype=grey.dtype, device=grey.device) / (7 / 6)).square())
    row = (line / line.sum())[None, None, None]

    def blurred(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(F.pad(image, (3, 3, 3, 3), mode="reflect"), row), row.mT)

    mean = blurred(grey)
    deviation = (blurred(grey.square()) - mean.square()).abs().sqrt()
    return ((grey - mean) / (deviation + 1))[:, 0]


def _statistics(pixels: Float64[Tensor, "n h w"]) -> Float64[Tensor, "n 18"]:
    """Shape and variance of the values; shape, mean and both variances of products of neighbours (Section III.A)."""
    shape, left, right = _fitted(pixels)
    columns = [shape, (left.square() + right.square()) / 2]
    for down, aside in ((0, 1), (1, 0), (1, 1), (1, -1)):
        height, width = pixels.shape[1] - down, pixels.shape[2] - abs(aside)
        first = pixels[:, :height, max(0, -aside) :][:, :, :width]
        second = pixels[:, down:, max(0, aside) :][:, :, :width]
        shape, left, right = _fitted(first * second)
        scale = torch.exp((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2)
        mean = (right - left) * scale * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
        columns += [shape, mean, left.square(), right.square()]
    return torch.stack(columns, dim=1)


def _fitted(values: Float64[Tensor, "n h w"]) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, left and right deviation of the asymmetric generalised Gaussian, by moments (Lasmar et al., ICIP 2009)."""
    values = values.flatten(1)
    square = values.square()
    left, right = (_root_mean(square, side) for side in (values < 0, values > 0))
    ratio = left / right
    spread = values.abs().mean(1).square() / square.mean(1)
    wanted = spread * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()
    shapes = torch.arange(0.2, 10, 0.001, dtype=values.dtype, device=values.device)
    known = torch.exp(2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes))  # ascending
    index = torch.searchsorted(known, wanted.contiguous()).clamp(max=len(shapes) - 1)
    return torch.where(wanted.isnan(), torch.nan, shapes[index]), left, right


def _root_mean(square: Float64[Tensor, "n p"], where: Tensor) -> Float64[Tensor, " n"]:
    return ((square * where).sum(1) / where.sum(1)).sqrt()


class _Numbers(pickle.Unpickler):
    """Reads lists of numbers; a pickle that names anything that could be run is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Finds nothing."""
        raise pickle.UnpicklingError(f"only numbers are expected, got {module}.{name}")


@cache
def _model() -> _Model:
    package = find_spec("brisque")
    if package is None or package.origin is None:
        raise InputError(BRISQUE_MISSING)
    folder = Path(package.origin).parent / "models"
    ranges = _Numbers(BytesIO((folder / "normalize.pickle").read_bytes())).load()
    header, _, body = (folder / "svm.txt").read_text(encoding="ascii").partition("\nSV\n")
    settings = dict(line.split(" ", 1) for line in header.splitlines())
    rows = np.array([[float(cell.rpartition(":")[2]) for cell in line.split()] for line in body.splitlines()])
    vectors = torch.from_numpy(rows)
    lowest, highest = (torch.tensor(ranges[key], dtype=torch.float64, device="cpu") for key in ("min_", "max_"))
    gamma, rho = float(settings["gamma"]), float(settings["rho"])
    return _Model(lowest, highest, gamma, rho, vectors[:, 0], vectors[:, 1:])
