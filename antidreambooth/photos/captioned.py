"""Many small pictures with captions: what a base model is trained on."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from antidreambooth.errors import InputError

FILES = ("pictures.npy", "captions.json")


class Pictures:
    """All pictures, left on the disk until they are asked for, and their captions.

    Args:
        pixels: n side side 3 in 8 bits, mapped into memory.
        captions: one for each picture.
    """

    def __init__(self, pixels: NDArray[np.uint8], captions: list[str]) -> None:
        self.pixels, self.captions = pixels, captions

    def __len__(self) -> int:
        """How many."""
        return len(self.captions)

    @property
    def side(self) -> int:
        """Of each picture, in pixels."""
        return int(self.pixels.shape[1])

    @cached_property
    def sha256(self) -> str:
        """Of all pixels; takes seconds for gigabytes."""
        return hashlib.sha256(np.ascontiguousarray(self.pixels).data).hexdigest()

    def rows(self, start: int, end: int) -> UInt8[Tensor, "n 3 h w"]:
        """Some of them."""
        return torch.from_numpy(np.array(self.pixels[start:end])).permute(0, 3, 1, 2)


def read_pictures(folder: Path) -> Pictures:
    """``pictures.npy`` (n side side 3, uint8) and ``captions.json`` (n strings) of a folder.

    Raises:
        InputError: one is missing, or they are something else.
    """
    array, texts = (folder.expanduser() / name for name in FILES)
    try:
        pixels = np.load(array, mmap_mode="r", allow_pickle=False)
        captions = json.loads(texts.read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError) as error:  # EOFError: numpy's, for an empty file
        lost = next((file for file in (array, texts) if not file.is_file()), folder)
        raise InputError(
            f"{lost} cannot be read: the folder must hold pictures.npy (n side side 3, uint8) and captions.json "
            "(n strings)"
        ) from error
    n, *shape = pixels.shape or (0,)
    if pixels.dtype != np.uint8 or len(shape) != 3 or shape[0] != shape[1] or shape[2] != 3:
        raise InputError(f"{array} holds {pixels.dtype} of shape {pixels.shape}, not uint8 of n side side 3")
    texts_only = isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
    if not n or not texts_only or len(captions) != n:
        raise InputError(f"{array} holds {n} pictures, {texts} does not hold as many captions")
    return Pictures(pixels, captions)
