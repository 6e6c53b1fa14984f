"""A face model for pictures of 16 pixels, given on the command lines of a verdict's victims."""

import os
import signal
from pathlib import Path

import torch

from antidreambooth.evaluation.faces import Face, FaceModel


class FakeFaces(FaceModel):
    """Every picture is a face, and its mean colour whose it is.

    Where $KILLED_AFTER names a file, it is removed and the process killed once as many cells are finished as it says.
    """

    name = "fake"
    threshold = 0.1
    dimensions = 3

    def faces(self, image):
        if (order := os.environ.get("KILLED_AFTER")) and Path(order).is_file():
            wanted = int(Path(order).read_text())
            if len(list(Path(order).parent.glob("*/cells/*/cell.json"))) >= wanted:
                Path(order).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return [Face((0.0, 0.0, float(image.shape[2]), float(image.shape[1])), torch.zeros(5, 2))]

    def align(self, image, face):
        return image

    def embed_aligned(self, faces):
        return faces.float().mean((2, 3)) / 255

    def distance(self, a, b):
        return torch.cdist(a, b)
