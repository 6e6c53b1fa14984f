"""Ways to run a round of ASPL: the published loop, ours, and one means of speed after another."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from antidreambooth.attack.perturbation import PGD
from antidreambooth.finetuning.dreambooth import DreamBooth
from benchmarks.aspl_speed import CLASS_IMAGES, Ours, Plain, Task
from benchmarks.stable_diffusion import STABLE_DIFFUSION_15, TINY, build


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
    """

    plain: bool = False
    bf16: bool = False
    tf32: bool = False
    channels_last: bool = False
    autotune: bool = False
    compiled: str = ""


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
}
OPTIONAL = ("max-autotune", "cuda-graphs")  # take minutes to compile
REFERENCES = ("plain", "plain-bf16")


class PlainBF16(Plain):
    """The published loop under autocast; published is a cast of the weights, which costs the same."""

    def loss(self, *args: Any) -> Tensor:
        """A context for every forward pass: no cast outlives it."""
        with torch.autocast(self.task.photos.device.type, torch.bfloat16):
            loss: Tensor = super().loss(*args)
        return loss


def make_task(args: argparse.Namespace, device: str) -> Task:
    """Random photos for a random model."""
    torch.manual_seed(0)
    architecture = TINY if args.tiny else STABLE_DIFFUSION_15
    backbone = build(architecture, device)
    shape = (3, architecture.resolution, architecture.resolution)
    photos, classes = (torch.rand((n, *shape), device=device) * 2 - 1 for n in (args.photos, CLASS_IMAGES))
    training = DreamBooth().completed(backbone.defaults)
    return Task(backbone, training, PGD(micro_batch=args.micro_batch), photos, classes)


def make_side(variant: Variant, task: Task) -> Plain | Ours:
    """The loop, not compiled yet."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if variant.tf32 else "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32" if variant.tf32 else "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = variant.autotune
    if variant.plain:
        return PlainBF16(task) if variant.bf16 else Plain(task)
    settings = {"bf16": variant.bf16, "channels_last": variant.channels_last, "micro_batch": task.attack.micro_batch}
    return Ours(task, argparse.Namespace(**settings, checkpointing=False, compile=False), best=True)


def compile_networks(task: Task, mode: str) -> None:
    """U-Net and encoder become one graph each for every shape; what is around them stays as it is."""
    for network in (task.backbone.unet, task.backbone.vae.encoder):
        network.compile(mode=mode, dynamic=False)
