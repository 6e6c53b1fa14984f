"""Where a change is seen and where not: a budget for each pixel, which is as visible on the whole as one for all."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import conv2d, pad

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
MOST = 4  # times the plain budget
HALVINGS = 24  # of the range in which the scale is looked for: to a part in 10^7 of it

# Weights of the pixels around one, whose mean is its background (Chou and Li, 1995).
BACKGROUND = [[1, 1, 1, 1, 1], [1, 2, 2, 2, 1], [1, 2, 0, 2, 1], [1, 2, 2, 2, 1], [1, 1, 1, 1, 1]]
# Differences in four directions; the other two are these, transposed and mirrored.
LEVEL = [[0, 0, 0, 0, 0], [1, 3, 8, 3, 1], [0, 0, 0, 0, 0], [-1, -3, -8, -3, -1], [0, 0, 0, 0, 0]]
OBLIQUE = [[0, 0, 1, 0, 0], [0, 8, 3, 0, 0], [1, 3, 0, -3, -1], [0, 0, -3, -8, 0], [0, 0, -1, 0, 0]]


def just_noticeable(luma: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """By how much a pixel may differ before it is noticed, in 8-bit steps: what the contrast around it hides.

    The spatial masking of C.-H. Chou and Y.-C. Li, A perceptually tuned subband image coder based on the measure of
    just-noticeable-distortion profile, IEEE Trans. Circuits and Systems for Video Technology 5(6), 1995, Section II:
    JND = max(f1, f2), where f1 = mg (0.0001 bg + 0.115) + 1/2 - 0.01 bg. bg is the weighted mean of the pixels around
    one, mg the largest of four weighted differences there.

    Of f2, which allows up to 20 steps in the dark, only its least value is taken, 3: at equal SSIM, noise that is put
    into dark parts has a larger LPIPS.

    Args:
        luma: from 0 to 255. At the border, its outermost pixels are repeated.
    """
    plane = luma.double()
    background = _filtered(plane, BACKGROUND) / 32
    level, oblique = (torch.tensor(kernel, device="cpu", dtype=torch.float64) for kernel in (LEVEL, OBLIQUE))
    kernels = [level, level.T, oblique, oblique.flip(1)]
    contrast = torch.stack([_filtered(plane, kernel).abs() / 16 for kernel in kernels]).amax(dim=0)
    return (contrast * (0.0001 * background + 0.115) + 0.5 - 0.01 * background).clamp(min=3)


class Visibility:
    """How visible noise in a picture is: 1 less the mean SSIM of the picture with it (Wang et al., 2004), as expected.

    Of noise of mean 0 that knows nothing of the picture, and has the standard deviation s where it is, SSIM's
    expectation is about (2 v + C) / (2 v + n + C) at each pixel: v the variance of the picture in the window around it,
    n the mean of s^2 there, C = (0.03 * 255)^2; means stay what they are. So nothing is drawn, and no network is asked.

    Args:
        picture: 3 h w, from 0 to 255.
    """

    def __init__(self, picture: UInt8[Tensor, "3 h w"]) -> None:
        channels = picture.double()
        self.twice = 2 * (_windowed(channels.square()) - _windowed(channels).square()).clamp(min=0)

    def __call__(self, bounds: Float[Tensor, "h w"]) -> float:
        """Of noise that uses the whole budget of each pixel, up or down; 0 where nothing changes, 1 at the most."""
        constant, power = (0.03 * 255) ** 2, _windowed(bounds.double().square()[None])
        return float((power / (self.twice + power + constant)).mean())


def visible_bounds(picture: UInt8[Tensor, "3 h w"], budget: float) -> Float[Tensor, "h w"]:
    """A budget for each pixel, more where less is seen, which is as visible as one budget for all pixels.

    Each is a multiple of what is just noticeable there, the same multiple everywhere, rounded down to whole 8-bit
    steps, and at most ``MOST`` times the plain budget. The multiple is the largest whose ``Visibility`` is at most that
    of the plain budget.

    Args:
        picture: 3 h w, as a trainer reads it.
        budget: of all pixels, in 8-bit steps; 12.7 allows 12.

    Returns:
        Whole 8-bit steps, from 0 to 255.
    """
    red, green, blue = (share * channel.double() for share, channel in zip(LUMA, picture, strict=True))
    noticeable, visibility, steps = just_noticeable(red + green + blue), Visibility(picture), math.floor(budget)

    def multiple(scale: float) -> Tensor:
        return (scale * noticeable).floor().clamp(max=min(255, MOST * steps))

    aim = visibility(torch.full_like(noticeable, steps)) * (1 + 1e-9)  # it rounds, too
    low, high = 0.0, 256 / float(noticeable.min())
    for _ in range(HALVINGS):
        scale = (low + high) / 2
        low, high = (scale, high) if visibility(multiple(scale)) <= aim else (low, scale)
    return multiple(low).float()


def _filtered(plane: Float[Tensor, "h w"], kernel: Tensor | list[list[int]]) -> Float[Tensor, "h w"]:
    """Each pixel's neighbourhood of 5 x 5, weighted."""
    weights = torch.as_tensor(kernel, device=plane.device, dtype=plane.dtype)
    return conv2d(pad(plane[None, None], (2, 2, 2, 2), "replicate"), weights[None, None])[0, 0]


def _windowed(channels: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
    """Means by SSIM's window, a Gaussian of standard deviation 1.5 in 11 x 11 pixels."""
    places = torch.arange(-5, 6, device=channels.device, dtype=channels.dtype)
    weights = torch.exp(-(places**2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    padded = pad(channels[:, None], (5, 5, 5, 5), "replicate")
    return conv2d(conv2d(padded, weights[None, None, None, :]), weights[None, None, :, None])[:, 0]
