"""Pictures from a model: what a surrogate, a victim or the untouched base model shows for a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.defaults import given
from antidreambooth.diffusion.precision import full_precision, made_on_cpu
from antidreambooth.diffusion.seeding import normal, require_seed
from antidreambooth.errors import InputError, require


@dataclass(frozen=True)
class Generation:
    """Which pictures a victim is asked for (by default those of arXiv:2303.15433, Section 5.1).

    Args:
        prompts: what they should show.
        images: pictures for each prompt.
        batch: how many are sampled at a time.
        guidance_scale: classifier-free guidance; the backbone's own when not given.
        sampling_steps: steps of the sampler; the backbone's own when not given.
        seed: of the noise; the same for every victim, so that pictures can be compared.
    """

    prompts: tuple[str, ...] = ("a photo of sks person", "a dslr portrait of sks person")
    images: int = 16
    batch: int = 8
    guidance_scale: float | None = None
    sampling_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("generation.prompts is empty: there is nothing to draw")
        require("images", self.images, 1)
        require("batch", self.batch, 1)
        require("guidance_scale", self.guidance_scale, 0)
        require("sampling_steps", self.sampling_steps, 1)
        require_seed("seed", self.seed)


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompt: str,
    noise: Float[Tensor, "n c h w"],
    guidance_scale: float | None = None,
    steps: int | None = None,
) -> UInt8[Tensor, "n 3 H W"]:
    """Pictures of a prompt from given noise, in 8 bits; the backbone's own guidance and steps when not given.

    Latents are drawn in the precision of whoever asks, and decoded in fp32: low precision would show in the pixels.

    Raises:
        InputError: the model draws no finite numbers, or has fewer steps in its noise schedule.
    """
    steps = given(steps, backbone.defaults.sampling_steps)
    require("sampling_steps", steps, 1, len(backbone.noising))
    scale = given(guidance_scale, backbone.defaults.guidance_scale)
    with made_on_cpu(), evaluating(backbone):  # diffusers makes tensors on the default device
        # Each prompt as often as there are pictures: one row repeated rounds otherwise than several rows.
        told = backbone.embed([prompt] * len(noise))
        against = backbone.negative(len(noise)) if backbone.guides(scale) else None
        latents = backbone.draw(noise, told, against, steps, scale)
        require_finite(latents, prompt)  # the decoder clamps infinity to white
        with full_precision(latents.device):
            images = torch.cat([backbone.decode(one) for one in torch.split(latents.float(), 1)])  # fp32 takes memory
    return eight_bits(images * 0.5 + 0.5, prompt)


def eight_bits(images: Float[Tensor, "n 3 H W"], prompt: str) -> UInt8[Tensor, "n 3 H W"]:
    """What a pipeline draws of a prompt, in [0, 1], as pixels.

    Raises:
        InputError: there are numbers that are not finite, which would be black.
    """
    require_finite(images, prompt)
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def require_finite(drawn: Tensor, prompt: str) -> None:
    """Refuses what is no picture; one copy from the device.

    Args:
        drawn: pictures or their latents.
        prompt: what they should show, for the message.

    Raises:
        InputError: a number is not finite.
    """
    if not drawn.isfinite().all():
        raise InputError(
            f"the model draws no pictures of {prompt!r} but numbers that are not finite: its weights are broken or its "
            "training diverged; try another base model, a lower learning rate or --trainer.precision 32-true"
        )


def blank(pictures: UInt8[Tensor, "n 3 h w"]) -> Bool[Tensor, " n"]:
    """Which pictures show nothing: all pixels have one colour, as they have where a model is broken."""
    return (pictures.amax((2, 3)) == pictures.amin((2, 3))).all(dim=1)


def noise_of(backbone: Backbone, resolution: int, indices: Iterable[int], seed: int) -> Float[Tensor, "n c h w"]:
    """Starting noise that depends on each picture's index only, whatever it is sampled together with."""
    shape = backbone.latent_shape(resolution, resolution)
    words = [np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] for index in indices]
    generators = [torch.Generator("cpu").manual_seed(int(word)) for word in words]
    noise = [normal(shape, generator) for generator in generators]
    return torch.stack(noise).to(backbone.device)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All parts in evaluation mode inside, as they were afterwards: a victim is sampled in the middle of training."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
