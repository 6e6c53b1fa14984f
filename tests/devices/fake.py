"""A GPU without a GPU: tensors that say they are on one, know their shapes and hold no values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from antidreambooth.attack.methods import plain_weights
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.finetuning.weights import Weights
from benchmarks.host import READS, place
from tests.devices.noise import Elsewhere, same_noise

CUDA = torch.device("cuda", 0)


class Shapes(TorchFunctionMode):
    """What a generator of a device that is not there is asked for: its shape, on that device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function."""
        kwargs = dict(kwargs or {})
        if isinstance(generator := kwargs.get("generator"), Elsewhere):
            assert torch.device(kwargs["device"]).type == generator.device.type, "a generator draws on its own device"
            kwargs.pop("generator")
        return func(*args, **kwargs)


class Traffic(TorchDispatchMode):
    """Counts, by the line of the engine, what goes from one device to the other, and where 8-bit pixels are.

    What is read of a tensor without values is 1 or True on the device, where the engine asks whether all is finite, and
    0 or False on the CPU, where it asks whether anything is wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()  # between host and device, reads included
        self.bytes_at: set[str] = set()  # 8-bit tensors on the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        inside = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default:
            on_device = inside[0].device.type == "cuda"
            self.copies[f"{place()}: {func}"] += on_device
            return {torch.bool: bool, torch.int64: int}.get(inside[0].dtype, float)(on_device)
        result = func(*args, **(kwargs or {}))
        tensors = inside + [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1 or (func in READS and "cuda" in devices):
            self.copies[f"{place()}: {func}"] += 1
        if any(tensor.dtype == torch.uint8 and tensor.device.type == "cuda" for tensor in tensors):
            self.bytes_at.add(place())
        return result


def empty_on(backbone: Backbone, device: torch.device) -> Backbone:
    """The backbone with weights and buffers of the same shapes on a device that holds no values.

    A tensor that is neither stays on the CPU, as it does where a true model is moved.
    """
    for module in backbone.modules():
        for name, weight in module.named_parameters(recurse=False):
            made = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            setattr(module, name, nn.Parameter(made, requires_grad=weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype, device="cpu"))
    return backbone


def _moved(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply`` for fake tensors, which torch cannot move in place: only what they say changes."""
    for child in module.children():
        child._apply(change)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            assert isinstance(tensor, FakeTensor)
            tensor.fake_device = change(tensor).device
    return module


def _no_gradient(outputs: Any, inputs: Any, *more: Any, **options: Any) -> tuple[Tensor, ...]:
    """``torch.autograd.grad`` where there is no backward: zeros where the inputs are."""
    return tuple(torch.zeros_like(one) for one in ([inputs] if isinstance(inputs, Tensor) else inputs))


def lend(backbone: Backbone, training: DreamBooth) -> Weights:
    """The weights that learn; each has a gradient of zeros after a backward pass that is none."""
    weights = plain_weights(backbone, training)

    def backward(loss: Tensor) -> None:
        for weight in weights.parameters:
            weight.grad = torch.zeros_like(weight)

    weights.backward = backward
    return weights


@contextmanager
def fake_gpu() -> Iterator[Traffic]:
    """Inside, tensors can be on ``CUDA``; what mixes devices raises, copies are counted; there is no backward."""
    with (
        patch("torch.autograd.grad", _no_gradient),
        patch.object(nn.Module, "_apply", _moved),
        FakeTensorMode(),
        same_noise(Shapes),
        Traffic() as traffic,
    ):
        yield traffic
