"""Another objective, through random transforms of the photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.objectives.base import Objective
from antidreambooth.attack.objectives.denoising import Denoising
from antidreambooth.attack.transforms import Transform
from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.draws import Draw
from antidreambooth.errors import InputError


class Transformed(Objective):
    """Another objective through random transforms, drawn once a step: expectation over transforms (arXiv:1707.07397).

    Args:
        transforms: in the order in which a photo goes through them.
        objective: what is climbed behind them; Denoising when not given.
    """

    def __init__(self, transforms: Sequence[Transform], objective: Objective | None = None) -> None:
        if not transforms:
            raise InputError("transforms is empty: leave out Transformed, or give some, such as Flip and Crop")
        self.transforms, self.objective = list(transforms), objective or Denoising()

    @property
    def inner(self) -> Sequence[Objective]:
        """The objective behind the transforms."""
        return [self.objective]

    @property
    def encoder_only(self) -> bool:
        """As the objective behind the transforms."""
        return self.objective.encoder_only

    @property
    def starts_flat(self) -> bool:
        """As the objective behind the transforms."""
        return self.objective.starts_flat

    @property
    def compares(self) -> bool:
        """As the objective behind the transforms."""
        return self.objective.compares

    @property
    def encodings(self) -> int:
        """As the objective behind the transforms."""
        return self.objective.encodings

    def prepare(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> None:
        """What the objective behind the transforms needs."""
        self.objective.prepare(backbone, images)

    def draw(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Draw:
        """The randomness of the transforms and of the objective."""
        numbers = tuple(transform.draw(len(images), generator) for transform in self.transforms)
        drawn = self.objective.draw(backbone, images, generator)
        return replace(drawn, transforms=numbers + drawn.transforms)

    def compared(
        self, backbone: Backbone, clean: Float[Tensor, "n 3 h w"], draws: Sequence[Draw], micro_batch: int
    ) -> list[Draw]:
        """The clean photos go through the same transforms."""
        behind = [self._behind(draw) for draw in draws]
        noted = self.objective.compared(backbone, self._changed(clean, draws[0]), behind, micro_batch)
        own = len(self.transforms)
        return [
            replace(after, transforms=before.transforms[:own] + after.transforms)
            for before, after in zip(draws, noted, strict=True)
        ]

    def encode(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], draw: Draw) -> Posterior:
        """The posterior of the transformed images."""
        return self.objective.encode(backbone, self._changed(images, draw), self._behind(draw))

    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The objective of each transformed image."""
        return self.objective(backbone, posterior, embedding, self._behind(draw))

    def _changed(self, images: Float[Tensor, "n 3 h w"], draw: Draw) -> Float[Tensor, "n 3 h w"]:
        """Images after all transforms."""
        for transform, numbers in zip(self.transforms, draw.transforms[: len(self.transforms)], strict=True):
            images = transform(images, numbers)
        return images

    def _behind(self, draw: Draw) -> Draw:
        """What belongs to the objective behind the transforms."""
        return replace(draw, transforms=draw.transforms[len(self.transforms) :])
