"""A computation whose kernels are started once by Python and from then on by the GPU itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

RECORDED_ON = ("cuda",)  # kinds of devices
PASSES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # images that each watched network has been given
WARM_UPS = 2  # runs before the one that is recorded: libraries choose kernels and make workspaces in them


@contextmanager
def uncounted(network: nn.Module) -> Iterator[None]:
    """Inside, images that a watched network is given do not count: they are computed again, and counted before."""
    before = PASSES.get(network)
    try:
        yield
    finally:
        if before is not None:
            PASSES[network] = before


class Pool:
    """The memory of recordings: they run one after the other, and what one leaves behind is copied at once.

    CUDA's allocator forgets a pool with the last graph in it, and must not be given its handle again.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.handle: Any = torch.cuda.graph_pool_handle()

    @classmethod
    def of(cls, device: torch.device) -> Pool:
        """The one of all recordings that there are on a device; a new one where there are none."""
        if (pool := POOLS.get(device)) is None:
            pool = POOLS[device] = cls(device)
        return pool


POOLS: WeakValueDictionary[torch.device, Pool] = WeakValueDictionary()


class Recorded(NamedTuple):
    """A CUDA graph and the tensors that it reads and writes: always the same memory."""

    graph: Any
    pool: Pool | None
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    gradients: list[Tensor | None]
    passes: dict[nn.Module, int]


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
        if arguments[0].device.type not in RECORDED_ON:
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
        for network in PASSES.keys() & recorded.passes.keys():
            PASSES[network] += recorded.passes[network]
        return tuple(output.clone() for output in recorded.outputs)

    def _record(self, arguments: Sequence[Tensor]) -> Recorded:
        inputs, counted = [one.detach().clone() for one in arguments], dict(PASSES)
        self._warm_up(inputs)
        warm = dict(PASSES)
        graph, pool, outputs = self._capture(inputs)
        passes = {network: count - warm[network] for network, count in PASSES.items()}
        PASSES.update(counted)  # none of these runs counts, a replay does
        gradients = [weight.grad for weight in self.weights]
        self._fresh()
        return Recorded(graph, pool, inputs, outputs, gradients, passes)

    def _warm_up(self, inputs: Sequence[Tensor]) -> None:
        side: Any = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call]
        usual = torch.cuda.current_stream(inputs[0].device)
        side.wait_stream(usual)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.run(*inputs)
                self._fresh()
        usual.wait_stream(side)

    def _capture(self, inputs: Sequence[Tensor]) -> tuple[Any, Pool | None, tuple[Tensor, ...]]:
        graph, pool = torch.cuda.CUDAGraph(), Pool.of(inputs[0].device)
        with torch.cuda.graph(graph, pool=pool.handle, capture_error_mode="thread_local"):
            outputs = self.run(*inputs)
        return graph, pool, outputs

    def _fresh(self) -> None:
        """No gradient that the next run would add to, no rounded weight that it would not round again."""
        for weight in self.weights:
            weight.grad = None
        torch.clear_autocast_cache()
