"""Strategies that both modules run under: Lightning's, with what they need said once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.nn.parallel import DistributedDataParallel

from antidreambooth.errors import InputError, require

SUPPORTED = "auto (one device), ddp, or the files of configs/trainer (deepspeed-2, deepspeed-3, fsdp)"


class DDP(DDPStrategy):
    """Every rank has the whole model. Buffers are not sent: they are the same on every rank."""

    def configure_ddp(self) -> None:
        """Lightning's, by the name that this torch has for it: 2.11 knows the older one alone."""
        known = signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        self._ddp_kwargs.setdefault(name, False)
        super().configure_ddp()


class Autocast(DeepSpeedPrecision):
    """bf16-mixed as under every other strategy: fp32 weights, low precision inside autocast.

    Lightning's own hands it to DeepSpeed, which casts the network, and inputs have to be cast as well.
    """

    def convert_input(self, data: Any) -> Any:
        """Nothing is cast: autocast does."""
        return data

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast around every step."""
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


class DeepSpeed(DeepSpeedStrategy):
    """DeepSpeed's ZeRO (arXiv:1910.02054), with fp32 weights.

    Args:
        stage: what is split over the ranks: 1 optimizer states, 2 also gradients, 3 also weights.
        offload_optimizer: whether optimizer states and fp32 weights rest in main memory.
        offload_parameters: stage 3: whether weights rest there, too.
    """

    def __init__(self, stage: int = 2, offload_optimizer: bool = False, offload_parameters: bool = False) -> None:
        require("stage", stage, 1, 3)
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            logging_batch_size_per_gpu=1,  # it would ask the loader, which has no batch size
            exclude_frozen_parameters=True,
        )
        if offload_optimizer:
            assert self.config is not None  # made of the arguments above
            self.config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW serves there, too, and is what we test

    def setup_environment(self) -> None:
        """Refuses a CPU, as Lightning does."""
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise InputError("DeepSpeed needs GPUs: processes on CPUs use --trainer.strategy ddp, or FSDP2")
        super().setup_environment()

    @property
    def precision_plugin(self) -> Any:
        """What computes in low precision."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        self._precision_plugin = Autocast("bf16-mixed") if plugin and plugin.precision == "bf16-mixed" else plugin

    def _format_config(self) -> None:
        """Lightning's, without a precision for DeepSpeed to cast to."""
        self._format_batch_size_and_grad_accum_config()


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism: weights, gradients and optimizer states are split over all ranks.

    One file holds a checkpoint, which any number of ranks goes on with.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Takes all ranks there are."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def check(strategy: Strategy) -> None:
    """Refuses a strategy under which weights cannot be lent out, or which nobody has tried.

    Raises:
        InputError: it is one of those.
    """
    if not (replicates(strategy) or isinstance(strategy, DeepSpeed | FSDP2)):
        raise InputError(f"--trainer.strategy {type(strategy).__name__} is not supported: use {SUPPORTED}")


def replicates(strategy: Strategy) -> bool:
    """Whether each process has the whole of everything: one device, or DDP, of which DeepSpeed's is a subclass."""
    ddp = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    return ddp or isinstance(strategy, SingleDeviceStrategy)


def tolerates_unused(strategy: Strategy) -> bool:
    """Whether a step may leave some of the weights without a gradient: DDP that looks for unused parameters."""
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, DDPStrategy):
        return False
    return bool(strategy._ddp_kwargs.get("find_unused_parameters"))
