"""Splitting networks over ranks, and putting them together again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from antidreambooth.diffusion.backbone import Backbone


def sharded(strategy: Strategy) -> bool:
    """Whether no rank has all weights: then every rank has to take part in every forward pass."""
    return isinstance(strategy, ModelParallelStrategy) or (
        isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    )


def shard(strategy: Strategy, backbone: Backbone) -> None:
    """Under FSDP2, splits the networks that learn over the ranks, block by block; leaves them alone otherwise."""
    if not isinstance(strategy, ModelParallelStrategy):
        return
    mesh = strategy.device_mesh["data_parallel"]
    for part in (backbone.denoiser, *backbone.text_encoders.values()):
        if not any(parameter.requires_grad for parameter in part.parameters()):
            continue
        for module in blocks(part):
            fully_shard(module, mesh=mesh)
        fully_shard(part, mesh=mesh)


def blocks(part: nn.Module) -> list[nn.Module]:
    """The pieces that are gathered at a time: what a network holds in lists of modules, such as its levels."""
    found: list[nn.Module] = []
    for child in part.children():
        found += child if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def gathered(strategy: Strategy, backbone: Backbone) -> dict[str, Tensor]:
    """What of a backbone has been trained, whole and in main memory; every rank has to ask at the same time."""
    learned = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    if isinstance(strategy, ModelParallelStrategy):
        return {name: cast(DTensor, parameter).full_tensor().detach().cpu() for name, parameter in learned.items()}
    from deepspeed.runtime.zero import GatheredParameters

    whole: dict[str, Tensor] = {}
    for name, parameter in learned.items():
        with GatheredParameters([parameter]):
            whole[name] = parameter.detach().cpu().clone()
    return whole


@contextmanager
def whole_at_birth(strategy: Strategy) -> Iterator[None]:
    """Inside, weights are made and read whole: DeepSpeed's stage 3 splits what is made otherwise as it is made."""
    if not (isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()
