"""What the gradient is taken through."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.backbone import Backbone, Posterior
from antidreambooth.defaults import given
from antidreambooth.dreambooth import DreamBooth, dreambooth_loss, training_mode
from antidreambooth.turns import Turn
from antidreambooth.weights import Weights


@runtime_checkable
class Surrogate(Protocol):
    """A model to take pixel gradients through."""

    backbone: Backbone

    def borrowed(self) -> AbstractContextManager[None]:
        """Whatever is learned inside the context is unlearned at its end."""
        ...

    def learn(self, instances: Posterior, turn: Turn, generator: torch.Generator) -> Float[Tensor, ""]:
        """Trains on the instances' latents for one phase; returns the phase's mean loss."""
        ...

    def prompt_embedding(self) -> Float[Tensor, "1 length width"]:
        """The prompt that the attack expects, as the text encoder sees it now."""
        ...


class Alternating:
    """The surrogate of ASPL: DreamBooth on the base model, a few steps in every round (arXiv:2303.15433, Section 4).

    Args:
        backbone: the base model; its U-Net and (if so set) text encoder are trained in place.
        training: how, completed by the backbone's own values.
        weights: the trainable weights with their optimizer.
        classes: latents of the class images; None without prior preservation.
    """

    def __init__(self, backbone: Backbone, training: DreamBooth, weights: Weights, classes: Posterior | None) -> None:
        self.backbone, self.weights, self.classes = backbone, weights, classes
        self.training = training.completed(backbone.defaults)

    def borrowed(self) -> AbstractContextManager[None]:
        """Theta' for as long as the context lasts."""
        return self.weights.borrowed()

    def learn(self, instances: Posterior, turn: Turn, generator: torch.Generator) -> Float[Tensor, ""]:
        """One phase of DreamBooth steps with a fresh AdamW; returns the mean loss."""
        size, steps = given(self.training.batch_size, 1), given(self.training.steps, 0)
        batches = turn.batches(steps, size, len(instances.mean))
        classes = turn.batches(steps, size, len(self.classes.mean)) if self.classes else batches
        total = torch.zeros((), device=instances.mean.device)
        with training_mode(self.backbone, self.training):
            for batch, class_batch in zip(batches, classes, strict=True):
                others = self.classes.rows(class_batch) if self.classes else None
                loss = dreambooth_loss(self.backbone, self.training, instances.rows(batch), others, generator)
                self.weights.step(loss)
                total = total + loss.detach()
        self.weights.forget()
        return total / max(steps, 1)

    @torch.no_grad()
    def prompt_embedding(self) -> Float[Tensor, "1 length width"]:
        """The instance prompt, as the text encoder sees it now."""
        return self.backbone.embed([self.training.instance_prompt])
