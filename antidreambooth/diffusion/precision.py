"""Precision: whether less of it pays on this machine, and where results must not depend on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CAST = (nn.Linear, nn.Conv1d, nn.Conv2d)  # modules whose weights autocast rounds, and nothing else sees


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
    able = torch.amp.is_autocast_available(device.type)  # a device that holds no values has none
    with torch.autocast(device.type, enabled=False) if able else nullcontext(), torch.autocast("cpu", enabled=False):
        yield


def autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device; one that holds no values has none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@contextmanager
def cast_once(*networks: nn.Module) -> Iterator[None]:
    """Weights that do not learn are rounded to autocast's precision once, here, and not in every pass inside.

    Autocast keeps its copies only of weights that want a gradient. The result is the same to the bit. The copies are
    half as large as the weights and live until the end; a backward pass holds them in any case, unless its activations
    are computed again: such a network is left as it is, since whoever asks for that wants the memory. So is a network
    whose weights are split over several devices, and everything where autocast is off.

    Args:
        networks: whose weights nobody changes inside.
    """
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for network in networks:
            device = next(network.parameters()).device.type
            if not autocasts(device) or getattr(network, "is_gradient_checkpointing", False):
                continue
            if any(isinstance(weight, DTensor) or not weight.numel() for weight in network.parameters()):
                continue  # FSDP2's shards; under ZeRO's stage 3 a weight that is elsewhere is empty
            for module, name, weight in _frozen_weights(network):
                rounded = weight.detach().to(torch.get_autocast_dtype(device))
                # Another parameter stands in its place: one that changed its kind would lose DDP's hooks.
                module._parameters[name] = nn.Parameter(rounded, requires_grad=False)
                swapped.append((module, name, weight))
        yield
    finally:
        for module, name, weight in swapped:
            module._parameters[name] = weight


def held_in_bf16(network: nn.Module) -> None:
    """Holds the weights of a network in bf16 that autocast rounds to it, and everything else in fp32, in place.

    So a pass under autocast gives the same as with all of these values in fp32, to the bit. What is left in fp32
    (norms, embeddings) is small. Weights of 4 bits stay as they are.
    """
    read_elsewhere = {  # such as an embedding's, which may be the last layer's weight, too
        id(weight)
        for module in network.modules()
        if not isinstance(module, CAST)
        for weight in module.parameters(recurse=False)
    }
    for weight in network.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(torch.float32 if id(weight) in read_elsewhere else torch.bfloat16)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


@contextmanager
def taken_for_fp32(network: nn.Module) -> Iterator[None]:
    """Inside, weights in bf16 say that they are fp32, and have no values.

    A LoRA is made in the kind of the layer that it changes. Its random numbers are the same ones only in fp32.
    """
    swapped = [
        (module, name, weight)
        for module in network.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dtype == torch.bfloat16
    ]
    for module, name, weight in swapped:
        empty = torch.zeros((), device=weight.device, dtype=torch.float32).expand(weight.shape)
        module._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    try:
        yield
    finally:
        for module, name, weight in swapped:
            module._parameters[name] = weight


def _frozen_weights(network: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """What ``cast_once`` rounds: module, name, weight."""
    return [
        (module, name, weight)
        for module in network.modules()
        if isinstance(module, CAST)
        for name, weight in module.named_parameters(recurse=False)
        if not weight.requires_grad and weight.dtype == torch.float32
    ]


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


def has_own_memory(device: torch.device) -> bool:
    """Whether what rests in main memory takes none of a device's."""
    return device.type != "cpu"


def usual_device() -> torch.device:
    """The device of a run that is not told any: a GPU where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def precise(values: Tensor) -> Tensor:
    """In fp32, or better where they are: autocast computes in less."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
