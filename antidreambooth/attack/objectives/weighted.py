"""A weighted sum of objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.objectives.base import Objective
from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.draws import Draw
from antidreambooth.errors import InputError


@dataclass(frozen=True)
class Term:
    """An objective in a sum.

    Args:
        objective: what is climbed.
        weight: its weight; below 0 it is descended.
    """

    objective: Objective
    weight: float = 1.0


class Weighted(Objective):
    """A weighted sum of objectives, such as Mist's fused loss (arXiv:2305.12683, equation 4).

    Each term has randomness of its own. Photos are encoded once for all terms that see them as they are; a term that
    sees them through transforms encodes them again.

    Args:
        terms: the objectives with their weights.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise InputError("terms is empty: leave out Weighted, or give some, such as [{objective: Denoising}]")
        self.terms = list(terms)

    @property
    def inner(self) -> Sequence[Objective]:
        """The terms' objectives."""
        return [term.objective for term in self.terms]

    @property
    def encoder_only(self) -> bool:
        """Whether all terms are."""
        return all(one.encoder_only for one in self.inner)

    @property
    def starts_flat(self) -> bool:
        """Whether all terms do."""
        return all(one.starts_flat for one in self.inner)

    @property
    def compares(self) -> bool:
        """Whether one of the terms does."""
        return any(one.compares for one in self.inner)

    @property
    def encodings(self) -> int:
        """One for all that see the photos as they are, and those of the others."""
        return sum(self._sizes())

    def prepare(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> None:
        """What each term needs."""
        for one in self.inner:
            one.prepare(backbone, images)

    def draw(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Draw:
        """The randomness of each term."""
        parts = [one.draw(backbone, images, generator) for one in self.inner]
        return Draw.nothing(len(images), images.device, parts)

    def compared(
        self, backbone: Backbone, clean: Float[Tensor, "n 3 h w"], draws: Sequence[Draw], micro_batch: int
    ) -> list[Draw]:
        """Each term's own."""
        columns = zip(*(draw.parts for draw in draws), strict=True)  # one for each term
        noted = [
            one.compared(backbone, clean, parts, micro_batch) for one, parts in zip(self.inner, columns, strict=True)
        ]
        return [Draw.nothing(len(clean), clean.device, parts) for parts in zip(*noted, strict=True)]

    def encode(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], draw: Draw) -> Posterior:
        """All posteriors, one after the other: the shared one, then those of terms that encode for themselves."""
        shared = [backbone.encode(images)] if any(map(_shares, self.inner)) else []
        pairs = zip(self.inner, draw.parts, strict=True)
        found = [*shared, *(one.encode(backbone, images, part) for one, part in pairs if not _shares(one))]
        if len(found) == 1:
            return found[0]
        return Posterior(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The sum of each image's terms."""
        rows = [size * len(draw.timesteps) for size in self._sizes()]
        found = [Posterior(*parts) for parts in zip(*(torch.split(part, rows) for part in posterior), strict=True)]
        shared = found.pop(0) if any(map(_shares, self.inner)) else None
        total = torch.zeros_like(draw.timesteps, dtype=posterior.mean.dtype)
        for term, part in zip(self.terms, draw.parts, strict=True):
            own = shared if shared is not None and _shares(term.objective) else found.pop(0)
            total = total + term.weight * term.objective(backbone, own, embedding, part)
        return total

    def _sizes(self) -> list[int]:
        """How many posteriors an image has in each part of what ``encode`` gives."""
        shared = [1] if any(map(_shares, self.inner)) else []
        return [*shared, *(one.encodings for one in self.inner if not _shares(one))]


def _shares(objective: Objective) -> bool:
    """Whether an objective sees the photos as they are."""
    return type(objective).encode is Objective.encode
