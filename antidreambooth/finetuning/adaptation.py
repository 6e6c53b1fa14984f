"""What a victim trains in the base model, and the files in which others can load the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.defaults import Defaults, Role, given
from antidreambooth.diffusion.layout import family_of
from antidreambooth.diffusion.precision import made_on_cpu
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError, first_line
from antidreambooth.finetuning.dreambooth import DreamBooth, require_encoders


class Adaptation(ABC):
    """A way to fine-tune a base model on a person; ``folder`` is where its result lies in a run's folder."""

    role: ClassVar[Role]
    folder: ClassVar[str]
    whole: ClassVar[bool] = False  # whether the denoiser's own weights learn

    @abstractmethod
    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Adds what is to be trained, where it is not there yet, and lets gradients reach it and nothing else."""

    @abstractmethod
    def save(self, backbone: Backbone, folder: Path) -> None:
        """Writes what was trained, as diffusers reads it."""

    @abstractmethod
    def load(self, backbone: Backbone, folder: Path) -> None:
        """Puts what ``save`` wrote into an untouched backbone.

        Raises:
            InputError: it is not there, or was trained from another base model.
        """

    def prompt(self, text: str) -> str:
        """The prompt as the trained model knows it."""
        return text

    def usual(self, training: DreamBooth) -> DreamBooth:
        """Settings with those values that go without saying for this way, whatever the base model."""
        return training

    def teaches_text(self, training: DreamBooth) -> bool:
        """Whether something of a text encoder learns."""
        return bool(training.train_text_encoder)

    def require_learnable(self, source: Source, training: DreamBooth) -> None:
        """Refuses a base model that cannot learn in this way, before it is loaded.

        Args:
            source: the base model.
            training: how it shall learn, completed by the base model's own values.

        Raises:
            InputError: its weights are held in too little for this, or nobody trains text encoders of its family.
        """
        if self.whole and source.frozen_weights == "nf4":
            raise InputError(
                f"weights of 4 bits do not learn, and {type(self).__name__} trains them all: use LoRA, or "
                "frozen_weights bf16"
            )
        if training.train_text_encoder:
            require_encoders(family_of(source))

    def apply(self, backbone: Backbone, training: DreamBooth, seed: int) -> None:
        """Makes an untouched backbone ready to learn, on the device where it is."""
        with torch.random.fork_rng(devices=[]), made_on_cpu():
            torch.manual_seed(seed)  # a LoRA starts from random numbers
            self.prepare(backbone, bool(training.train_text_encoder))
        for weight in backbone.learned():  # frozen weights may be held in less
            weight.data = weight.data.float()
        backbone.to(backbone.device)
        backbone.checkpoint(training.gradient_checkpointing)

    def surrogate_settings(self, training: DreamBooth, defaults: Defaults) -> DreamBooth:
        """Settings of a surrogate that learns in this way: phases as usual, the learning rate of what is trained."""
        training = self.usual(training)
        if self.role != "full":
            recipe = defaults.recipe(self.role)
            training = replace(
                training,
                learning_rate=given(training.learning_rate, recipe.learning_rate),
                train_text_encoder=given(training.train_text_encoder, recipe.train_text_encoder),
                weight_decay=given(training.weight_decay, recipe.weight_decay),
            )
        return replace(training.completed(defaults), instance_prompt=self.prompt(training.instance_prompt))


class Untrained(Adaptation):
    """Nothing at all: the base model fine-tuned on nobody, the control that shows what chance gives."""

    role = "full"
    folder = ""

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """There is nothing to train."""
        raise InputError("Untrained has nothing to train: it is for `test` only")

    def save(self, backbone: Backbone, folder: Path) -> None:
        """There is nothing to save."""

    def load(self, backbone: Backbone, folder: Path) -> None:
        """Leaves the backbone as it is."""


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what is known to go wrong while a result is loaded into one message with the fix."""
    try:
        yield
    except (InputError, OSError, SafetensorError, ValueError, RuntimeError) as error:
        # InputError: the loader's or an adaptation's own; OSError: a file is missing or damaged; SafetensorError: it is
        # cut; ValueError: embeddings of another width.
        # RuntimeError: weights of another shape, in the words of torch; any other one is a bug, or want of memory.
        if isinstance(error, RuntimeError) and not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise InputError(
            f"{folder} holds no result of this victim on this backbone ({first_line(error)}): run `fit` with the same "
            f"--model.backbone and --model.adaptation first"
        ) from error
