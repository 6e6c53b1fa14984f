"""Score distillation: the denoising loss without the denoiser's Jacobian."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.objectives.denoising import Denoising
from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior, squared_distance
from antidreambooth.diffusion.densities import TimestepSampler
from antidreambooth.diffusion.draws import Draw


class ScoreDistillation(Denoising):
    """|| e_pred - e ||^2, whose gradient in z_t is taken as e_pred - e: no backward pass through the denoiser.

    The score distillation loss of arXiv:2311.12832 (SDS), as in arXiv:2209.14988, equation 3: the Jacobian of e_pred
    in z_t is replaced by the identity, which takes half the memory and about half the time. e_pred is the prediction,
    converted to noise: as it is where noise is predicted; signal u + spread z_t for v; z_t + (1 - s) u for a flow,
    whose velocity u is e - z.

    Args:
        descend: whether the loss is made smaller, which smooths photos and is what the paper recommends (SDS-), or
            larger, as the denoising loss is elsewhere (SDS+).
        timesteps: how t is drawn; as the base model's fine-tuning draws it when not given.
    """

    def __init__(self, descend: bool = True, timesteps: TimestepSampler | None = None) -> None:
        super().__init__(timesteps)
        self.descend = descend

    def __call__(
        self,
        backbone: Backbone,
        posterior: Posterior,
        embedding: Conditioning,
        draw: Draw,
    ) -> Float[Tensor, " n"]:
        """The loss of each image, with a minus where it is descended; differentiable as said above."""
        latents = posterior.sample(draw.posterior_noise)
        noisy = backbone.noising.add_noise(latents, draw.timesteps, draw.noise)
        still = noisy.detach()
        prediction = backbone.predict(still, draw.timesteps, embedding.expanded(len(latents)))
        predicted = backbone.noising.noise(still, draw.timesteps, prediction)
        loss = squared_distance(predicted + (noisy - still), draw.noise)  # the bracket is 0, with the gradient of z_t
        return -loss if self.descend else loss
