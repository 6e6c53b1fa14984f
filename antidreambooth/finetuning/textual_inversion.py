"""The embedding of one new token learns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
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

    Of a base model with several text encoders, each that the official file has a place for learns its own. Saved as
    ``textual_inversion/learned_embeds.safetensors``.

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

    def require_learnable(self, source: Source, training: DreamBooth) -> None:
        """Also refuses a family whose official pipeline loads no new words, and a text encoder that learns besides."""
        self._check(family_of(source), bool(training.train_text_encoder))
        super().require_learnable(source, training)

    def _check(self, kind: type[Backbone], train_text_encoder: bool) -> None:
        if not kind.inverted:
            raise InputError(
                f"textual inversion does not work with {kind.family}: use LoRA or Full (--model.adaptation), in the "
                "config file, too"
            )
        if train_text_encoder:
            raise InputError("textual inversion trains one embedding: leave out --model.training.train_text_encoder")

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Adds the token, and makes its row of each embedding table the only parameter that is trained."""
        self._check(type(backbone), train_text_encoder)
        for encoder, tokenizer, _ in self._places(backbone):
            ids = tokenizer.encode(self.initializer, add_special_tokens=False)
            if not ids:  # the mean of nothing is NaN
                raise InputError(f"--model.adaptation.initializer {self.initializer!r} is no word to start from")
            if self.token in tokenizer.get_vocab():  # add_tokens counts such a token as added
                raise InputError(f"the tokenizer knows {self.token} already: choose another --model.adaptation.token")
            tokenizer.add_tokens(self.token)
            with torch.no_grad():
                encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
                table = encoder.get_input_embeddings()
                table.weight[-1] = table.weight[ids].mean(dim=0)
            table.requires_grad_(False)
            parametrize.register_parametrization(table, "weight", LastRow(table.weight[:-1].clone()))
            table.parametrizations.weight.original.requires_grad_(True)

    def save(self, backbone: Backbone, folder: Path) -> None:
        """A file for ``pipeline.load_textual_inversion``."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = {}
        for encoder, _, key in self._places(backbone):
            row = encoder.get_input_embeddings().weight[-1].detach().cpu().clone()
            rows[key or self.token] = row[None] if key else row  # of a file with such keys, all programs expect a table
        # Where no key is the token, the file says it otherwise: diffusers alone has to be told.
        save_file(rows, folder / self.file, None if self.token in rows else {"token": self.token})

    def load(self, backbone: Backbone, folder: Path) -> None:
        """Adds the trained token."""
        with explained(folder):
            with safe_open(folder / self.file, "pt") as opened:
                found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
                token = (opened.metadata() or {}).get("token", self.token)
            if wrong := unusable(found):
                raise InputError(f"{self.file} {wrong}")
            wanted = sorted(key or self.token for _, _, key in self._places(backbone))
            if sorted(found) != wanted:  # the prompts would ask for a token that nobody has trained
                raise InputError(f"{self.file} holds {', '.join(found) or 'nothing'}, not {' and '.join(wanted)}")
            if token != self.token:
                raise InputError(f"{self.file} holds {token}, not {self.token}")
            pipeline = backbone.pipeline()
            for encoder, tokenizer, key in self._places(backbone):
                row = found[key or self.token]
                pipeline.load_textual_inversion(row, token=self.token, tokenizer=tokenizer, text_encoder=encoder)

    def _places(self, backbone: Backbone) -> list[tuple[Any, Any, str]]:
        """Each text encoder that learns the token, its tokenizer, and what its vector is called in the file."""
        return [
            (getattr(backbone, name), getattr(backbone, name.replace("text_encoder", "tokenizer")), key)
            for name, key in backbone.inverted.items()
        ]


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
