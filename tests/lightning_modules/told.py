"""A callback for the tests of preemption; runs inside the processes that they start."""

import os

from lightning import Callback


class Told(Callback):
    """Sends this process a signal while a round, or a step of a victim, is under way."""

    def __init__(self, number: int, epoch: int, step: int = 0):
        self.number, self.epoch, self.step = number, epoch, step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.current_epoch == self.epoch and trainer.global_step >= self.step:
            os.kill(os.getpid(), self.number)
