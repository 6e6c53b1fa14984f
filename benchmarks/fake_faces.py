"""A face model without weights, for machines that have none: a test stage runs, and its figures mean nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from antidreambooth.evaluation.faces import Face, FaceModel


class FakeFaces(FaceModel):
    """Every picture is a face; its embedding are its mean colours.

    As dlib's code does, it resizes 8-bit pictures and hands them to numpy, neither of which works on a GPU.
    """

    name = "fake"
    threshold = 30.0
    dimensions = 3

    def faces(self, image: UInt8[Tensor, "3 h w"]) -> list[Face]:
        """The whole picture."""
        F.interpolate(image[None], (16, 16), mode="bilinear", antialias=True).numpy()
        return [Face((0.0, 0.0, float(image.shape[2]), float(image.shape[1])), torch.zeros(5, 2))]

    def align(self, image: UInt8[Tensor, "3 h w"], face: Face) -> UInt8[Tensor, "3 h w"]:
        """The picture as it is."""
        return image

    def embed_aligned(self, faces: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3"]:
        """Mean colours, less the middle of their range."""
        return torch.from_numpy(faces.numpy().mean((2, 3), dtype="float32")) - 128

    def distance(self, a: Float[Tensor, "n 3"], b: Float[Tensor, "m 3"]) -> Float[Tensor, "n m"]:
        """Euclidean."""
        return torch.cdist(a, b)
