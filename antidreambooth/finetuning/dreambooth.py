"""DreamBooth (arXiv:2208.12242): its settings and its loss, for the surrogate and for the victim."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from antidreambooth.diffusion.backbone import Backbone, Checkpointing, Conditioning, Posterior
from antidreambooth.diffusion.defaults import Defaults, Role, given
from antidreambooth.diffusion.draws import Draw
from antidreambooth.errors import InputError, require


@dataclass(frozen=True)
class PriorPreservation:
    """DreamBooth's second loss, on images of the class (arXiv:2208.12242, Section 3.2).

    Args:
        weight: its weight; 0 switches it off. The backbone's own when not given: 1 as published, embedded: 0.
        class_prompt: what the class images show. The backbone's own when not given: "a photo of person",
            embedded: "a photo of a person".
        images: class images, sampled once from the untouched backbone and cached.
    """

    weight: float | None = None
    class_prompt: str | None = None
    images: int = 200

    def __post_init__(self) -> None:
        require("weight", self.weight, 0)
        require("images", self.images, 1)


@dataclass(frozen=True)
class DreamBooth:
    """How a surrogate or a victim trains (arXiv:2208.12242; the values of arXiv:2303.15433, Section 5.1).

    What is not given is the backbone's own; the published values are for Stable Diffusion.

    Args:
        learning_rate: of AdamW. Published: 5e-7; embedded: 2e-4.
        steps: optimizer steps: a victim's in all, a surrogate's in each phase of a round. Published: 1000 and 3.
        batch_size: instance images in a step. Published: 2, a surrogate's 1; embedded: 8 and 2.
        weight_decay: of AdamW. Published: 1e-2.
        instance_prompt: names the person by a rare identifier.
        train_text_encoder: whether the text encoder learns too. Yes, but not with a LoRA, when not given.
        gradient_checkpointing: less memory for about a third more time; ``vae`` does so in the autoencoder alone, which
            a surrogate's PGD goes through: less saved, less time lost.
        prior: prior preservation.
    """

    learning_rate: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    weight_decay: float | None = None
    instance_prompt: str = "a photo of sks person"
    train_text_encoder: bool | None = None
    gradient_checkpointing: Checkpointing = False
    prior: PriorPreservation = field(default_factory=PriorPreservation)

    def __post_init__(self) -> None:
        require("learning_rate", self.learning_rate, above=0)
        require("steps", self.steps, 1)
        require("batch_size", self.batch_size, 1)
        require("weight_decay", self.weight_decay, 0)

    def completed(self, defaults: Defaults, role: Role = "surrogate") -> DreamBooth:
        """The same settings with the backbone's own values where none were given."""
        recipe = defaults.recipe(role)
        prior = replace(
            self.prior,
            weight=given(self.prior.weight, defaults.prior_weight),
            class_prompt=given(self.prior.class_prompt, defaults.class_prompt),
        )
        return replace(
            self,
            learning_rate=given(self.learning_rate, recipe.learning_rate),
            steps=given(self.steps, recipe.steps),
            batch_size=given(self.batch_size, recipe.batch_size),
            train_text_encoder=given(self.train_text_encoder, recipe.train_text_encoder),
            weight_decay=given(self.weight_decay, recipe.weight_decay),
            prior=prior,
        )


def embed_prompts(backbone: Backbone, training: DreamBooth, prior: bool) -> Conditioning:
    """The instance prompt and, with prior preservation, the class prompt, as the text encoder sees them now."""
    others = [given(training.prior.class_prompt, backbone.defaults.class_prompt)] if prior else []
    return backbone.embed([training.instance_prompt, *others])


def still_prompts(backbone: Backbone, training: DreamBooth, prior: bool) -> Conditioning | None:
    """The same where no step changes it, to be computed once for all of them; None where the text encoder learns."""
    if any(weight.requires_grad for encoder in backbone.text_encoders.values() for weight in encoder.parameters()):
        return None
    return embed_prompts(backbone, training, prior)


def prompts_asked(training: DreamBooth, drawn: int) -> list[list[str]]:
    """The lists of prompts that a training asks the text encoders for.

    Args:
        training: completed by the base model's own values.
        drawn: class images that are drawn at a time.
    """
    instance, usual = training.instance_prompt, training.prior.class_prompt
    if not training.prior.weight:
        return [[instance]]
    assert usual is not None
    return [[instance], [instance, usual], [usual] * drawn]


def dreambooth_loss(
    backbone: Backbone,
    training: DreamBooth,
    instances: Posterior,
    classes: Posterior | None,
    generator: torch.Generator,
    prompts: Conditioning | None = None,
) -> Float[Tensor, ""]:
    """L(x_instance; instance prompt) + weight L(x_class; class prompt) (arXiv:2208.12242, equation 2), one batch.

    Instance and class images go through the networks together.

    Args:
        backbone: the model that learns.
        training: its settings.
        instances: latents of the batch.
        classes: latents of as many class images; None without prior preservation.
        generator: of timesteps and noise.
        prompts: what ``still_prompts`` gave; computed here where it is None.
    """
    posterior = joined(instances, classes)
    draw = Draw.sample(backbone, posterior.mean.shape, generator)
    return batch_loss(backbone, training, posterior, classes is not None, draw, prompts)


def joined(instances: Posterior, classes: Posterior | None) -> Posterior:
    """Latents of a batch: instance images, then, with prior preservation, as many class images."""
    if classes is None:
        return instances
    return Posterior(torch.cat([instances.mean, classes.mean]), torch.cat([instances.std, classes.std]))


def batch_loss(
    backbone: Backbone,
    training: DreamBooth,
    posterior: Posterior,
    prior: bool,
    draw: Draw,
    prompts: Conditioning | None = None,
) -> Float[Tensor, ""]:
    """``dreambooth_loss`` once its randomness is drawn.

    Args:
        backbone: the model that learns.
        training: its settings.
        posterior: what ``joined`` gave.
        prior: whether its second half are class images.
        draw: timesteps and noise.
        prompts: what ``still_prompts`` gave.
    """
    if prompts is None:
        prompts = embed_prompts(backbone, training, prior)
    count = len(posterior.mean) // (2 if prior else 1)
    latents = posterior.sample(draw.posterior_noise)
    losses = backbone.denoising_loss(latents, draw.timesteps, draw.noise, prompts.repeated(count))
    if not prior:
        return losses.mean()
    return losses[:count].mean() + given(training.prior.weight, backbone.defaults.prior_weight) * losses[count:].mean()


def trainable(backbone: Backbone, training: DreamBooth) -> list[nn.Module]:
    """The parts of the backbone that DreamBooth trains."""
    encoders = learning_encoders(backbone) if training.train_text_encoder else []
    return [backbone.denoiser, *encoders]


def learning_encoders(backbone: Backbone) -> list[nn.Module]:
    """The text encoders that learn where one does.

    Raises:
        InputError: none of this family's is ever trained.
    """
    require_encoders(type(backbone))
    return [backbone.text_encoders[name] for name in backbone.text_lora]


def require_encoders(family: type[Backbone]) -> None:
    """Refuses a family of base models of which no text encoder is ever trained."""
    if not family.text_lora:
        raise InputError(f"the text encoder of {family.family} is not trained by anybody: leave out train_text_encoder")


@contextmanager
def training_mode(backbone: Backbone, training: DreamBooth) -> Iterator[None]:
    """The trained parts in training mode, as dropout wants it."""
    parts = trainable(backbone, training)
    for part in parts:
        part.train()
    try:
        yield
    finally:
        for part in parts:
            part.eval()
