"""What PGD climbs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.targets import require_target, target_image
from antidreambooth.attack.transforms import Transform
from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior, squared_distance
from antidreambooth.diffusion.densities import TimestepSampler
from antidreambooth.diffusion.draws import Draw
from antidreambooth.errors import InputError


class Objective(ABC):
    """A number per image that PGD makes larger."""

    def prepare(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> None:  # noqa: B027 (few need it)
        """Computes what stays the same in all evaluations on such images, for a first one as cheap as the next."""

    @abstractmethod
    def draw(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Draw:
        """The randomness of one evaluation, for all images."""

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


class Evaluation(NamedTuple):
    """A denoising loss and what it is computed from."""

    latents: Float[Tensor, "n c h w"]
    noisy: Float[Tensor, "n c h w"]
    prediction: Float[Tensor, "n c h w"]
    loss: Float[Tensor, " n"]


class Denoising(Objective):
    """The model's own loss L(x; w, c) (arXiv:2303.15433, Section 4): what DreamBooth makes smaller.

    The target of v-prediction and of a flow holds the latents, and the gradient goes through it, as published. There
    the loss can be raised by nothing but larger latents; ``detached_target`` closes that way.

    Args:
        timesteps: how t is drawn; as the base model's fine-tuning draws it when not given.
        detached_target: whether no gradient goes through the target. It makes no difference where noise is predicted.
    """

    def __init__(self, timesteps: TimestepSampler | None = None, detached_target: bool = False) -> None:
        self.timesteps, self.detached_target = timesteps, detached_target

    def draw(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Draw:
        """The timestep, the noise and the posterior's noise of each image."""
        n, _, height, width = images.shape
        return Draw.sample(backbone, (n, *backbone.latent_shape(height, width)), generator, self.timesteps)

    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The denoising loss of each image."""
        return self.evaluate(backbone, posterior, embedding, draw).loss

    def evaluate(self, backbone: Backbone, posterior: Posterior, embedding: Conditioning, draw: Draw) -> Evaluation:
        """The denoising loss of each image, with what it is computed from."""
        latents = posterior.sample(draw.posterior_noise)
        noisy = backbone.noising.add_noise(latents, draw.timesteps, draw.noise)
        prediction = backbone.predict(noisy, draw.timesteps, embedding.expanded(len(latents)))
        aim = latents.detach() if self.detached_target else latents
        loss = backbone.distance(prediction, aim, draw.timesteps, draw.noise)
        return Evaluation(latents, noisy, prediction, loss)


class Targeted(Denoising):
    """L(x; w, c) - || z_{t-1}^pred - q(z_target, e, t-1) ||^2: away from the photo, toward a target picture.

    The targeted variants of arXiv:2303.15433, Section 4 (T-FSMG, T-ASPL). z_{t-1}^pred is one reverse step from the
    prediction, q(z_target, e, t-1) the target's latent with the same noise at the level before. Published: a random
    reverse step, and t-1 = -1 wraps to the last level. Ours: the posterior's mean, and t >= 1.

    Args:
        target: a picture's file, or one of our patterns: checkerboard, rings, stripes.
        timesteps: how t is drawn; as the base model's fine-tuning draws it when not given.
        detached_target: see ``Denoising``.
    """

    def __init__(
        self, target: str = "checkerboard", timesteps: TimestepSampler | None = None, detached_target: bool = False
    ) -> None:
        super().__init__(timesteps, detached_target)
        require_target(target)
        self.target = target
        self._latents: WeakKeyDictionary[Backbone, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without latents: they belong to models that are in memory."""
        return {**self.__dict__, "_latents": None}

    def prepare(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> None:
        """The target's latent."""
        self._goal(backbone, images.shape[-1], images)

    def draw(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Draw:
        """As for the denoising loss, with a level before each drawn one."""
        drawn = super().draw(backbone, images, generator)
        return replace(drawn, timesteps=drawn.timesteps.clamp(min=1))

    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The denoising loss of each image less its distance from the target after one reverse step."""
        latents, noisy, prediction, loss = self.evaluate(backbone, posterior, embedding, draw)
        target = self._goal(backbone, latents.shape[-1] * backbone.downscale, latents)
        goal = backbone.noising.add_noise(target.expand_as(latents), draw.timesteps - 1, draw.noise)
        return loss - squared_distance(backbone.noising.step_back(noisy, draw.timesteps, prediction), goal)

    def _goal(self, backbone: Backbone, side: int, like: Tensor) -> Float[Tensor, "1 c rows columns"]:
        """The latent of the target at ``side`` pixels, computed once for each base model where ``like`` is."""
        if self._latents is None:
            self._latents = WeakKeyDictionary()
        if backbone not in self._latents:
            picture = target_image(self.target, side).to(like)
            self._latents[backbone] = backbone.encode_all(picture, 1).mean
        return self._latents[backbone]


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

    def prepare(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> None:
        """What the objective behind the transforms needs."""
        self.objective.prepare(backbone, images)

    def draw(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Draw:
        """The randomness of the transforms and of the objective."""
        numbers = tuple(transform.draw(len(images), generator) for transform in self.transforms)
        drawn = self.objective.draw(backbone, images, generator)
        return replace(drawn, transforms=numbers + drawn.transforms)

    def encode(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"], draw: Draw) -> Posterior:
        """The posterior of the transformed images."""
        own = len(self.transforms)
        for transform, numbers in zip(self.transforms, draw.transforms[:own], strict=True):
            images = transform(images, numbers)
        return self.objective.encode(backbone, images, replace(draw, transforms=draw.transforms[own:]))

    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The objective of each transformed image."""
        return self.objective(backbone, posterior, embedding, draw)
