"""What PGD climbs: one file for each kind of objective."""

from antidreambooth.attack.objectives.base import Objective
from antidreambooth.attack.objectives.denoising import Denoising, Evaluation
from antidreambooth.attack.objectives.encoder import EncoderAway, EncoderSpread, EncoderTarget
from antidreambooth.attack.objectives.ratio import LikelihoodRatio
from antidreambooth.attack.objectives.score import ScoreDistillation
from antidreambooth.attack.objectives.targeted import ACE, Targeted
from antidreambooth.attack.objectives.transformed import Transformed
from antidreambooth.attack.objectives.weighted import Term, Weighted

__all__ = [
    "ACE",
    "Denoising",
    "EncoderAway",
    "EncoderSpread",
    "EncoderTarget",
    "Evaluation",
    "LikelihoodRatio",
    "Objective",
    "ScoreDistillation",
    "Targeted",
    "Term",
    "Transformed",
    "Weighted",
]
