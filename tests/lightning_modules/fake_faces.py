"""A face model for the tests of the victim: the small model draws no faces that a real one would find."""

import torch

from antidreambooth.evaluation.faces import Face, FaceModel


class FakeFaces(FaceModel):
    """A face is in every picture that is brighter than ``darkest``; its embedding are its mean colours.

    Args:
        darkest: in 8-bit levels; 256 finds no face anywhere.
    """

    name = "fake"
    threshold = 30.0
    dimensions = 3

    def __init__(self, darkest: int = 0) -> None:
        self.darkest = darkest

    def faces(self, image):
        side = float(image.shape[-1])
        return [Face((0.0, 0.0, side, side), torch.zeros(5, 2))] if image.float().mean() >= self.darkest else []

    def align(self, image, face):
        return image

    def embed_aligned(self, faces):
        return faces.float().mean(dim=(2, 3)) - 128

    def distance(self, a, b):
        return torch.cdist(a, b)
