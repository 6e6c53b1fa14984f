"""A callback for the tests of several ranks: the first one comes upon an error that the others know nothing of."""

from lightning import Callback

from antidreambooth.errors import InputError


class RankStops(Callback):
    """As a disk does that fills up."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            raise InputError("the first rank cannot go on")
