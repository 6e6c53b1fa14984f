"""The trainable weights: lent for a phase, stepped, given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer

BUCKET = 2**25  # values in an allocation of several moments: about as many as the largest weights have
ALIGNED = 64  # values from one moment to the next are a multiple of it, as the allocator would have it


class Weights:
    """The trainable weights and their optimizer: lent out, stepped, and rid of moments.

    Args:
        parameters: what is trained.
        optimizer: over these parameters.
        backward: computes their gradients from a loss; a training framework brings its own.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        optimizer: Optimizer,
        backward: Callable[[Tensor], object] = Tensor.backward,
    ) -> None:
        self.parameters, self.optimizer, self.backward = parameters, optimizer, backward

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Theta' as long as the context lasts, theta afterwards: bit for bit a deep copy, at half its cost."""
        kept = self.snapshot()
        try:
            yield
        finally:
            self.restore(kept)
            torch.clear_autocast_cache()

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """Copies of the weights, or of this process's part of them."""
        kept = [torch.empty_like(parameter) for parameter in self.parameters]
        torch._foreach_copy_(_local(kept), _local(self.parameters))  # a few kernels for all of them
        return kept

    @torch.no_grad()
    def restore(self, kept: list[Tensor]) -> None:
        """Puts copies back in place."""
        torch._foreach_copy_(_local(self.parameters), _local(kept))

    @torch.no_grad()
    def norm(self) -> Float[Tensor, ""]:
        """Norm of all weights, or of this process's part of them; no copy from the device."""
        return get_total_norm(_local(self.parameters)).float()

    def step(self, loss: Float[Tensor, ""]) -> None:
        """One optimizer step; leaves no gradient behind."""
        self.backward(loss)
        self.update()

    def update(self) -> None:
        """The same with gradients that are there already."""
        self._make_moments()
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Autocast keeps its low-precision copies of the weights until its context ends, which is a whole round here:
        # without this, every later step of the round would see the weights of the first.
        torch.clear_autocast_cache()

    def forget(self) -> None:
        """Back to zero moments: the published algorithm makes a fresh AdamW for every phase."""
        self.optimizer.state.clear()

    def _make_moments(self) -> None:
        """Zero moments for all weights, a few at a time; AdamW would make each of them with three kernels of its own.

        That is 2,600 kernels in the first step of every phase for Stable Diffusion, which cost more than the step.
        """
        learned, states = self.parameters, self.optimizer.state
        fused = isinstance(self.optimizer, AdamW) and all(group["fused"] for group in self.optimizer.param_groups)
        if not fused or any(isinstance(weight, DTensor) for weight in learned) or any(one in states for one in learned):
            return
        steps = torch.zeros(len(learned), dtype=torch.float32, device=learned[0].device).unbind()
        for weight, step, first, second in zip(learned, steps, zeros_like(learned), zeros_like(learned), strict=True):
            states[weight] = {"step": step, "exp_avg": first, "exp_avg_sq": second}


def _local(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights, or this process's part of them."""
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]


def zeros_like(weights: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in the shape and layout of weights of one kind on one device, several in an allocation."""
    buckets: list[list[Tensor]] = []
    room = 0
    for weight in weights:
        if not buckets or weight.numel() > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(weight)
        room -= _spread(weight)
    made: list[Tensor] = []
    for bucket in buckets:
        flat = bucket[0].new_zeros(sum(map(_spread, bucket)))
        for weight, part in zip(bucket, torch.split(flat, [*map(_spread, bucket)]), strict=True):
            made.append(part.as_strided(weight.shape, weight.stride(), part.storage_offset()))
    return made


def _spread(weight: Tensor) -> int:
    """Values that a tensor takes in an allocation."""
    return -(-weight.numel() // ALIGNED) * ALIGNED
