"""Random image transforms that an attack sees photos through: expectation over transforms (arXiv:1707.07397)."""

from antidreambooth.attack.transforms.base import Chain, Transform
from antidreambooth.attack.transforms.geometry import Blur, Crop, Flip, Rescale
from antidreambooth.attack.transforms.jpeg import JPEG, JPEGCodec

# A class name on the command line resolves to what is imported, so each transform stands here.
__all__ = ["JPEG", "Blur", "Chain", "Crop", "Flip", "JPEGCodec", "Rescale", "Transform"]
