"""How much a cloak changes a picture."""

from __future__ import annotations

import math
from typing import TypedDict

from jaxtyping import UInt8
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


class CloakQuality(TypedDict):
    """Figures of one cloaked picture against its original."""

    psnr: float | None
    ssim: float
    largest_difference: int


def cloak_quality(original: UInt8[Tensor, "3 h w"], cloaked: UInt8[Tensor, "3 h w"]) -> CloakQuality:
    """PSNR in dB (higher is closer; None for equal pictures), SSIM (1 is equal), largest difference in 8-bit steps."""
    before, after = original[None].double(), cloaked[None].double()
    psnr = float(peak_signal_noise_ratio(after, before, data_range=255.0))
    ssim = structural_similarity_index_measure(after, before, data_range=255.0)
    assert isinstance(ssim, Tensor)
    return {
        "psnr": round(psnr, 3) if math.isfinite(psnr) else None,
        "ssim": round(float(ssim), 5),
        "largest_difference": int((after - before).abs().max()),
    }
