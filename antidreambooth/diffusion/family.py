"""What a family of base models says of itself and of a model's config files, before anything is loaded."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from antidreambooth.diffusion.configs import Configs, Pair, whole_number
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.densities import TimestepSampler, Uniform


class Family(ABC):
    """The constants of a family, and its questions to config files; each family is a subclass of ``Backbone``."""

    family: ClassVar[str]  # in words
    official: ClassVar[Any]  # the pipeline of diffusers in which results load
    networks: ClassVar[Mapping[str, Any]]  # components with weights, and their classes
    tokenizers: ClassVar[Mapping[str, Any]]
    published: ClassVar[Defaults]
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    # Pattern of the denoiser's layers that make keys and values of the text, for the picture to attend to.
    text_layers: ClassVar[str] = r".*\.attn2\.to_[kv]"
    text_lora: ClassVar[tuple[str, ...]] = ()  # text encoders that may learn
    # Text encoders that learn a new word, and the names of its vectors in the official file; "" for the word itself.
    inverted: ClassVar[Mapping[str, str]] = {}
    spread: ClassVar[bool] = True  # whether the autoencoder gives latents a variance
    density: ClassVar[TimestepSampler] = Uniform()
    schedulers: ClassVar[tuple[str, ...]] = ("FlowMatchEulerDiscreteScheduler",)  # names of schedulers it may have
    arguments: ClassVar[tuple[str, ...]] = ("prompt_embeds",)  # of the pipeline, for the parts of a Conditioning
    guidance: ClassVar[tuple[str, float]] = ("guidance_scale", 1.0)  # of the pipeline, with its value for none
    options: ClassVar[Mapping[str, Any]] = {}  # of every call of the pipeline
    left_out: ClassVar[Mapping[str, Any]] = {}  # arguments of the pipeline's constructor that are always these
    switches: ClassVar[Mapping[str, Any]] = {}  # and those that a model's folder sets, with their usual values

    @classmethod
    def misfit(cls, configs: Configs, defaults: Defaults) -> str:
        """What is wrong with a model of this family that its config files show, in words; nothing where it can work.

        Args:
            configs: of the components, completed by what holds where a file says nothing.
            defaults: what the model wants where the user says nothing.
        """
        if (found := configs["scheduler"].get("_class_name")) not in cls.schedulers:
            return f"is no plain {cls.family}: its scheduler/ is of the kind {found}, not {' or '.join(cls.schedulers)}"
        for left, found, right, wanted in cls.fits(configs):
            if found != wanted:
                return f"has a {left} of {found} and a {right} of {wanted}: they do not fit"
        return ""

    @classmethod
    def fits(cls, configs: Configs) -> Iterable[Pair]:
        """Numbers in two config files that have to be the same."""
        return ()

    @classmethod
    def step(cls, configs: Configs) -> int:
        """A picture's side is a multiple of so many pixels."""
        return 2 * cls.shrinkage(configs)

    @classmethod
    def smallest(cls, configs: Configs) -> int:
        """The smallest side of a picture in pixels."""
        return cls.step(configs)

    @classmethod
    def shrinkage(cls, configs: Configs) -> int:
        """Pixels of a picture per latent, along one side."""
        return int(2 ** (len(configs["vae"]["block_out_channels"]) - 1))

    @classmethod
    def made_for(cls, configs: Configs) -> int | None:
        """The side in pixels of the pictures that the denoiser was made for, where its config says so."""
        size = configs[cls.denoiser_name()].get("sample_size")
        first, *others = size if isinstance(size, list | tuple) and size else [size]
        return first * cls.shrinkage(configs) if whole_number(first) and {*others} <= {first} else None

    @classmethod
    def scheduler_kind(cls, config: Mapping[str, Any]) -> Any:
        """The class that a scheduler's config is read into; None for the one that it names."""
        return None

    @classmethod
    def denoiser_name(cls) -> str:
        """The component that is the denoiser."""
        return "unet" if "unet" in cls.networks else "transformer"
