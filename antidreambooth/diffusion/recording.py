"""A computation whose kernels are started once by Python and from then on by the GPU itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WARM_UPS = 2  # runs before the one that is recorded: libraries choose kernels and make workspaces in them


class Recorded(NamedTuple):
    """A CUDA graph and the tensors that it reads and writes: always the same memory."""

    graph: Any
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    gradients: list[Tensor | None]


class Recording:
    """A function of tensors as a CUDA graph: recorded at the first call with tensors of their shapes, then replayed.

    The kernels are those of a plain call, and so is the result. Whatever else the function reads (weights) has to stay
    where it is in memory; whatever it does apart from kernels happens once. Its memory is kept for good. On other
    devices than CUDA it is called plainly.

    Args:
        run: the function.
        weights: whose gradients it computes by a backward pass; they stand in ``grad`` after each call.
    """

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], weights: Sequence[nn.Parameter] = ()) -> None:
        self.run, self.weights = run, weights
        self.known: dict[Hashable, Recorded] = {}

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """What the function gives, in new tensors."""
        if arguments[0].device.type != "cuda":
            return self.run(*arguments)
        kind = tuple((one.shape, one.dtype) for one in arguments)
        if kind not in self.known:
            self.known[kind] = self._record(arguments)
        recorded = self.known[kind]
        for target, source in zip(recorded.inputs, arguments, strict=True):
            target.copy_(source)
        recorded.graph.replay()
        for weight, gradient in zip(self.weights, recorded.gradients, strict=True):
            weight.grad = gradient
        return tuple(output.clone() for output in recorded.outputs)

    def _record(self, arguments: Sequence[Tensor]) -> Recorded:
        inputs = [one.detach().clone() for one in arguments]
        device = inputs[0].device
        side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        usual = torch.cuda.current_stream(device)
        side.wait_stream(usual)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.run(*inputs)
                self._fresh()
        usual.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_pool(device), capture_error_mode="thread_local"):
            outputs = self.run(*inputs)
        gradients = [weight.grad for weight in self.weights]
        self._fresh()
        return Recorded(graph, inputs, outputs, gradients)

    def _fresh(self) -> None:
        """No gradient that the next run would add to, no rounded weight that it would not round again."""
        for weight in self.weights:
            weight.grad = None
        torch.clear_autocast_cache()


@cache
def _pool(device: torch.device) -> Any:
    """The memory of all recordings: they run one after the other, and what one leaves behind is copied at once."""
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()
