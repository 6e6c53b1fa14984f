"""What victim and pretraining share: one epoch that is the whole training, and a result only if that worked."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.errors import InputError
from antidreambooth.finetuning.adaptation import Adaptation
from lightning_modules.backbone_module import BackboneModule
from lightning_modules.running.borrowing import weights_of

LOOK = 25  # steps between two looks at whether the training still works


class Training(BackboneModule):
    """A run that trains a model: one epoch of ``steps`` batches, after which ``trained()`` is saved.

    A subclass calls ``watch`` in each step. Whether a loss is finite is noted on the device, and copied from there
    every ``LOOK`` steps, before a checkpoint is written and at the end, together with a look at the weights: a
    gradient that is not finite makes weights that are not.
    """

    rate: ClassVar[str]  # the flags that the messages name
    length: ClassVar[str]

    adaptation: Adaptation
    steps: int | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._untouched: str | None = None  # fingerprint of what learns, before it does
        self._first = self._seen = 0  # the first step of this process, and how many it did
        self._finite = torch.empty(0)  # of these, how many in a row had a finite loss; on the device
        self._unbroken = torch.empty(0)  # whether all had one

    def setup(self, stage: str) -> None:
        """Refuses a second epoch, which would train once more with the same draws."""
        super().setup(stage)
        if stage == "fit" and self.trainer.max_epochs != 1:
            raise InputError(
                f"--trainer.max_epochs is 1, as one epoch is the whole training: got {self.trainer.max_epochs}; its "
                f"length is {self.length}"
            )

    def note_untouched(self) -> None:
        """Call it while no weight has learned anything, nor been split over ranks."""
        self._untouched = self.backbone.learned_fingerprint()

    def on_train_start(self) -> None:
        """Nothing is seen yet."""
        super().on_train_start()
        self._first = self._seen = 0
        self._finite = torch.zeros((), dtype=torch.int64, device=self.device)
        self._unbroken = torch.ones((), dtype=torch.bool, device=self.device)

    def watch(self, loss: Tensor, batch_idx: int) -> None:
        """Notes, on the device, whether a step's loss is a finite number."""
        if not self._seen:
            self._first = batch_idx
        self._unbroken &= loss.detach().isfinite()
        self._finite += self._unbroken
        self._seen += 1

    def on_train_batch_end(self, *args: Any) -> None:
        """The step is whole."""
        if self._seen % LOOK == 0:
            self.require_vital()
        self.preemption.leave_if_asked(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint that cannot be resumed never replaces one that can."""
        self.require_vital()
        super().on_save_checkpoint(checkpoint)

    def on_train_end(self) -> None:
        """The last look, before anything is saved."""
        self.require_vital()

    def require_vital(self) -> None:
        """Ends a training that has diverged; every rank has to ask.

        Raises:
            InputError: a loss or a weight of any rank is no finite number.
        """
        if not self._seen:
            return
        signs = torch.stack([self._finite, self.weight_norm().isfinite().to(self._finite)])
        if self.trainer.world_size > 1:
            dist.all_reduce(signs, dist.ReduceOp.MIN)
        finite, weights = signs.tolist()  # the one copy from the device
        if finite == self._seen and weights:
            return
        what, step = ("the loss", finite + 1) if finite < self._seen else ("a weight", self._seen)
        ways = [f"a lower {self.rate}", "--trainer.precision 32-true", "another base model"]
        raise InputError(
            f"{what} is no finite number any more in step {self._first + step} of {self.steps}: the training diverged, "
            f"and nothing of it is saved; try {', '.join(ways[:-1])} or {ways[-1]}"
        )

    def weight_norm(self) -> Tensor:
        """Norm of all weights that are saved, or of this rank's part of them; not finite as soon as one is not."""
        optimizer = cast(Optimizer, self.optimizers())
        return weights_of(self.trainer.strategy, self.backbone, optimizer, self.manual_backward).norm()

    def whole(self) -> Backbone:
        """The backbone with all of its weights in one place; every rank has to ask."""
        return self.backbone

    def trained(self) -> Backbone:
        """What is saved; every rank has to ask.

        Raises:
            InputError: nothing was learned.
        """
        whole = self.whole()
        if whole.learned_fingerprint() == self._untouched:
            raise InputError(
                f"nothing was learned: after step {self.trainer.global_step} every weight is as it was, bit for bit, "
                f"so nothing is saved; try a higher {self.rate}, a shorter warm-up or more steps ({self.length})"
            )
        return whole
