"""Precision: whether less of it pays on this machine, and where results must not depend on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def made_on_cpu() -> Iterator[None]:
    """Tensors that are made without saying where, and of what kind, are fp32 on the CPU inside.

    Lightning builds models with the GPU as the default device. There a noise schedule has other bits, by which class
    images and checkpoints would not be found again on another machine, and a LoRA starts from other random numbers.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        # Another default device is watched for in every call of torch, which takes a few per cent of a small round.
        with nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast inside, on the device and on the CPU: pictures and measures must not depend on what a machine can.

    Args:
        device: where the computation runs.
    """
    with torch.autocast(device.type, enabled=False), torch.autocast("cpu", enabled=False):
        yield


_ONE = threading.RLock()


@contextmanager
def unaffected(device: torch.device) -> Iterator[None]:
    """Nothing that the caller has set for torch reaches what is computed inside; afterwards it is as it was.

    Gradients are computed inside ``no_grad`` and ``inference_mode``, in fp32 inside ``autocast``, on the given device
    under whatever default device and dtype. These belong to the process, not to a thread, so a second thread waits.

    Args:
        device: where the computation runs.
    """
    with _ONE, made_on_cpu(), torch.inference_mode(False), torch.enable_grad(), full_precision(device):
        yield


@contextmanager
def borrowing(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module on a device inside, on the CPU afterwards: what is kept for later takes no memory of a GPU."""
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; where it is emulated, it is slower than fp32.

    Args:
        device: a GPU of NVIDIA's or AMD's, or the CPU. Of any other one (Apple's) it is not assumed.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():  # the trainer will say so
            return False
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def usual_device() -> torch.device:
    """The device of a run that is not told any: a GPU where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
