"""How networks are run: what costs or saves time and memory and changes a result by rounding at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from antidreambooth.diffusion.backbone import Backbone

RECOMPILES = 256  # kinds of one block, by width, number of images, precision and what learns; torch gives up after 8


@dataclass(frozen=True)
class Execution:
    """How the networks of a cloaking run are run.

    Args:
        compile_blocks: whether torch.compile makes kernels for the blocks that denoiser and encoder consist of. The
            first round then takes minutes, which many rounds or many people have to pay back.
        encoder_attention: how the encoder's attention, one very wide head, is computed: in one ``fused`` operation, or
            by matrix ``products``, which keep all weights of the attention in memory.
        decoder_rests: whether the decoder, which no round needs, is in main memory until a picture is drawn.
    """

    compile_blocks: bool = False
    encoder_attention: Literal["fused", "products"] = "fused"
    decoder_rests: bool = False

    def prepare(self, backbone: Backbone) -> None:
        """Makes a backbone ready, once what learns in it has been added."""
        if self.encoder_attention == "products":
            backbone.attend_by_products()
        if self.compile_blocks:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
            for block in backbone.blocks():
                block.compile(dynamic=False)
