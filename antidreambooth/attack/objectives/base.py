"""What every objective has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.source import Source


class Objective(ABC):
    """A number per image that PGD makes larger."""

    @property
    def inner(self) -> Sequence[Objective]:
        """The objectives that this one is made of."""
        return ()

    def members(self) -> Iterator[Objective]:
        """This one and all that it is made of, at whatever depth."""
        yield self
        for one in self.inner:
            yield from one.members()

    @property
    def encoder_only(self) -> bool:
        """Whether it asks the autoencoder's encoder and nothing else, so that no denoiser has to be loaded."""
        return False

    @property
    def starts_flat(self) -> bool:
        """Whether its gradient is 0 on photos without any change, so that PGD has to start elsewhere."""
        return False

    @property
    def compares(self) -> bool:
        """Whether it looks at the photos as they were, too; see ``compared``."""
        return False

    @property
    def encodings(self) -> int:
        """How many posteriors ``encode`` gives for each image, one set of images after the other."""
        return 1

    @property
    def models(self) -> Sequence[Backbone]:
        """The models that it asks beside the surrogate's, once it is prepared."""
        return [model for one in self.inner for model in one.models]

    def require_possible(self, source: Source) -> None:  # noqa: B027 (few need it)
        """Refuses a base model with which this objective cannot work, before it is loaded.

        Raises:
            InputError: it is one.
        """

    def prepare(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> None:  # noqa: B027
        """Computes what stays the same in all evaluations on such images, for a first one as cheap as the next."""

    @abstractmethod
    def draw(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Draw:
        """The randomness of one evaluation, for all images."""

    def compared(
        self, backbone: Backbone, clean: Float[Tensor, "n 3 h w"], draws: Sequence[Draw], micro_batch: int
    ) -> list[Draw]:
        """The draws of a step, with what an objective that ``compares`` has to know of the clean photos.

        Args:
            backbone: the surrogate's.
            clean: what the step sees, without the perturbation.
            draws: of the step; photos are encoded as the first one says.
            micro_batch: photos encoded at a time.
        """
        return list(draws)

    def encode(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], draw: Draw) -> Posterior:
        """What all draws of timestep and noise have in common: the latents' posterior of images in [-1, 1].

        Computed once a step, whatever the number of draws; differentiable in the pixels.
        """
        return backbone.encode(images)

    @abstractmethod
    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The objective of each image, from what ``encode`` made of it; differentiable in the posterior."""
