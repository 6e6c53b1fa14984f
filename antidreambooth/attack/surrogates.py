"""What the gradient is taken through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.defaults import given
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.precision import cast_once
from antidreambooth.diffusion.recording import Recording
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning.dreambooth import DreamBooth, batch_loss, joined, still_prompts, training_mode
from antidreambooth.finetuning.weights import Weights


@runtime_checkable
class Surrogate(Protocol):
    """A model to take pixel gradients through."""

    backbone: Backbone

    def borrowed(self) -> AbstractContextManager[None]:
        """Whatever is learned inside the context is unlearned at its end."""
        ...

    def learn_clean(self, turn: Turn, generator: torch.Generator) -> Float[Tensor, ""]:
        """Trains on the clean photos for one phase; returns the phase's mean loss."""
        ...

    def learn_cloaked(
        self, images: Float[Tensor, "n 3 h w"], turn: Turn, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Trains on the perturbed photos for one phase; returns the phase's mean loss."""
        ...

    def prompt_embedding(self) -> Conditioning:
        """The prompt that the attack expects, as the text encoder sees it now."""
        ...

    def weight_norm(self) -> Float[Tensor, ""]:
        """Norm of the weights that learn: not finite as soon as one of them is not."""
        ...


class Fixed:
    """A surrogate that does not learn.

    Trained on the clean photos beforehand it makes FSMG (arXiv:2303.15433, Section 4: fully-trained surrogate model
    guidance), untouched it makes AdvDM (arXiv:2302.04578).

    Args:
        backbone: the model.
        prompt: what the attack expects the pictures to be called; None where its objective asks the encoder alone.
    """

    def __init__(self, backbone: Backbone, prompt: str | None) -> None:
        self.backbone, self.prompt = backbone, prompt

    def borrowed(self) -> AbstractContextManager[None]:
        """Nothing is learned, nothing has to be unlearned."""
        return nullcontext()

    def learn_clean(self, turn: Turn, generator: torch.Generator) -> Float[Tensor, ""]:
        """Learns nothing."""
        return torch.zeros((), device=generator.device, dtype=torch.float32)

    def learn_cloaked(
        self, images: Float[Tensor, "n 3 h w"], turn: Turn, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Learns nothing."""
        return torch.zeros((), device=generator.device, dtype=torch.float32)

    @torch.no_grad()
    def prompt_embedding(self) -> Conditioning:
        """The prompt; nothing where there is none."""
        return Conditioning() if self.prompt is None else self.backbone.embed([self.prompt])

    def weight_norm(self) -> Float[Tensor, ""]:
        """No weight learns."""
        return torch.zeros((), device=self.backbone.device, dtype=torch.float32)


class Alternating:
    """The surrogate of ASPL: DreamBooth on the base model, a few steps in every round (arXiv:2303.15433, Section 4).

    Args:
        backbone: the base model; its U-Net and (if so set) text encoder are trained in place.
        training: how, completed by the backbone's own values.
        weights: the trainable weights with their optimizer.
        clean: latents of the reference set A.
        classes: latents of the class images; None without prior preservation.
        micro_batch: photos encoded at a time.
        recorded: whether a GPU replays the kernels of a step rather than be told each of them by Python; for a run
            with one process, whose backward pass is torch's own.
    """

    def __init__(
        self,
        backbone: Backbone,
        training: DreamBooth,
        weights: Weights,
        clean: Posterior,
        classes: Posterior | None = None,
        micro_batch: int = 4,
        recorded: bool = False,
    ) -> None:
        self.backbone, self.weights, self.micro_batch = backbone, weights, micro_batch
        self.training = training.completed(backbone.defaults)
        self.clean, self.classes = clean, classes
        self.recording = Recording(self._gradients, weights.parameters) if recorded else None

    def borrowed(self) -> AbstractContextManager[None]:
        """Theta' for as long as the context lasts."""
        return self.weights.borrowed()

    def learn_clean(self, turn: Turn, generator: torch.Generator) -> Float[Tensor, ""]:
        """One phase on set A."""
        return self._learn(self.clean, turn, generator)

    def learn_cloaked(
        self, images: Float[Tensor, "n 3 h w"], turn: Turn, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """One phase on the photos as they are now."""
        return self._learn(self.backbone.encode_all(images, self.micro_batch), turn, generator)

    def _learn(self, instances: Posterior, turn: Turn, generator: torch.Generator) -> Float[Tensor, ""]:
        """One phase of DreamBooth steps with a fresh AdamW; returns the mean loss."""
        steps = given(self.training.steps, 0)
        total = torch.zeros((), device=instances.mean.device, dtype=torch.float32)
        self.weights.forget()  # whoever writes a checkpoint may have filled in moments
        for loss in self._steps(instances, steps, turn, generator):
            total = total + loss
        self.weights.forget()
        return total / max(steps, 1)

    def _steps(
        self, instances: Posterior, steps: int, turn: Turn, generator: torch.Generator
    ) -> Iterator[Float[Tensor, ""]]:
        """DreamBooth steps on images with these latents, one each time that a loss is asked for."""
        size, where = given(self.training.batch_size, 1), instances.mean.device
        batches = turn.batches(steps, size, len(instances.mean), where)
        classes = turn.batches(steps, size, len(self.classes.mean), where) if self.classes else batches
        backbone, training = self.backbone, self.training
        prompts = still_prompts(backbone, training, self.classes is not None)
        # A recording rounds weights by itself: it reads those that stay where they are.
        rounded = nullcontext() if self.recording else cast_once(backbone.denoiser)
        with training_mode(backbone, training), rounded:
            for batch, class_batch in zip(batches, classes, strict=True):
                posterior = joined(instances.rows(batch), self.classes.rows(class_batch) if self.classes else None)
                draw = Draw.sample(backbone, posterior.mean.shape, generator)
                yield self._step(posterior, draw, prompts)

    def _step(self, posterior: Posterior, draw: Draw, prompts: Conditioning | None) -> Float[Tensor, ""]:
        """One optimizer step; returns its loss."""
        if self.recording:
            self.kind = Conditioning if prompts is None else type(prompts)
            (loss,) = self.recording(*posterior, *draw.tensors, *(prompts or ()))
            self.weights.update()
        else:
            loss = batch_loss(self.backbone, self.training, posterior, self.classes is not None, draw, prompts)
            self.weights.step(loss)
        return loss.detach()

    def _gradients(
        self, mean: Tensor, std: Tensor, timesteps: Tensor, noise: Tensor, drawn: Tensor, *still: Tensor
    ) -> tuple[Tensor, ...]:
        """What is recorded of a step: all but the optimizer's part."""
        posterior, draw = Posterior(mean, std), Draw(timesteps, noise, drawn)
        prompts = self.kind(still) if still else None
        loss = batch_loss(self.backbone, self.training, posterior, self.classes is not None, draw, prompts)
        torch.autograd.backward(loss)
        return (loss.detach(),)

    @torch.no_grad()
    def prompt_embedding(self) -> Conditioning:
        """The instance prompt, as the text encoder sees it now."""
        return self.backbone.embed([self.training.instance_prompt])

    def weight_norm(self) -> Float[Tensor, ""]:
        """The weights' own, or that of this process's part of them."""
        return self.weights.norm()


class Offloaded:
    """Another surrogate, on the device only while it is at work: several large base models share one card.

    Args:
        surrogate: the other one.
        device: where it works; it rests in main memory.
    """

    def __init__(self, surrogate: Surrogate, device: torch.device) -> None:
        self.surrogate, self.device = surrogate, device
        self.backbone = surrogate.backbone.to("cpu")

    @contextmanager
    def _present(self) -> Iterator[None]:
        self.backbone.to(self.device)
        try:
            yield
        finally:
            self.backbone.to("cpu")

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """The other's, on the device; what is called inside the context finds it there."""
        with self._present(), self.surrogate.borrowed():
            yield

    def learn_clean(self, turn: Turn, generator: torch.Generator) -> Float[Tensor, ""]:
        """The other's; call it while borrowed."""
        return self.surrogate.learn_clean(turn, generator)

    def learn_cloaked(
        self, images: Float[Tensor, "n 3 h w"], turn: Turn, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """The other's, on the device."""
        with self._present():
            return self.surrogate.learn_cloaked(images, turn, generator)

    def prompt_embedding(self) -> Conditioning:
        """The other's; call it while borrowed."""
        return self.surrogate.prompt_embedding()

    def weight_norm(self) -> Float[Tensor, ""]:
        """The other's, computed where its weights rest."""
        return self.surrogate.weight_norm()
