"""What an attack costs, whatever computes it: images through the U-Net and through the encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from antidreambooth.diffusion.backbone import Backbone


@dataclass
class Passes:
    """Images that went through; a pass back through a network is part of its pass forward."""

    unet: int = 0
    encoder: int = 0


@contextmanager
def counted(backbones: Sequence[Backbone]) -> Iterator[Passes]:
    """Counts for as long as the context lasts."""
    passes = Passes()

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            setattr(passes, name, getattr(passes, name) + len(inputs[0]))

        return hook

    with ExitStack() as hooks:
        for backbone in backbones:
            hooks.enter_context(backbone.unet.register_forward_pre_hook(count("unet")))
            hooks.enter_context(backbone.vae.encoder.register_forward_pre_hook(count("encoder")))
        yield passes
