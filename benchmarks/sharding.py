"""Memory of one rank where several share the states: FSDP2 run on fake ranks, DeepSpeed's ZeRO by arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from antidreambooth.diffusion.backbone import Backbone
from lightning_modules.running.sharding import blocks

BUCKET = 200_000_000  # values that are reduced at a time: Lightning's default for DeepSpeed
LIVE = 1_000_000_000  # weights that stage 3 keeps gathered at most: DeepSpeed's default


@contextmanager
def fake_ranks(count: int) -> Iterator[DeviceMesh]:
    """The first of ``count`` ranks whose collectives take memory and move nothing; enter it before fake tensors."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


def shard(backbone: Backbone, mesh: DeviceMesh) -> None:
    """As the FSDP2 strategy does it: block by block, the networks that learn."""
    for part in (backbone.unet, backbone.text_encoder):
        if any(parameter.requires_grad for parameter in part.parameters()):
            for module in [*blocks(part), part]:
                fully_shard(module, mesh=mesh)


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's ZeRO over fp32 networks, which compute in bf16 under autocast: bytes of one rank.

    DeepSpeed shares out the masters of what learns (a copy, though the networks are fp32, too), their AdamW moments,
    the copy of the masters that a round borrows, and the gradients.

    Args:
        stage: 2 (each rank has all weights) or 3 (it has its part, and gathers what it computes with).
        ranks: that share.
        trained: weights that learn.
        frozen: those that do not.
        offload: whether masters, moments and the borrowed copy are in main memory, as are the gradients once reduced.
    """

    stage: Literal[2, 3]
    ranks: int
    trained: int
    frozen: int
    offload: bool = False

    @property
    def name(self) -> str:
        """In the table."""
        return "DeepSpeed offload" if self.offload else f"ZeRO-{self.stage} over {self.ranks}"

    @property
    def weights(self) -> int:
        """The networks' weights, those that are gathered for a while included."""
        everything = self.trained + self.frozen
        return 4 * everything if self.stage == 2 else 4 * self.share(everything) + 4 * min(everything, LIVE)

    @property
    def buckets(self) -> int:
        """Gradients on their way: two buckets where they overlap with the backward pass (stage 2), one in stage 3."""
        return 4 * min(self.trained, BUCKET) * (2 if self.stage == 2 else 1)

    @property
    def host(self) -> int:
        """Bytes of main memory."""
        return self.share(20 * self.trained) if self.offload else 0  # masters, copy, gradients 4 each, moments 8

    def peak(self, work: int, learns: bool, borrows: bool = True) -> int:
        """Most bytes in a phase.

        Args:
            work: what the phase computes with, beside the states: activations and their gradients.
            learns: whether it takes optimizer steps.
            borrows: whether a copy of the weights is kept meanwhile.
        """
        masters = 0 if self.offload else self.share(4 * self.trained)
        copy = masters if borrows else 0
        if not learns:
            return self.weights + masters + copy + work
        states = self.weights + masters + copy + 2 * masters  # two moments, each as large as the masters
        reduced = 0 if self.offload else self.share(4 * self.trained)
        backward, step = self.buckets + reduced + work, 2 * reduced  # as reduced, and flat for the optimizer
        return states + max(backward, step)

    def share(self, total: int) -> int:
        """One rank's part, rounded up."""
        return -(-total // self.ranks)


def let_go(parameters: Iterable[Tensor]) -> None:
    """Drops each gradient as soon as it is there, as it leaves for its rank under ZeRO."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(drop)
