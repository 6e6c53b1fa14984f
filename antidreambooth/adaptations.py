"""What a victim trains in the base model, and the files in which others can load the result."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from jaxtyping import Float
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from antidreambooth.backbone import Backbone
from antidreambooth.defaults import Defaults, Role, given
from antidreambooth.dreambooth import DreamBooth
from antidreambooth.errors import InputError
from antidreambooth.loading import load_backbone, quiet


class Adaptation(ABC):
    """A way to fine-tune a base model on a person; ``folder`` is where its result lies in a run's folder."""

    role: ClassVar[Role]
    folder: ClassVar[str]

    @abstractmethod
    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Adds what is to be trained, where it is not there yet, and lets gradients reach it and nothing else."""

    @abstractmethod
    def save(self, backbone: Backbone, folder: Path) -> None:
        """Writes what was trained, as diffusers reads it."""

    @abstractmethod
    def load(self, backbone: Backbone, folder: Path) -> None:
        """Puts what ``save`` wrote into an untouched backbone.

        Raises:
            InputError: it is not there, or was trained from another base model.
        """

    def prompt(self, text: str) -> str:
        """The prompt as the trained model knows it."""
        return text

    def apply(self, backbone: Backbone, training: DreamBooth, seed: int) -> None:
        """Makes an untouched backbone ready to learn, on the device where it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # a LoRA starts from random numbers
            self.prepare(backbone, bool(training.train_text_encoder))
        backbone.to(backbone.alphas_cumprod.device)
        if training.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()

    def surrogate(self, training: DreamBooth, defaults: Defaults) -> DreamBooth:
        """Settings of a surrogate that learns in this way: phases as usual, the learning rate of what is trained."""
        if self.role != "full":
            recipe = defaults.recipe(self.role)
            training = replace(
                training,
                learning_rate=given(training.learning_rate, recipe.learning_rate),
                train_text_encoder=given(training.train_text_encoder, recipe.train_text_encoder),
            )
        return replace(training.completed(defaults), instance_prompt=self.prompt(training.instance_prompt))


class Full(Adaptation):
    """Every weight of the U-Net and, if so set, of the text encoder: DreamBooth as published (arXiv:2208.12242).

    Saved as a whole pipeline's folder, ``model/``.
    """

    role = "full"
    folder = "model"

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Unfreezes the weights."""
        backbone.unet.requires_grad_(True)
        backbone.text_encoder.requires_grad_(train_text_encoder)

    def save(self, backbone: Backbone, folder: Path) -> None:
        """A folder for ``StableDiffusionPipeline.from_pretrained``, which is a backbone of this project, too."""
        with quiet():
            backbone.pipeline().save_pretrained(folder, safe_serialization=True)
        backbone.defaults.write(folder)

    def load(self, backbone: Backbone, folder: Path) -> None:
        """Takes over the U-Net and the text encoder."""
        with _explained(folder):
            trained = load_backbone(str(folder))
            backbone.unet.load_state_dict(trained.unet.state_dict())
            backbone.text_encoder.load_state_dict(trained.text_encoder.state_dict())


class LoRA(Adaptation):
    """Low-rank updates of the attention layers (arXiv:2106.09685), as most people fine-tune today.

    Saved as ``lora/pytorch_lora_weights.safetensors``.

    Args:
        rank: of the updates.
        alpha: their scale is alpha / rank; the rank when not given.
        targets: names of the U-Net's layers that get one.
        text_targets: names of the text encoder's layers that get one, if it is trained.
    """

    role = "lora"
    folder = "lora"

    def __init__(
        self,
        rank: int = 16,
        alpha: int | None = None,
        targets: list[str] = ["to_q", "to_k", "to_v", "to_out.0"],  # noqa: B006 (never changed)
        text_targets: list[str] = ["q_proj", "k_proj", "v_proj", "out_proj"],  # noqa: B006
    ) -> None:
        self.rank, self.alpha, self.targets, self.text_targets = rank, alpha, targets, text_targets

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Adds the updates; only they are trained."""
        parts = [(backbone.unet, self.targets)]
        if train_text_encoder:
            parts.append((backbone.text_encoder, self.text_targets))
        for part, targets in parts:
            names = [name for name, _ in part.named_modules()]
            missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
            if missing:
                raise InputError(f"the {type(part).__name__} has no layers {', '.join(missing)} for a LoRA to change")
            alpha = self.rank if self.alpha is None else self.alpha
            try:
                part.add_adapter(LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=targets))
            except ValueError as error:  # transformers may ask for a newer peft than there is
                raise InputError(f"the {type(part).__name__} takes no LoRA: {error}") from error

    def save(self, backbone: Backbone, folder: Path) -> None:
        """A file for ``pipeline.load_lora_weights``."""

        def layers(part: nn.Module) -> dict[str, Tensor] | None:
            if not getattr(part, "peft_config", None):
                return None
            # Embeddings are never changed; peft would look for a file to see whether they were.
            state: dict[str, Tensor] = convert_state_dict_to_diffusers(
                get_peft_model_state_dict(part, save_embedding_layers=False)
            )
            return state

        def metadata(part: nn.Module) -> dict[str, object] | None:
            config = getattr(part, "peft_config", None)
            if not config:
                return None
            # A set's order changes from run to run, and the metadata with it.
            return {k: sorted(v) if isinstance(v, set) else v for k, v in config["default"].to_dict().items()}

        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers(backbone.unet),
            text_encoder_lora_layers=layers(backbone.text_encoder),
            unet_lora_adapter_metadata=metadata(backbone.unet),
            text_encoder_lora_adapter_metadata=metadata(backbone.text_encoder),
        )

    def load(self, backbone: Backbone, folder: Path) -> None:
        """Adds the trained updates."""
        with _explained(folder):
            backbone.pipeline().load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")


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

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Adds the token, and makes its row of the embedding table the only parameter that is trained."""
        if train_text_encoder:
            raise InputError("textual inversion trains one embedding: leave out --model.training.train_text_encoder")
        ids = backbone.tokenizer.encode(self.initializer, add_special_tokens=False)
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
        with _explained(folder):
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


class Untrained(Adaptation):
    """Nothing at all: the base model fine-tuned on nobody, the control that shows what chance gives."""

    role = "full"
    folder = ""

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """There is nothing to train."""
        raise InputError("Untrained has nothing to train: it is for `test` only")

    def save(self, backbone: Backbone, folder: Path) -> None:
        """There is nothing to save."""

    def load(self, backbone: Backbone, folder: Path) -> None:
        """Leaves the backbone as it is."""


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns what loading raises, whatever it is, into one message with the fix."""
    try:
        yield
    # diffusers, peft and safetensors raise unrelated types for a missing file, another shape, a damaged file.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{folder} holds no result of this victim on this backbone ({reason}): run `fit` with the same "
            f"--model.backbone and --model.adaptation first"
        ) from error
