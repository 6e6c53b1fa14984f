"""What an attack costs, whatever computes it: images through the denoiser and through the encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.recording import PASSES


@dataclass
class Passes:
    """Images that went through; a pass back through a network is part of its pass forward."""

    denoiser: int = 0
    encoder: int = 0


@contextmanager
def counted(backbones: Sequence[Backbone]) -> Iterator[Passes]:
    """Counts for as long as the context lasts, what is replayed from a recording too; known at its end."""
    passes = Passes()

    def count(network: nn.Module, _: object, output: Any) -> None:
        # Some families call their denoiser with keywords or lists: what comes out of all is n images, or holds them.
        PASSES[network] += len(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as hooks:
        watched: list[tuple[str, nn.Module]] = []
        for backbone in backbones:
            watched += backbone.attacked.items()
        for _, network in watched:
            PASSES[network] = 0
            hooks.callback(PASSES.pop, network)
            hooks.enter_context(network.register_forward_hook(count))
        yield passes
        for name, network in watched:
            setattr(passes, name, getattr(passes, name) + PASSES[network])
