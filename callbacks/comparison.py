"""One picture that shows what a cloak did to each photo."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MARGIN, HEADER = 4, 16


def comparison(originals: list[Tensor], cloaked: list[Tensor], budget: int) -> Tensor:
    """A row for each photo: original, cloaked, difference (grey is none, black and white are the budget).

    Args:
        originals: 8-bit pictures, each 3 h w, all of one size.
        cloaked: the same pictures after cloaking.
        budget: largest difference, in 8-bit steps.

    Returns:
        One 8-bit picture, 3 H W.
    """
    gain = max(1, 127 // budget)
    rows = []
    for before, after in zip(originals, cloaked, strict=True):
        difference = ((after.int() - before.int()) * gain + 128).clamp(0, 255).to(torch.uint8)
        rows.append([before, after, difference])
    height, width = originals[0].shape[1:]
    canvas = Image.new("RGB", (3 * (width + MARGIN) + MARGIN, len(rows) * (height + MARGIN) + HEADER), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(("original", "cloaked", f"difference x {gain}")):
        draw.text((MARGIN + column * (width + MARGIN), 2), title, fill="black")
        for row, pictures in enumerate(rows):
            tile = Image.fromarray(pictures[column].permute(1, 2, 0).numpy())
            canvas.paste(tile, (MARGIN + column * (width + MARGIN), HEADER + row * (height + MARGIN)))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
