"""How much a cloak changes a picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights
from torchvision.transforms.v2.functional import resize

from antidreambooth.diffusion.precision import made_on_cpu
from antidreambooth.errors import InputError
from antidreambooth.evaluation.per_image import PerImage
from antidreambooth.photos.decoding import to_float

LPIPS_MISSING = (
    f"LPIPS is left out: it needs {AlexNet_Weights.IMAGENET1K_V1.url} in torch's cache "
    "(python -c 'import torchvision; torchvision.models.alexnet(weights=\"DEFAULT\")' puts it there)"
)


SCREEN = 512  # pixels of the longer side at which SSIM is taken
WINDOW = 11  # pixels of SSIM's window (Wang et al., 2004)
ROWS = 256  # of a photo that are looked at together


class CloakQuality(TypedDict):
    """Figures of one cloaked picture against its original."""

    psnr: float | None
    ssim: float
    largest_difference: int


def cloak_quality(original: UInt8[Tensor, "3 h w"], cloaked: UInt8[Tensor, "3 h w"]) -> CloakQuality:
    """PSNR in dB (higher is closer; None for equal pictures), SSIM (1 is equal), largest difference in 8-bit steps.

    Of a photo whose longer side has more than ``SCREEN`` pixels, SSIM is that of the photo scaled down to so many: what
    is seen on a screen, in a bounded amount of memory. A side of fewer than ``WINDOW`` pixels is enlarged to so many.
    """
    squares, largest = 0, 0
    for before, after in zip(torch.split(original, ROWS, 1), torch.split(cloaked, ROWS, 1), strict=True):
        difference = after.int() - before.int()
        squares += int(difference.square().sum())
        largest = max(largest, int(difference.abs().max()))
    ratio = min(1.0, SCREEN / max(original.shape[1:]))
    size = [max(WINDOW, round(side * ratio)) for side in original.shape[1:]]
    scaled = (resize(one[None], size, antialias=True) for one in (original, cloaked))  # nothing where it has that size
    return {
        "psnr": round(10 * math.log10(255**2 * original.numel() / squares), 3) if squares else None,
        "ssim": round(float(ssim(*scaled)), 5),
        "largest_difference": largest,
    }


@made_on_cpu()  # torchmetrics makes tensors where the default is
def psnr(original: UInt8[Tensor, "n 3 h w"], cloaked: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Peak signal to noise in dB, higher is closer; NaN for equal pictures."""
    ratio = peak_signal_noise_ratio(
        cloaked.double(), original.double(), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    return ratio.where(ratio.isfinite(), torch.nan)


@made_on_cpu()
def ssim(original: UInt8[Tensor, "n 3 h w"], cloaked: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Structural similarity, at most 1, which is equal."""
    found = structural_similarity_index_measure(cloaked.double(), original.double(), data_range=255.0, reduction="none")
    assert isinstance(found, Tensor)
    return found


def largest_difference(original: UInt8[Tensor, "n 3 h w"], cloaked: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Of any colour of any pixel, in 8-bit steps."""
    return (cloaked.double() - original.double()).abs().amax((1, 2, 3))


@made_on_cpu()
def lpips(original: UInt8[Tensor, "n 3 h w"], cloaked: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Distance in AlexNet's features (arXiv:1801.03924), 0 is equal.

    Raises:
        InputError: Not ``lpips_available()``.
    """
    network = _lpips().to(original.device)
    found: Tensor = network(to_float(cloaked), to_float(original))
    return found.flatten()


def lpips_available() -> bool:
    """Whether the weights lie in torch's cache: nothing is downloaded here. If not, see ``LPIPS_MISSING``."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.IMAGENET1K_V1.url).name).is_file()


class CloakMeasure(PerImage):
    """A measure of cloaked pictures against their originals."""

    of: ClassVar[Callable[..., Tensor]]

    def update(self, original: UInt8[Tensor, "n 3 h w"], cloaked: UInt8[Tensor, "n 3 h w"]) -> None:
        """8-bit pictures, pair by pair."""
        self.add(self.of(original, cloaked).float())


class PSNR(CloakMeasure):
    """See ``psnr``."""

    name, higher_is_better, of = "psnr", True, staticmethod(psnr)


class SSIM(CloakMeasure):
    """See ``ssim``."""

    name, higher_is_better, of = "ssim", True, staticmethod(ssim)


class LargestDifference(CloakMeasure):
    """See ``largest_difference``; the mean over pictures of each one's largest."""

    name, higher_is_better, of = "largest_difference", False, staticmethod(largest_difference)


class LPIPS(CloakMeasure):
    """See ``lpips``."""

    name, higher_is_better, of = "lpips", False, staticmethod(lpips)


@cache
def _lpips() -> Any:
    if not lpips_available():
        raise InputError(LPIPS_MISSING)
    return LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="none").net
