"""Ways to run a round of ASPL: the published loop, ours, and one means of speed after another."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from antidreambooth.attack import perturbation, surrogates
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import Outcome
from antidreambooth.diffusion.backbone import Checkpointing
from antidreambooth.diffusion.execution import Execution
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.finetuning.weights import Weights
from benchmarks.aspl_speed import CLASS_IMAGES, Ours, Plain, Task
from benchmarks.published import Loop
from benchmarks.stable_diffusion import STABLE_DIFFUSION_15, TINY, build

HELPS = ("cast once", "moments in few kernels")  # which every round of ours has; left out to see what they bring


@dataclass(frozen=True)
class Variant:
    """A way to run a round.

    Args:
        plain: whether it is the published loop rather than ours.
        bf16: whether under autocast.
        tf32: whether products of fp32 numbers are rounded to 10 bits, where autocast leaves any.
        channels_last: whether networks keep channels together in memory.
        autotune: whether cuDNN tries its kernels for every new shape.
        compiled: mode of torch.compile for U-Net and VAE encoder; not compiled where empty.
        execution: the engine's own means.
        checkpointing: what of the activations is computed again.
        without: which of ``HELPS`` are left out.
    """

    plain: bool = False
    bf16: bool = False
    tf32: bool = False
    channels_last: bool = False
    autotune: bool = False
    compiled: str = ""
    execution: Execution = field(default_factory=Execution)
    checkpointing: Checkpointing = False
    without: frozenset[str] = frozenset()


BF16 = Variant(bf16=True, tf32=True)
LAST = replace(BF16, channels_last=True, autotune=True)
VARIANTS = {
    "plain": Variant(plain=True),
    "plain-bf16": Variant(plain=True, bf16=True, tf32=True),
    "fp32": Variant(),
    "tf32": Variant(tf32=True),
    "bf16": BF16,
    "channels-last": replace(BF16, channels_last=True),
    "autotune": LAST,
    "compile": replace(LAST, compiled="default"),
    "max-autotune": replace(LAST, compiled="max-autotune-no-cudagraphs"),
    "cuda-graphs": replace(LAST, compiled="reduce-overhead"),
    # From here on each is bf16 with or without one thing, not the one before it and one thing more.
    "bf16-neither": replace(BF16, without=frozenset(HELPS)),
    "bf16-no-cast": replace(BF16, without=frozenset({"cast once"})),
    "bf16-no-moments": replace(BF16, without=frozenset({"moments in few kernels"})),
    "checkpoint-vae": replace(BF16, checkpointing="vae"),
    "checkpoint": replace(BF16, checkpointing=True),
    "decoder-rests": replace(BF16, execution=Execution(decoder_rests=True)),
    "recorded": replace(BF16, execution=Execution(recorded=True)),
}
OPTIONAL = tuple(list(VARIANTS)[list(VARIANTS).index("max-autotune") :])  # only when asked for
REFERENCES = ("plain", "plain-bf16", "bf16-neither")


class Lacking(Ours):
    """Ours without some of what it usually has.

    Args:
        without: of ``HELPS``.
        arguments: of ours.
    """

    def __init__(self, without: frozenset[str], *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.without = without

    def round(self, cloaked: Tensor, turn: Turn) -> Outcome:
        """One alternation."""
        with ExitStack() as stack:
            if "cast once" in self.without:
                for module in (perturbation, surrogates):
                    stack.enter_context(patch.object(module, "cast_once", lambda *networks: nullcontext()))
            if "moments in few kernels" in self.without:
                stack.enter_context(patch.object(Weights, "_make_moments", lambda weights: None))
            return super().round(cloaked, turn)


def make_task(args: argparse.Namespace, device: str, checkpointing: Checkpointing = False) -> Task:
    """Random photos for a random model."""
    torch.manual_seed(0)
    architecture = TINY if args.tiny else STABLE_DIFFUSION_15
    backbone = build(architecture, device)
    shape = (3, architecture.resolution, architecture.resolution)
    photos, classes = (torch.rand((n, *shape), device=device) * 2 - 1 for n in (args.photos, CLASS_IMAGES))
    training = DreamBooth(gradient_checkpointing=checkpointing).completed(backbone.defaults)
    return Task(backbone, training, PGD(micro_batch=args.micro_batch), photos, classes)


def make_side(variant: Variant, task: Task) -> Plain | Ours:
    """The loop, not compiled yet."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if variant.tf32 else "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32" if variant.tf32 else "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = variant.autotune
    if variant.plain:
        # Published is a cast of the weights, which costs the same.
        return Loop(task, partial(torch.autocast, task.photos.device.type, torch.bfloat16, enabled=variant.bf16))
    settings = {"bf16": variant.bf16, "channels_last": variant.channels_last, "micro_batch": task.attack.micro_batch}
    args = argparse.Namespace(**settings, checkpointing=False, compile=False)
    return Lacking(variant.without, task, args, best=True, execution=variant.execution)


def compile_networks(task: Task, mode: str) -> None:
    """U-Net and encoder become one graph each for every shape; what is around them stays as it is."""
    for network in (task.backbone.unet, task.backbone.vae.encoder):
        network.compile(mode=mode, dynamic=False)
