"""The parts of a round of ASPL, each by itself, in every mode: what the memory benchmark runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import SGD, AdamW, Optimizer

from antidreambooth.attack.canvas import SquareCanvas
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.surrogates import Alternating
from antidreambooth.diffusion.backbone import Checkpointing, Posterior
from antidreambooth.diffusion.precision import full_precision
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.lora import LoRA
from antidreambooth.finetuning.weights import Weights
from benchmarks.counting import Counter, cuda_autocast, fake, peak_on_gpu
from benchmarks.sharding import fake_ranks, let_go, shard
from benchmarks.stable_diffusion import Architecture, build, size
from lightning_modules.running.borrowing import ShardedWeights

PHOTOS, CLASS_IMAGES = 4, 200
PHASES = ("encode 4", "encode 1", "learn 1", "learn 1+1", "PGD 4", "PGD 1", "sample 4")

Peaks = dict[str, int | None]  # bytes by phase; None where the device had too little


@dataclass(frozen=True)
class Mode:
    """How a round runs.

    Args:
        name: in the table.
        bf16: whether under autocast.
        lora: whether a LoRA of the U-Net's attention learns, rather than all of U-Net and text encoder.
        checkpointing: which activations are computed again in the backward pass.
        ranks: over which FSDP2 shares out the states.
        network: the networks by themselves, without any optimizer: what ZeRO's states come on top of.
    """

    name: str
    bf16: bool = True
    lora: bool = False
    checkpointing: Checkpointing = False
    ranks: int = 1
    network: bool = False


class Round:
    """A round's parts on one device, whose tensors may be fake; each is what the engine calls by that name."""

    def __init__(self, architecture: Architecture, mode: Mode, device: str, mesh: DeviceMesh | None = None) -> None:
        self.mode, self.device = mode, device
        self.backbone = build(architecture, device)
        adaptation = LoRA() if mode.lora else Full()
        # Two steps: at the second one there are moments, too.
        plain = DreamBooth(steps=2, gradient_checkpointing=mode.checkpointing, prior=PriorPreservation(weight=0.0))
        self.alone = adaptation.surrogate_settings(plain, self.backbone.defaults)
        self.with_prior = adaptation.surrogate_settings(DreamBooth(steps=2), self.backbone.defaults)
        adaptation.apply(self.backbone, self.alone, seed=0)
        with torch.no_grad():  # a run's prompts become tokens once
            self.backbone.embed([self.alone.instance_prompt, self.backbone.defaults.class_prompt])
        if mesh:
            shard(self.backbone, mesh)
        self.weights = self._weights()
        self.photos = torch.zeros(PHOTOS, 3, architecture.resolution, architecture.resolution, device=device)
        side = architecture.resolution // self.backbone.downscale
        latents = torch.zeros(CLASS_IMAGES, self.backbone.latent_channels, side, side, device=device)
        self.classes = Posterior(latents, torch.zeros_like(latents))

    @cached_property
    def counter(self) -> Counter:
        """Counts what the parts allocate, beside what is there when it is first asked for."""
        return Counter(self.backbone, self.weights.optimizer, self.photos, self.classes)

    def _weights(self) -> Weights:
        learned = self.backbone.learned()
        if self.mode.network:
            let_go(learned)
            return Unborrowed(learned, SGD(learned, lr=0.0))
        optimizer: Optimizer = AdamW(learned, lr=1e-6, fused=True)
        if self.mode.ranks > 1:
            return ShardedWeights(self.backbone, optimizer, Tensor.backward)
        return Weights(learned, optimizer)

    def autocast(self) -> AbstractContextManager[object]:
        """The mode's precision."""
        if self.device == "cpu":
            return cuda_autocast(self.mode.bf16)
        return torch.autocast(self.device, torch.bfloat16, enabled=self.mode.bf16)

    def encode(self, count: int) -> None:
        """Clean and class images, once a run; perturbed ones, once a round."""
        self.backbone.encode_all(self.photos, count)

    def surrogate(self, prior: bool) -> Alternating:
        """What ASPL attacks."""
        clean, classes = self.classes.rows(slice(PHOTOS)), self.classes if prior else None
        training = self.with_prior if prior else self.alone
        return Alternating(self.backbone, training, self.weights, clean, classes)

    def learn(self, prior: bool) -> None:
        """DreamBooth steps of the borrowed weights."""
        surrogate = self.surrogate(prior)
        with surrogate.borrowed():
            surrogate.learn_clean(Turn(0), torch.Generator(self.device))

    def attack(self, micro_batch: int) -> None:
        """A PGD step against the borrowed weights."""
        surrogate, photos = self.surrogate(False), self.photos
        with surrogate.borrowed():
            attack, turn = PGD(steps=1, micro_batch=micro_batch), Turn(0)
            attack(surrogate, SquareCanvas(photos), photos, turn, torch.Generator(self.device))

    @torch.no_grad()
    def sample(self, count: int) -> None:
        """What of sampling takes most: a step with guidance and decoding. Its schedule needs tensors with content."""
        backbone = self.backbone
        text = backbone.embed(["a photo of a person"]).expanded(2 * count)
        noise = self.classes.mean[:1].expand(2 * count, -1, -1, -1)
        step = torch.zeros(2 * count, dtype=torch.long, device=self.device)
        latents = backbone.denoise(noise, step, text).chunk(2)[0]
        with full_precision(torch.device(self.device)):
            for one in torch.split(latents.float(), 1):
                backbone.decode(one)

    def phases(self) -> list[Callable[[], None]]:
        """Those of ``PHASES``."""
        return [
            lambda: self.encode(4),
            lambda: self.encode(1),
            lambda: self.learn(False),
            lambda: self.learn(True),
            lambda: self.attack(4),
            lambda: self.attack(1),
            lambda: self.sample(4),
        ]

    def peaks(self) -> Peaks:
        """Most bytes that each phase holds."""
        peak = peak_on_gpu if self.device == "cuda" else self._count
        with self.autocast():
            return {name: peak(run) for name, run in zip(PHASES, self.phases(), strict=True)}

    def _count(self, run: Callable[[], None]) -> int:
        if self.mode.ranks > 1:
            run()  # the first time, sharded operations find out by example how their results are sharded
        return self.counter.peak(run)


class Unborrowed(Weights):
    """Weights whose copy is somewhere else."""

    def snapshot(self) -> list[Tensor]:
        """None."""
        return []

    def restore(self, kept: list[Tensor]) -> None:
        """Nothing to put back."""


def count(architecture: Architecture, mode: Mode) -> Peaks:
    """Most bytes of each phase in one of the single or FSDP2 modes, without a GPU."""
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(fake_ranks(mode.ranks)) if mode.ranks > 1 else None
        stack.enter_context(fake(mode.ranks))
        return Round(architecture, mode, "cpu", mesh).peaks()


def measure(architecture: Architecture, mode: Mode) -> Peaks:
    """Most bytes of each phase, on the GPU."""
    try:
        return Round(architecture, mode, "cuda").peaks()
    except torch.OutOfMemoryError:
        return dict.fromkeys(PHASES)
    finally:
        torch.cuda.empty_cache()


def sizes(architecture: Architecture) -> tuple[int, int]:
    """How many weights learn, and how many do not, when all of the U-Net and the text encoder do."""
    with fake():
        backbone = build(architecture)
    frozen = size(backbone.vae)
    return size(backbone) - frozen, frozen
