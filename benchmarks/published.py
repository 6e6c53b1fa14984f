"""Memory of the published loop, phase by phase, beside that of ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from antidreambooth.attack.perturbation import PGD
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning.dreambooth import DreamBooth
from benchmarks.aspl_speed import CLASS_IMAGES, Plain, Task
from benchmarks.counting import Counter, cuda_autocast, fake, peak_on_gpu
from benchmarks.phases import PHASES, PHOTOS, Peaks
from benchmarks.stable_diffusion import Architecture, build


class Loop(Plain):
    """The published loop in a precision.

    Args:
        task: what it is given.
        autocast: a context for every forward pass: no cast outlives it.
    """

    def __init__(self, task: Task, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__(task)
        self.autocast = autocast

    def loss(self, *arguments: Any) -> Tensor:
        """Of each image."""
        with self.autocast():
            return super().loss(*arguments)


class Published:
    """What the published loop computes, apart; each phase runs while the models before it are still there.

    Args:
        architecture: of the model.
        bf16: whether under autocast.
        device: where; its tensors may be fake.
    """

    def __init__(self, architecture: Architecture, bf16: bool, device: str) -> None:
        self.device = device
        backbone, side = build(architecture, device), architecture.resolution
        photos, classes = (torch.zeros(n, 3, side, side, device=device) for n in (PHOTOS, CLASS_IMAGES))
        training = DreamBooth(steps=2).completed(backbone.defaults)  # at the second one there are moments, too
        task = Task(backbone, training, PGD(steps=1), photos, classes)
        on_gpu = partial(torch.autocast, device, torch.bfloat16, enabled=bf16)
        autocast = partial(cuda_autocast, bf16) if device == "cpu" else on_gpu
        self.alone, self.with_prior = Loop(replace(task, classes=None), autocast), Loop(task, autocast)
        self.held = backbone, photos, classes

    def learn(self, loop: Loop) -> None:
        """Training steps on the clean photos, of a copy."""
        prime = deepcopy(loop.theta)  # a round keeps it, though what is trained is a copy of it
        loop.learn(prime, loop.task.photos, Turn(0), torch.Generator(self.device))

    def attack(self) -> None:
        """A PGD step against a copy."""
        loop = self.alone
        prime = deepcopy(loop.theta)
        loop.perturb(prime, loop.task.photos, torch.Generator(self.device))

    def peaks(self) -> Peaks:
        """Most bytes that each phase holds; None of those that the published loop does not have."""
        runs: dict[str, Callable[[], None]] = {
            "learn 1": lambda: self.learn(self.alone),
            "learn 1+1": lambda: self.learn(self.with_prior),
            f"PGD {PHOTOS}": self.attack,
        }
        peak = peak_on_gpu if self.device == "cuda" else Counter(*self.held).peak
        found: Peaks = dict.fromkeys(PHASES)
        return found | {name: peak(run) for name, run in runs.items()}


def published(architecture: Architecture, bf16: bool, cuda: bool) -> Peaks:
    """Most bytes of each phase of the published loop: measured on the GPU, or counted without one."""
    if cuda:
        try:
            return Published(architecture, bf16, "cuda").peaks()
        finally:
            torch.cuda.empty_cache()
    with fake():
        return Published(architecture, bf16, "cpu").peaks()
