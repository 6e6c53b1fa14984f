"""One picture that shows what happened to each photo."""

from __future__ import annotations

from collections.abc import Sequence

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
    return sheet(("original", "cloaked", f"difference x {gain}"), rows)


def sheet(titles: Sequence[str], rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Pictures in rows under titles.

    Args:
        titles: one for each column.
        rows: 8-bit pictures, each 3 h w, all of one size.

    Returns:
        One 8-bit picture, 3 H W.
    """
    height, width = rows[0][0].shape[1:]
    size = (len(titles) * (width + MARGIN) + MARGIN, len(rows) * (height + MARGIN) + HEADER)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((MARGIN + column * (width + MARGIN), 2), title, fill="black")
        for row, pictures in enumerate(rows):
            tile = Image.fromarray(pictures[column].permute(1, 2, 0).numpy())
            canvas.paste(tile, (MARGIN + column * (width + MARGIN), HEADER + row * (height + MARGIN)))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
