"""The model's own loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.objectives.base import Objective
from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.densities import TimestepSampler
from antidreambooth.diffusion.draws import Draw


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

    def predicted(
        self, backbone: Backbone, posterior: Posterior, embedding: Conditioning, draw: Draw
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """Latents, the same with noise, and what the denoiser predicts of these."""
        latents = posterior.sample(draw.posterior_noise)
        noisy = backbone.noising.add_noise(latents, draw.timesteps, draw.noise)
        return latents, noisy, backbone.predict(noisy, draw.timesteps, embedding.expanded(len(latents)))

    def evaluate(self, backbone: Backbone, posterior: Posterior, embedding: Conditioning, draw: Draw) -> Evaluation:
        """The denoising loss of each image, with what it is computed from."""
        latents, noisy, prediction = self.predicted(backbone, posterior, embedding, draw)
        aim = latents.detach() if self.detached_target else latents
        loss = backbone.distance(prediction, aim, draw.timesteps, draw.noise)
        return Evaluation(latents, noisy, prediction, loss)
