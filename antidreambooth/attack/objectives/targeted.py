"""Toward a target picture, through the denoiser."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.objectives.denoising import Denoising
from antidreambooth.attack.targets import Goal
from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior, squared_distance
from antidreambooth.diffusion.densities import TimestepSampler
from antidreambooth.diffusion.draws import Draw


class Targeted(Denoising):
    """L(x; w, c) - || z_{t-1}^pred - q(z_target, e, t-1) ||^2: away from the photo, toward a target picture.

    The targeted variants of arXiv:2303.15433, Section 4 (T-FSMG, T-ASPL). z_{t-1}^pred is one reverse step from the
    prediction, q(z_target, e, t-1) the target's latent with the same noise at the level before. Published: a random
    reverse step, and t-1 = -1 wraps to the last level. Ours: the posterior's mean, and t >= 1.

    Args:
        target: a picture's file, or one of our patterns: checkerboard, rings, stripes, grey.
        timesteps: how t is drawn; as the base model's fine-tuning draws it when not given.
        detached_target: see ``Denoising``.
    """

    def __init__(
        self, target: str = "checkerboard", timesteps: TimestepSampler | None = None, detached_target: bool = False
    ) -> None:
        super().__init__(timesteps, detached_target)
        self.target, self.goal = target, Goal(target)

    def prepare(self, backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> None:
        """The target's latent."""
        self.goal.prepare(backbone, images)

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
        goal = backbone.noising.add_noise(self.goal(backbone, latents), draw.timesteps - 1, draw.noise)
        return loss - squared_distance(backbone.noising.step_back(noisy, draw.timesteps, prediction), goal)


class ACE(Denoising):
    """- || u(z_t, t, c) - z_target ||^2: whatever the noise, the prediction becomes a target picture's latent.

    ACE (arXiv:2310.04687, which Mist-v2 uses): since the prediction is wrong in the same way at every t, a model that
    learns the photos learns the error, and the target's pattern turns up in what it draws. u is what the denoiser
    itself says: noise, v, or a flow's velocity.

    Args:
        target: a picture's file, or one of our patterns: checkerboard, rings, stripes, grey.
        timesteps: how t is drawn; as the base model's fine-tuning draws it when not given.
    """

    def __init__(self, target: str = "checkerboard", timesteps: TimestepSampler | None = None) -> None:
        super().__init__(timesteps)
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
        """How near each image's prediction is to the target's latent: the distance with a minus."""
        latents, _, prediction = self.predicted(backbone, posterior, embedding, draw)
        return -squared_distance(prediction, self.goal(backbone, latents))
