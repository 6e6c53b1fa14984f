"""Low-rank updates learn: what most people use today."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import DIFFUSERS_OLD_TO_PEFT, DIFFUSERS_TO_PEFT, convert_state_dict
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.integrity import listed, unusable
from antidreambooth.diffusion.libraries import quiet
from antidreambooth.diffusion.precision import taken_for_fp32
from antidreambooth.errors import InputError, require
from antidreambooth.finetuning.adaptation import Adaptation, explained
from antidreambooth.finetuning.dreambooth import learning_encoders

FILE = "pytorch_lora_weights.safetensors"
MATRICES = ("lora_A", "lora_B")  # of an update, as peft calls them


class LoRA(Adaptation):
    """Low-rank updates of some layers (arXiv:2106.09685), as most people fine-tune today.

    Saved as ``lora/pytorch_lora_weights.safetensors``.

    Args:
        rank: of the updates.
        alpha: their scale is alpha / rank; the rank when not given.
        targets: names of the denoiser's layers that get one; the usual ones of the base model's family when not given.
        text_targets: names of the text encoder's layers that get one, if it is trained.
    """

    role = "lora"
    folder = "lora"

    def __init__(
        self,
        rank: int = 16,
        alpha: int | None = None,
        targets: list[str] | None = None,
        text_targets: list[str] = ["q_proj", "k_proj", "v_proj", "out_proj"],  # noqa: B006 (never changed)
    ) -> None:
        require("rank", rank, 1)
        require("alpha", alpha, 1)
        self.rank, self.alpha, self.targets, self.text_targets = rank, alpha, targets, text_targets

    def prepare(self, backbone: Backbone, train_text_encoder: bool) -> None:
        """Adds the updates; only they are trained."""
        parts = [(backbone.denoiser, self.targets or backbone.lora_layers)]
        if train_text_encoder:
            parts += [(encoder, self.text_targets) for encoder in learning_encoders(backbone)]
        for part, targets in parts:
            missing = [target for target in targets if not _matching(part, [target])]
            if missing:
                raise InputError(f"the {type(part).__name__} has no layers {', '.join(missing)} for a LoRA to change")
            alpha = self.rank if self.alpha is None else self.alpha
            try:
                with taken_for_fp32(part):
                    part.add_adapter(LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=targets))
            except ValueError as error:  # transformers may ask for a newer peft than there is
                raise InputError(f"the {type(part).__name__} takes no LoRA: {error}") from error

    def save(self, backbone: Backbone, folder: Path) -> None:
        """A file for ``pipeline.load_lora_weights``."""
        given: dict[str, object] = {}
        for name in adapted(backbone):
            part = getattr(backbone, name)
            # Embeddings are never changed; peft would look for a file to see whether they were.
            layers = get_peft_model_state_dict(part, save_embedding_layers=False)
            # A denoiser's names stay peft's: the older ones exist for some layers only, and of a mixed file not all is
            # loaded. Text encoders' loaders want the older ones.
            older = part is not backbone.denoiser
            given[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(layers) if older else layers
            # A set's order changes from run to run, and the metadata with it.
            config = part.peft_config["default"].to_dict().items()
            given[f"{name}_lora_adapter_metadata"] = {k: sorted(v) if isinstance(v, set) else v for k, v in config}
        backbone.official.save_lora_weights(folder, **given)

    def load(self, backbone: Backbone, folder: Path) -> None:
        """Adds the trained updates."""
        with explained(folder), quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*inconsistency was discovered between the PEFT config.*")  # ours to say
            *found, metadata = backbone.official.lora_state_dict(
                folder,
                weight_name=FILE,
                return_lora_metadata=True,
                unet_config=backbone.denoiser.config,  # other trainers number SDXL's blocks from input to output
            )
            state = found[0]  # of older pipelines the alphas follow
            if wrong := unusable(state):
                raise InputError(f"{FILE} {wrong}")
            there = _peft_names(backbone, state)
            _require_pairs(there)
            backbone.pipeline().load_lora_weights(folder, weight_name=FILE)
            _require_whole(backbone, there, metadata or {})


def adapted(backbone: Backbone) -> list[str]:
    """The components that hold low-rank updates."""
    names = (backbone.denoiser_name(), *backbone.text_encoders)
    return [name for name in names if getattr(getattr(backbone, name), "peft_config", None)]


def _matching(network: nn.Module, targets: list[str]) -> list[str]:
    """The layers that peft changes for some targets."""
    names = [name for name, _ in network.named_modules()]
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def _peft_names(backbone: Backbone, state: Mapping[str, Tensor]) -> set[str]:
    """Names of a file's weights as peft has them: what official loaders make of older and of other trainers' ones."""
    own = {name: values for name, values in state.items() if name.startswith(f"{backbone.denoiser_name()}.")}
    others = {name: values for name, values in state.items() if name not in own}
    for older in (DIFFUSERS_OLD_TO_PEFT, DIFFUSERS_TO_PEFT):
        others = convert_state_dict(others, older)
    names = {*convert_unet_state_dict_to_peft(own), *others}
    for part, encoder in backbone.text_encoders.items():
        if not hasattr(encoder, "text_model"):  # CLIP has one level more in transformers 4 and in other trainers' files
            names = {re.sub(rf"^{part}\.text_model\.", f"{part}.", name) for name in names}
    return names


def _require_pairs(there: set[str]) -> None:
    """Refuses a file with one matrix of an update alone, on which FLUX.1's loader ends with a KeyError.

    Args:
        there: the names of its weights, as peft has them.
    """
    layers = {name.rpartition(".lora_")[0] for name in there if ".lora_" in name}
    pairs = {f"{layer}.{matrix}.weight" for layer in layers for matrix in MATRICES}
    if missing := sorted(pairs - there):
        raise InputError(f"{FILE} lacks {listed(missing)}")


def _require_whole(backbone: Backbone, there: set[str], metadata: Mapping[str, object]) -> None:
    """Refuses a file with too few or too many updates: peft starts a matrix anew that is missing, and skips a layer.

    Args:
        backbone: with the updates that the file's metadata, or (in files of others) its weights ask for.
        there: the names of the file's weights, as peft has them.
        metadata: of the file; its keys start with the component that they are about.
    """
    asked = {name.partition(".")[0] for name in (*metadata, *there)}
    wanted: set[str] = set()
    for part in (backbone.denoiser_name(), *backbone.text_encoders):
        network = getattr(backbone, part)
        if adapters := [*getattr(network, "peft_config", {})]:
            updates = get_peft_model_state_dict(network, adapter_name=adapters[-1], save_embedding_layers=False)
            wanted |= {f"{part}.{name}" for name in updates}
            targets = metadata.get(f"{part}.target_modules")
            layers = _matching(network, targets) if isinstance(targets, list) else []  # in files of others a pattern
            wanted |= {f"{part}.{layer}.{matrix}.weight" for layer in layers for matrix in MATRICES}
        elif part in asked:
            raise InputError(f"{FILE} lacks all weights of the {part}")
    if missing := sorted(wanted - there):
        raise InputError(f"{FILE} lacks {listed(missing)}")
    if left := sorted(there - wanted):
        raise InputError(f"{FILE} holds what this model has no place for: {listed(left)}")
