"""Objectives of the autoencoder's encoder alone: no denoiser, no prompt, no noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.objectives.base import Objective
from antidreambooth.attack.targets import Goal
from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior, squared_distance
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.layout import family_of
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError, require


def log_variance(posterior: Posterior) -> Float[Tensor, "n c h w"]:
    """The logarithm of a posterior's variance, which must not be 0."""
    return 2 * posterior.std.log()


class Encoder(Objective):
    """What the encoder makes of a photo.

    Attributes:
        spread: whether it looks at the posterior's variance, which some autoencoders (Sana's) do not have.
    """

    spread = False

    @property
    def encoder_only(self) -> bool:
        """Yes."""
        return True

    def require_possible(self, source: Source) -> None:
        """Refuses an autoencoder without a spread where that is looked at.

        Raises:
            InputError: it has none.
        """
        kind = family_of(source)
        if self.spread and not kind.spread:
            raise InputError(
                f"{type(self).__name__} looks at the variance of latents, and the autoencoder of {kind.family} gives "
                "them none: set log_variance to 0 where there is such a setting, or use EncoderTarget"
            )

    def draw(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Draw:
        """Nothing is random."""
        return Draw.nothing(len(images), images.device)


class EncoderAway(Encoder):
    """|| mean - mean_clean ||^2 + || log var - log var_clean ||^2: away from what the encoder makes of the clean photo.

    PID (arXiv:2406.15305, ICML 2024), its loss of both with a logarithm: whatever prompt an attacker trains with, the
    latents are of another picture. On a photo without any change it has no gradient: start at random.

    Args:
        mean: weight of the first term.
        log_variance: weight of the second term; 0 for an autoencoder without a spread, such as Sana's.
    """

    def __init__(self, mean: float = 1.0, log_variance: float = 1.0) -> None:
        require("mean", mean, 0)
        require("log_variance", log_variance, 0)
        if not mean and not log_variance:
            raise InputError("mean and log_variance are both 0: EncoderAway has nothing to climb")
        self.mean, self.log_variance = mean, log_variance
        self.spread = log_variance > 0
        self._known: WeakKeyDictionary[Backbone, tuple[Tensor, Posterior]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without posteriors: they belong to models that are in memory."""
        return {**self.__dict__, "_known": None}

    @property
    def starts_flat(self) -> bool:
        """Yes: it is least there."""
        return True

    @property
    def compares(self) -> bool:
        """Yes."""
        return True

    def compared(
        self, backbone: Backbone, clean: Float[Tensor, "n 3 h w"], draws: Sequence[Draw], micro_batch: int
    ) -> list[Draw]:
        """The draws with the clean posterior; it is encoded once where all steps see the same tensor."""
        if self._known is None:
            self._known = WeakKeyDictionary()
        seen, posterior = self._known.get(backbone, (None, None))
        if posterior is None or seen is not clean:
            posterior = backbone.encode_all(clean, micro_batch)
            self._known[backbone] = clean, posterior
        return [replace(draw, clean=tuple(posterior)) for draw in draws]

    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """How far each image's posterior is from the clean one."""
        clean = Posterior(*draw.clean)
        distance = self.mean * squared_distance(posterior.mean, clean.mean)
        if not self.log_variance:
            return distance
        return distance + self.log_variance * squared_distance(log_variance(posterior), log_variance(clean))


class EncoderTarget(Encoder):
    """- || mean - mean_target ||^2: toward what the encoder makes of a target picture.

    The encoder attack of PhotoGuard (arXiv:2302.06588, Section 3.1, equation 3), whose target is a grey picture; with a
    pattern it is the textural loss of Mist (arXiv:2305.12683, equation 3).

    Args:
        target: a picture's file, or one of our patterns: checkerboard, rings, stripes, grey.
    """

    def __init__(self, target: str = "grey") -> None:
        self.target, self.goal = target, Goal(target)

    def prepare(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> None:
        """The target's latent."""
        self.goal.prepare(backbone, images)

    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """How near each image's latent is to the target's: the distance with a minus."""
        return -squared_distance(posterior.mean, self.goal(backbone, posterior.mean))


class EncoderSpread(Encoder):
    """The mean of log var: the encoder becomes unsure of the photo, and what is drawn from it noise.

    The latent variance of "Variance as a catalyst" (ICML 2025), which starts at random noise. Ours: its logarithm, as
    the encoder itself gives it, so that each latent counts the same, however small its variance is.
    """

    spread = True

    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The mean logarithm of each image's latent variance."""
        return log_variance(posterior).mean(dim=(1, 2, 3))
