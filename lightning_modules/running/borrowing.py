"""How the weights that learn are lent out under each kind of strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.finetuning.weights import Weights


def weights_of(
    strategy: Strategy, backbone: Backbone, optimizer: Optimizer, backward: Callable[[Tensor], object]
) -> Weights:
    """What of a backbone learns, lent out as the strategy wants it."""
    if isinstance(strategy, DeepSpeedStrategy):
        return ZeroWeights(strategy.model, optimizer, backward)
    if isinstance(strategy, ModelParallelStrategy):
        return ShardedWeights(backbone, optimizer, backward)
    return Weights(backbone.learned(), optimizer, backward)


class ShardedWeights(Weights):
    """Under FSDP2: each rank keeps and restores its own shards.

    Args:
        backbone: whose weights these are.
        optimizer: over them.
        backward: of the trainer.
    """

    def __init__(self, backbone: Backbone, optimizer: Optimizer, backward: Callable[[Tensor], object]) -> None:
        super().__init__(backbone.learned(), optimizer, backward)
        self.modules = [module for module in backbone.modules() if isinstance(module, FSDPModule)]

    def snapshot(self) -> list[Tensor]:
        """Copies of the shards; a forward pass without a backward one would have left whole weights in their place."""
        for module in self.modules:
            module.reshard()
        return super().snapshot()

    def restore(self, kept: list[Tensor]) -> None:
        """Puts the shards back in place."""
        for module in self.modules:
            module.reshard()
        super().restore(kept)


class ZeroWeights(Weights):
    """Under DeepSpeed's ZeRO: what counts are the optimizer's own fp32 weights, of which each rank has a part.

    Args:
        engine: DeepSpeed's, in which the strategy has wrapped the module.
        optimizer: Lightning's, around DeepSpeed's.
        backward: of the trainer.
    """

    def __init__(self, engine: Any, optimizer: Optimizer, backward: Callable[[Tensor], object]) -> None:
        self.zero = engine.optimizer
        self.partitioned = hasattr(self.zero, "fp32_partitioned_groups_flat")  # stage 3
        super().__init__(self.masters(), optimizer, backward)

    def masters(self) -> list[Any]:
        """This rank's part of the fp32 weights."""
        zero = self.zero
        return list(zero.fp32_partitioned_groups_flat if self.partitioned else zero.single_partition_of_fp32_groups)

    @torch.no_grad()
    def restore(self, kept: list[Tensor]) -> None:
        """Restores the fp32 weights, then what the network computes with: else the next step overwrites it."""
        super().restore(kept)
        zero = self.zero
        if not self.partitioned:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def step(self, loss: Tensor) -> None:
        """One optimizer step; DeepSpeed has dropped the gradients after it."""
        self.backward(loss)
        self.optimizer.step()
        torch.clear_autocast_cache()
