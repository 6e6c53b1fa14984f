"""The trainable weights: lent for a phase, stepped, given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


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

    def snapshot(self) -> list[Tensor]:
        """Copies of the weights, or of this process's part of them."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, kept: list[Tensor]) -> None:
        """Puts copies back in place."""
        for parameter, value in zip(self.parameters, kept, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def norm(self) -> Float[Tensor, ""]:
        """Norm of all weights, or of this process's part of them; no copy from the device."""
        parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in self.parameters]
        return get_total_norm(parts).float()

    def step(self, loss: Float[Tensor, ""]) -> None:
        """One optimizer step; leaves no gradient behind."""
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Autocast keeps its low-precision copies of the weights until its context ends, which is a whole round here:
        # without this, every later step of the round would see the weights of the first.
        torch.clear_autocast_cache()

    def forget(self) -> None:
        """Back to zero moments: the published algorithm makes a fresh AdamW for every phase."""
        self.optimizer.state.clear()
