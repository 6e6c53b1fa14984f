"""How networks are run: what costs or saves time and memory and changes a result by rounding at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from antidreambooth.diffusion.backbone import Backbone

Networks = Literal["none", "encoder", "all"]  # the encoder works on whole pictures: that is where most bytes move
RECOMPILES = 256  # kinds of one block, by width, number of images, precision and what learns; torch gives up after 8


@dataclass(frozen=True)
class Execution:
    """How the networks of a cloaking run are run.

    Args:
        compile_blocks: of which networks torch.compile makes kernels for the blocks that they consist of. The first
            round then takes longer, by seconds for the encoder and by minutes for all, which later ones pay back.
        channels_last: which networks keep the channels of a pixel together in memory, as convolutions want it.
        encoder_attention: how the encoder's attention, one very wide head, is computed: in one ``fused`` operation, or
            by matrix ``products``, which keep all weights of the attention in memory.
        decoder_rests: whether the decoder, which no round needs, is in main memory until a picture is drawn.
        recorded: whether a GPU replays the kernels of a PGD step and of a training step, recorded once as CUDA graphs,
            rather than be told each of them by Python: less time, more memory; for one process.
    """

    compile_blocks: Networks = "none"
    channels_last: Networks = "none"
    encoder_attention: Literal["fused", "products"] = "fused"
    decoder_rests: bool = False
    recorded: bool = False

    def prepare(self, backbone: Backbone) -> None:
        """Makes a backbone ready, once what learns in it has been added and before an optimizer knows its weights."""
        if self.encoder_attention == "products":
            backbone.attend_by_products()
        for network in _chosen(self.channels_last, backbone):
            network.to(memory_format=torch.channels_last)
        for network in _chosen(self.compile_blocks, backbone):
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
            for block in backbone.blocks(network):
                block.compile(dynamic=False)


def _chosen(which: Networks, backbone: Backbone) -> list[nn.Module]:
    """The networks that PGD goes through, or some of them."""
    networks: dict[Networks, list[nn.Module]] = {
        "none": [],
        "encoder": [backbone.vae.encoder],
        "all": [backbone.vae.encoder, backbone.unet],
    }
    return networks[which]
