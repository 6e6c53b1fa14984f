"""Memory without a GPU: tensors that have a shape and no content, and torch's own tracker of what would be allocated.

Counted is what every operation of the engine's own code allocates and frees, forward and backward. Not counted are
kernels' workspaces, what the allocator cannot reuse, and the CUDA context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker
from torch.profiler import ProfilerActivity, profile


class NoModules(ModTracker):
    """Looks at no module: figures for each take minutes for a U-Net, and their hooks forbid ``autograd.grad``."""

    def __enter__(self) -> NoModules:
        """Sets no hook."""
        return self

    def __exit__(self, *args: object) -> None:
        """There is no hook to take away."""


class Counter:
    """Counts the bytes that are held at most, fake tensors or not.

    Args:
        held: modules, tensors and optimizers that are there before anything runs.
    """

    def __init__(self, *held: Any) -> None:
        self.tracker = MemTracker()
        self.tracker._mod_tracker = NoModules()
        self.tracker.track_external(*held)

    def peak(self, run: Callable[[], object]) -> int:
        """Most bytes held at any time while it runs, with what was held before."""
        with self.tracker:
            run()
        return self._total("peak")

    def held(self) -> int:
        """Bytes held now."""
        return self._total("current")

    def _total(self, when: str) -> int:
        return sum(int(values["Total"]) for values in self.tracker.get_tracker_snapshot(when).values())


@contextmanager
def cuda_autocast(enabled: bool) -> Iterator[None]:
    """CUDA's autocast to bf16 for tensors on the CPU.

    Fake tensors on a GPU have no backward pass where there is no GPU (pytorch/pytorch#92627), so they are on the CPU,
    where autocast leaves normalisation in bf16; CUDA's computes it in fp32. Fused attention is the same on both: it
    keeps q, k, v, the result and a number for each query, and no matrix of weights.
    """

    def precisely(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda values, *args, **kwargs: function(values.float(), *args, **kwargs)

    # Replaced where modules call them: a TorchFunctionMode is off while a backward pass computes activations again.
    names = ("group_norm", "layer_norm") if enabled else ()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=enabled))
        for name in names:
            stack.enter_context(patch.object(F, name, precisely(getattr(F, name))))
        yield


@contextmanager
def fake(ranks: int = 1) -> Iterator[None]:
    """New tensors have no content; networks stay on the device where they are built.

    Moving a network swaps its tensors, which fails where weak references to them are kept, as fake ones' are.

    Args:
        ranks: over which networks are shared out; collectives hand over their sizes in real tensors.
    """

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        # torch's own would copy the mode, too, and fake tensors of two modes do not go together.
        values = tensor.detach().clone()
        copy = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
        memo[id(tensor)] = copy
        return copy

    def stay(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return self

    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=ranks > 1))
        stack.enter_context(patch.object(nn.Module, "to", stay))
        stack.enter_context(patch.object(FakeTensor, "__deepcopy__", copied))
        yield


def peak_on_gpu(run: Callable[[], None]) -> int | None:
    """Most bytes that are allocated on the GPU while it runs; None where there are too few."""
    try:
        run()  # makes workspaces
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None


def measured(run: Callable[[], object]) -> int:
    """Most bytes that the CPU's allocator held at any time while it runs, above what it held before.

    Everything counts here, such as what a kernel allocates for itself.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        now += event.nbytes()
        most = max(most, now)
    return most
