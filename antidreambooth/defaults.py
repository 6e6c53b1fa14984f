"""What a base model wants where the user says nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from antidreambooth.errors import InputError

T = TypeVar("T")
FILE = "antidreambooth.json"


@dataclass(frozen=True)
class Defaults:
    """Settings that belong to a base model; the values here are the published ones for Stable Diffusion.

    A diffusers folder may hold others in a file ``antidreambooth.json``, as the embedded model does.

    Args:
        learning_rate: of the surrogate's AdamW.
        batch_size: instance images in a surrogate step.
        prior_weight: weight of the prior-preservation loss.
        class_prompt: prompt of the class images.
        guidance_scale: classifier-free guidance when sampling.
        sampling_steps: DDIM steps when sampling.
        notice: terms that a run must show before anything else.
    """

    learning_rate: float = 5e-7
    batch_size: int = 1
    prior_weight: float = 1.0
    class_prompt: str = "a photo of person"
    guidance_scale: float = 7.5
    sampling_steps: int = 50
    notice: str = ""

    @classmethod
    def read(cls, folder: Path) -> Defaults:
        """The defaults in a model's folder; the published ones where it has no file of them."""
        file = folder / FILE
        if not file.is_file():
            return cls()
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise InputError(f"{file} cannot be used: {error}; its keys are those of {cls.__name__}") from error


def given(value: T | None, default: T) -> T:
    """``value``, or ``default`` where the user gave none."""
    return default if value is None else value
