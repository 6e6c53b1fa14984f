"""A callback that breaks a weight on the second rank alone, after the last step."""

import torch
from lightning import Callback


class RankBreaks(Callback):
    """For the tests of several ranks."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 3:
            with torch.no_grad():
                module.backbone.text_encoder.get_input_embeddings().weight.view(-1)[0] = torch.nan
