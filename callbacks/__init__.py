"""They observe and write; they never steer."""

from callbacks.cloaked_photos import CloakedPhotos
from callbacks.round_progress import RoundProgress
from callbacks.sample_grid import SampleGrid

__all__ = ["CloakedPhotos", "RoundProgress", "SampleGrid"]
