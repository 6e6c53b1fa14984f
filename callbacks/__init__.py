"""They observe and write; they never steer."""

from callbacks.cloaked_photos import CloakedPhotos
from callbacks.likeness import Likeness
from callbacks.progress_file import ProgressFile
from callbacks.round_progress import RoundProgress
from callbacks.sample_grid import SampleGrid
from callbacks.trained_model import TrainedModel

__all__ = ["CloakedPhotos", "Likeness", "ProgressFile", "RoundProgress", "SampleGrid", "TrainedModel"]
