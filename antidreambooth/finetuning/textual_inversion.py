"""The embedding of one new token learns."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.integrity import unusable
from antidreambooth.diffusion.layout import family_of
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError
from antidreambooth.finetuning.adaptation import Adaptation, explained
from antidreambooth.finetuning.dreambooth import DreamBooth


class TextualInversion(Adaptation):
    """The embedding of one new token, everything else frozen (arXiv:2208.01618).

    Saved as ``textual_inversion/learned_embeds.safetensors``.

    Args:
        token: the new token.
        identifier: the word of the prompts that it stands for.
        initializer: the word whose embedding it starts from.
    """

    role = "textual_inversion"
    folder = "textual_inversion"
    file = "learned_embeds.safetensors"

    def __init__(self, token: str = "<sks>", identifier: str = "sks", initializer: str = "person") -> None:  # noqa: S107
        self.token, self.identifier, self.initializer = token, identifier, initializer

    def prompt(self, text: str) -> str:
        """The token where the identifier stood."""
        return re.sub(rf"(?<!\w){re.escape(self.identifier)}(?!\w)", lambda _: self.token, text)

    def teaches_text(self, training: DreamBooth) -> bool:
        """Always: an embedding is part of it."""
        return True

    def require_learnable(self, source: Source) -> None:
        """Refuses a family that takes no new words.

        Raises:
            InputError: it does not.
        """
        super().require_learnable(source)
        if not (kind := family_of(source)).inverts_text:
            raise InputError(
                f"textual inversion does not work with {kind.family}: use LoRA or Full (--model.adaptation), in the "
                "config file, too"
            )

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Adds the token, and makes its row of the embedding table the only parameter that is trained."""
        if train_text_encoder:
            raise InputError("textual inversion trains one embedding: leave out --model.training.train_text_encoder")
        ids = backbone.tokenizer.encode(self.initializer, add_special_tokens=False)
        if not ids:  # the mean of nothing is NaN
            raise InputError(f"--model.adaptation.initializer {self.initializer!r} is no word to start from")
        if self.token in backbone.tokenizer.get_vocab():  # add_tokens counts such a token as added
            raise InputError(f"the tokenizer knows {self.token} already: choose another --model.adaptation.token")
        backbone.tokenizer.add_tokens(self.token)
        with torch.no_grad():
            backbone.text_encoder.resize_token_embeddings(len(backbone.tokenizer), mean_resizing=False)
            table = backbone.text_encoder.get_input_embeddings()
            table.weight[-1] = table.weight[ids].mean(dim=0)
        table.requires_grad_(False)
        parametrize.register_parametrization(table, "weight", LastRow(table.weight[:-1].clone()))
        table.parametrizations.weight.original.requires_grad_(True)

    def save(self, backbone: Backbone, folder: Path) -> None:
        """A file for ``pipeline.load_textual_inversion``."""
        folder.mkdir(parents=True, exist_ok=True)
        row = backbone.text_encoder.get_input_embeddings().weight[-1].detach().cpu().clone()
        save_file({self.token: row}, folder / self.file)

    def load(self, backbone: Backbone, folder: Path) -> None:
        """Adds the trained token."""
        with explained(folder):
            found = load_file(folder / self.file)
            if wrong := unusable(found):
                raise InputError(f"{self.file} {wrong}")
            if [*found] != [self.token]:  # the prompts would ask for a token that nobody has trained
                raise InputError(f"{self.file} holds {', '.join(found) or 'nothing'}, not {self.token}")
            backbone.pipeline().load_textual_inversion(folder, weight_name=self.file)


class LastRow(nn.Module):
    """An embedding table whose last row is the parameter; the others stand still.

    Args:
        others: the rows before it, n d.
    """

    others: Tensor

    def __init__(self, others: Float[Tensor, "n d"]) -> None:
        super().__init__()
        self.register_buffer("others", others, persistent=False)

    def forward(self, row: Float[Tensor, "1 d"]) -> Float[Tensor, "m d"]:
        """The whole table."""
        return torch.cat([self.others, row])

    def right_inverse(self, table: Float[Tensor, "m d"]) -> Float[Tensor, "1 d"]:
        """The parameter out of a whole table."""
        return table[-1:].clone()
