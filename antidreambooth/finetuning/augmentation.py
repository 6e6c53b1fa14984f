"""What an attacker's own pipeline does to photos before training on them."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from antidreambooth.diffusion.seeding import uniform
from antidreambooth.errors import require


@dataclass(frozen=True)
class Augmentation:
    """Random changes of each photo in each step; none by default, and then latents are computed once.

    Args:
        crop: smallest share of a side that a random square crop keeps (scaled back to full size); 1 switches it off.
        flip: whether a photo is mirrored with even chance.
        jpeg: quality (1 to 100) at which photos are compressed before anything else; off when not given.
    """

    crop: float = 1.0
    flip: bool = False
    jpeg: int | None = None

    def __post_init__(self) -> None:
        require("crop", self.crop, above=0, most=1)
        require("jpeg", self.jpeg, 1, 100)

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self.crop < 1 or self.flip or self.jpeg is not None

    def __call__(self, pictures: UInt8[Tensor, "n 3 h w"], generator: torch.Generator) -> UInt8[Tensor, "n 3 h w"]:
        """Changed pictures of the same size; the generator's draws decide how."""
        return torch.stack([self._one(picture, generator) for picture in pictures])

    def _one(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        scale, top, left, mirror = uniform((4,), generator).tolist()
        height, width = picture.shape[1:]
        if self.jpeg is not None:
            picture = jpeg(picture, self.jpeg)
        if self.crop < 1:
            share = self.crop + (1 - self.crop) * scale
            h, w = max(1, round(share * height)), max(1, round(share * width))
            corner = (round(top * (height - h)), round(left * (width - w)))
            picture = F.resized_crop(picture, *corner, h, w, [height, width], antialias=True)
        return picture.flip(-1) if self.flip and mirror < 0.5 else picture


def jpeg(picture: UInt8[Tensor, "3 h w"], quality: int) -> UInt8[Tensor, "3 h w"]:
    """The picture after JPEG compression (4:2:0, as cameras and social networks do)."""
    buffer = BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).to(picture.device)
