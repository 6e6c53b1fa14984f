"""JPEG in an attack: a smooth model of it, and the codec itself."""

from __future__ import annotations

import math
from functools import cache
from io import BytesIO

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from antidreambooth.attack.transforms.base import Transform
from antidreambooth.diffusion.precision import full_precision
from antidreambooth.diffusion.seeding import uniform
from antidreambooth.errors import require
from antidreambooth.finetuning.augmentation import jpeg
from antidreambooth.photos.resampling import enlarging

BLOCK = 8  # side of a block of coefficients
UNIT = 2 * BLOCK  # pixels that share a block of colour (4:2:0)
COLOURS = (  # JFIF 1.02: Y, Cb and Cr of R, G and B
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


class JPEG(Transform):
    """Compression with colour at half resolution (4:2:0), whose rounding of coefficients is smooth.

    Rounding is x -> round(x) + (x - round(x))^3 (Shin and Song, "JPEG-resistant adversarial images", 2017), so
    that gradients go through it; all else is the codec's own arithmetic. Pixels are not rounded to 8 bits.

    Args:
        lowest: least quality that is drawn for a picture, 1 to 100.
        highest: greatest quality.
    """

    def __init__(self, lowest: int = 60, highest: int = 95) -> None:
        require("lowest", lowest, 1, 100)
        require("highest", highest, lowest, 100)
        self.lowest, self.highest = lowest, highest

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n numbers"]:
        """One number in [0, 1) a picture."""
        return uniform((count, 1), generator)

    def quality(self, drawn: Float[Tensor, "n 1"]) -> Float[Tensor, " n"]:
        """The whole numbers from lowest to highest, with equal chance."""
        return (self.lowest + torch.floor(drawn[:, 0] * (self.highest - self.lowest + 1))).clamp(max=self.highest)

    def __call__(self, images: Float[Tensor, "n 3 h w"], drawn: Float[Tensor, "n numbers"]) -> Float[Tensor, "n 3 h w"]:
        """The pictures, nearly as the codec gives them back."""
        with full_precision(images.device):
            tables = _scaled(self.quality(drawn), _tables(images.device))
            return _compressed(images.float(), tables)


class JPEGCodec(JPEG):
    """The codec itself (Pillow's), whose gradient is taken for that of the identity.

    It runs on the CPU, so that a run with ``execution.recorded`` cannot have it.

    Args:
        lowest: least quality that is drawn for a picture, 1 to 100.
        highest: greatest quality.
    """

    def __call__(self, images: Float[Tensor, "n 3 h w"], drawn: Float[Tensor, "n numbers"]) -> Float[Tensor, "n 3 h w"]:
        """The pictures in 8 bits, as the codec gives them back."""
        pictures = ((images.detach() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        qualities = [int(quality) for quality in self.quality(drawn).tolist()]
        back = torch.stack([jpeg(one, quality) for one, quality in zip(pictures, qualities, strict=True)])
        return images + (back.to(images) / 127.5 - 1 - images).detach()


@cache
@torch.inference_mode(False)
def _tables(device: torch.device) -> Float[Tensor, "2 8 8"]:
    """The codec's steps for brightness and colour at quality 50, of which all others are multiples."""
    buffer = BytesIO()
    Image.new("RGB", (BLOCK, BLOCK)).save(buffer, "JPEG", quality=50)
    found = Image.open(buffer).quantization  # type: ignore[attr-defined]
    return torch.tensor([found[0], found[1]], device=device, dtype=torch.float32).view(2, BLOCK, BLOCK)


@cache
@torch.inference_mode(False)
def _colours(device: torch.device) -> tuple[Float[Tensor, "3 3"], Float[Tensor, "3 3"]]:
    """From red, green and blue to brightness and colour, and back; copied to a device once."""
    turn = torch.tensor(COLOURS, device="cpu", dtype=torch.float64)
    there, back = turn.float().to(device), torch.linalg.inv(turn).float().to(device)
    return there, back


def _scaled(quality: Float[Tensor, " n"], tables: Float[Tensor, "2 8 8"]) -> Float[Tensor, "n 2 8 8"]:
    """The steps at each picture's quality, by libjpeg's rule."""
    percent = torch.where(quality < 50, torch.floor(5000 / quality), 200 - 2 * quality)
    return torch.floor((tables * percent[:, None, None, None] + 50) / 100).clamp(1, 255)


def _compressed(images: Float[Tensor, "n 3 h w"], tables: Float[Tensor, "n 2 8 8"]) -> Float[Tensor, "n 3 h w"]:
    """Pictures through all steps of the codec."""
    height, width = images.shape[2:]
    whole = _filled(_filled((images + 1) * 127.5).mT).mT
    turn, back_again = _colours(images.device)
    luma, *chroma = (torch.einsum("cd,ndhw->nchw", turn, whole)).unbind(dim=1)
    parts = [_coded(luma - 128, tables[:, 0]) + 128, *(_colour(plane, tables[:, 1]) for plane in chroma)]
    back = torch.einsum("cd,ndhw->nchw", back_again, torch.stack(parts, dim=1))
    return (back[..., :height, :width].clamp(0, 255)) / 127.5 - 1


def _filled(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h W"]:
    """Rows that end in copies of their last pixel, up to a whole number of blocks."""
    lacking = -images.shape[3] % UNIT
    return torch.cat([images, images[..., -1:].expand(*images.shape[:3], lacking)], dim=3) if lacking else images


def _colour(plane: Float[Tensor, "n h w"], table: Float[Tensor, "n 8 8"]) -> Float[Tensor, "n h w"]:
    """A plane of colour: the mean of each two by two pixels, coded, enlarged as libjpeg does it (bilinear)."""
    height, width = plane.shape[1:]
    small = plane.reshape(-1, height // 2, 2, width // 2, 2).mean(dim=(2, 4))
    rows, columns = (enlarging(size // 2, size, plane.device) for size in (height, width))
    return rows @ _coded(small, table) @ columns.mT


def _coded(plane: Float[Tensor, "n h w"], table: Float[Tensor, "n 8 8"]) -> Float[Tensor, "n h w"]:
    """A plane around 0 after its coefficients have been rounded to multiples of the table's steps."""
    cosines, steps = _cosines(plane), table[:, None, None]
    rows, columns = (size // BLOCK for size in plane.shape[1:])
    blocks = plane.reshape(-1, rows, BLOCK, columns, BLOCK).transpose(2, 3)  # n rows columns 8 8
    coefficients = cosines @ blocks @ cosines.mT / steps
    whole = torch.round(coefficients).detach()
    rounded = whole + (coefficients - whole) ** 3
    back: Tensor = cosines.mT @ (rounded * steps) @ cosines
    return back.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _cosines(like: Tensor) -> Float[Tensor, "8 8"]:
    """The orthonormal discrete cosine transform of a block's side (DCT-II); a row for each frequency."""
    place = torch.arange(BLOCK, device=like.device, dtype=like.dtype)
    waves = torch.cos(math.pi / BLOCK * (place + 0.5) * place[:, None]) * math.sqrt(2 / BLOCK)
    return torch.cat([waves[:1] / math.sqrt(2), waves[1:]])
