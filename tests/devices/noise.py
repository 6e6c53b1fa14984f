"""Noise without a generator of the device: where there is none, or where two devices are to draw the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from antidreambooth.diffusion.seeding import Turn


class Elsewhere(torch.Generator):
    """A generator of the CPU that says it is one of another device."""

    where: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """What it says."""
        return self.where

    @classmethod
    def of(cls, device: torch.device, seed: int) -> Elsewhere:
        """A seeded one for a device; torch's own constructor takes no more arguments."""
        made = cls()
        made.where = device
        made.manual_seed(seed)
        return made


class FromCPU(TorchFunctionMode):
    """What such a generator is asked for is drawn on the CPU and copied to the device that is named."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function."""
        kwargs = dict(kwargs or {})
        if not isinstance(kwargs.get("generator"), Elsewhere):
            return func(*args, **kwargs)
        device = torch.device(kwargs.pop("device"))
        assert device.type == kwargs["generator"].device.type, "a generator draws on its own device only"
        return func(*args, **kwargs, device="cpu").to(device)


@contextmanager
def same_noise(kind: Callable[[], TorchFunctionMode] = FromCPU) -> Iterator[None]:
    """Inside, rounds and victims draw the same on every device.

    Args:
        kind: how a draw is made.
    """
    usual = Turn.generator

    def generator(turn: Turn, device: torch.device) -> torch.Generator:
        return Elsewhere.of(device, usual(turn, torch.device("cpu")).initial_seed())

    with patch.object(Turn, "generator", generator), kind():
        yield
