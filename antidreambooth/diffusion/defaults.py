"""What a base model wants where the user says nothing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from antidreambooth.errors import InputError, require
from antidreambooth.files import write_json

T = TypeVar("T")
FILE = "antidreambooth.json"
Role = Literal["surrogate", "full", "lora", "textual_inversion"]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast something is fine-tuned.

    Args:
        learning_rate: of AdamW.
        batch_size: instance images in a step.
        steps: optimizer steps.
        train_text_encoder: whether the text encoder learns too.
        weight_decay: of AdamW.
    """

    learning_rate: float
    batch_size: int
    steps: int
    train_text_encoder: bool
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        require("learning_rate", self.learning_rate, above=0)
        require("batch_size", self.batch_size, 1)
        require("steps", self.steps, 1)
        require("weight_decay", self.weight_decay, 0)


@dataclass(frozen=True)
class Defaults:
    """Settings that belong to a base model; the values here are the published ones for Stable Diffusion.

    A diffusers folder may hold others in a file ``antidreambooth.json``, as the embedded model does.

    Args:
        surrogate: of ASPL (arXiv:2303.15433, Section 5.1); steps are those of a phase.
        full: of a victim that trains the whole model (the same section).
        lora: of a LoRA victim, the usual values of today.
        textual_inversion: of a victim that trains one token's embedding (arXiv:2208.01618).
        prior_weight: weight of the prior-preservation loss.
        class_prompt: prompt of the class images.
        guidance_scale: classifier-free guidance when sampling.
        sampling_steps: steps of the sampler.
        resolution: side of the pictures in pixels; what the denoiser was made for when not given.
        blurred_references: whether a person's clean photos are compared with as the model's autoencoder shows them,
            for one that blurs so much that a verifier would reject the photos themselves.
        notice: terms that a run must show before anything else.
    """

    surrogate: Recipe = Recipe(5e-7, 1, 3, True)
    full: Recipe = Recipe(5e-7, 2, 1000, True)
    lora: Recipe = Recipe(1e-4, 2, 1000, False)
    textual_inversion: Recipe = Recipe(5e-4, 4, 2000, False)
    prior_weight: float = 1.0
    class_prompt: str = "a photo of person"
    guidance_scale: float = 7.5
    sampling_steps: int = 50
    resolution: int | None = None
    blurred_references: bool = False
    notice: str = ""

    def __post_init__(self) -> None:
        require("prior_weight", self.prior_weight, 0)
        require("guidance_scale", self.guidance_scale, 0)
        require("sampling_steps", self.sampling_steps, 1)
        require("resolution", self.resolution, 1)

    def recipe(self, role: Role) -> Recipe:
        """How this model is fine-tuned in a role."""
        recipe: Recipe = getattr(self, role)
        return recipe

    @classmethod
    def read(cls, folder: Path, published: Defaults) -> Defaults:
        """The defaults in a model's folder, and the published ones where it says nothing.

        Args:
            folder: of the model.
            published: those of its family.

        Raises:
            InputError: the file cannot be read, is no JSON object, or has other keys than these.
        """
        file = folder / FILE
        if not file.is_file():
            return published
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise InputError("it is no JSON object")
            if nothing := [key for key, value in values.items() if value is None and key != "resolution"]:
                raise InputError(f"{nothing[0]} has no value")
            recipes = {key: Recipe(**value) for key, value in values.items() if isinstance(value, dict)}
            return dataclasses.replace(published, **{**values, **recipes})
        except (InputError, OSError, TypeError, ValueError) as error:
            # InputError: a number out of range. TypeError: a dataclass's, for a key that it does not have.
            raise InputError(f"{file} cannot be used: {error}; its keys are those of {cls.__name__}") from error

    def write(self, folder: Path) -> None:
        """The file that ``read`` reads."""
        write_json(folder / FILE, dataclasses.asdict(self))


def given(value: T | None, default: T) -> T:
    """``value``, or ``default`` where the user gave none."""
    return default if value is None else value
