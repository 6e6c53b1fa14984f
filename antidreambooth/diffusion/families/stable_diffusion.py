"""Stable Diffusion 1.x and 2.x: one U-Net, one CLIP text encoder, an f8 autoencoder, DDPM noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from antidreambooth.diffusion.backbone import Backbone, Conditioning
from antidreambooth.diffusion.configs import Configs, whole_number
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.noising import Noising
from antidreambooth.diffusion.precision import made_on_cpu
from antidreambooth.errors import first_line

CONDITIONED = (  # keys of a U-Net's config that say what else it is told, beside a text and a timestep
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
)
SHORTEST = 3  # tokens of a prompt: start, end, and one between them


class StableDiffusion(Backbone):
    """Stable Diffusion 1.x or 2.x, with epsilon- or v-prediction (arXiv:2112.10752).

    Args:
        parts: see ``Backbone``.
    """

    family = "Stable Diffusion 1.x / 2.x"
    official = StableDiffusionPipeline
    networks: ClassVar[Mapping[str, Any]] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
    }
    tokenizers: ClassVar[Mapping[str, Any]] = {"tokenizer": CLIPTokenizer}
    published = Defaults()
    text_lora = ("text_encoder",)
    inverted: ClassVar[Mapping[str, str]] = {"text_encoder": ""}
    left_out: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.known_tokens: dict[tuple[str, int, torch.device], Tensor] = {}

    @classmethod
    def step(cls, configs: Configs) -> int:
        """A picture's side is a multiple of so many pixels."""
        return cls.shrinkage(configs)

    @classmethod
    def smallest(cls, configs: Configs) -> int:
        """The smallest side of a picture in pixels: the U-Net's coarsest level still has a latent of its own."""
        return int(cls.shrinkage(configs) * 2 ** (len(configs["unet"]["block_out_channels"]) - 1))

    @classmethod
    def misfit(cls, configs: Configs, defaults: Defaults) -> str:
        """What is wrong: an inpainting model, one that predicts neither noise nor v, an impossible schedule ..."""
        return (
            _levels_misfit(configs)
            or _unet_misfit(configs)
            or _vae_misfit(configs)
            or _text_misfit(configs)
            or schedule_misfit(configs["scheduler"], defaults)
        )

    @property
    def pixels_said(self) -> int:
        """8, whatever the autoencoder: the pipeline wants multiples of it."""
        return 8

    @classmethod
    def scheduler_kind(cls, config: Mapping[str, Any]) -> Any:
        """DDPM, whatever sampler the betas come with; of a flow the one solver that the pipeline takes."""
        return DPMSolverMultistepScheduler if flows(config) else DDPMScheduler

    def law(self, config: Mapping[str, Any]) -> Noising:
        """DDPM, or a flow where the scheduler says so."""
        return Noising.flow(config) if flows(config) else Noising.diffusion(config)

    def encode_text(self, prompts: list[str]) -> Conditioning:
        """The text encoder's last hidden states (n length width), padded or truncated to the tokenizer's length."""
        return Conditioning(self.text_encoder(torch.stack([self._tokens(prompt) for prompt in prompts]))[:1])

    def _tokens(self, prompt: str) -> Int[Tensor, " length"]:
        """A prompt's tokens, on the device: copied there once, as a run asks for the same few in every step."""
        key = prompt, len(self.tokenizer), self.device  # textual inversion adds a token
        if key not in self.known_tokens:
            length = self.tokenizer.model_max_length
            found = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=length)
            with torch.inference_mode(False):  # what a test asks for may be trained on later
                self.known_tokens[key] = torch.tensor(found.input_ids, device=self.device)
        return self.known_tokens[key]

    def denoise(
        self, noisy: Float[Tensor, "n c h w"], times: Shaped[Tensor, " n"], conditioning: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """The noise or v, whichever the model predicts."""
        predicted: Tensor = self.unet(noisy, times, *conditioning).sample
        return predicted

    def sampler(self) -> Any:
        """DDIM, or a flow's own solver."""
        return super().sampler() if flows(self.scheduler.config) else DDIMScheduler.from_config(self.scheduler.config)

    def kept_scheduler(self) -> Any:
        """The sampler, too."""
        return self.sampler()


def flows(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is of a flow: no published model of this family is, but one can be trained."""
    return bool(config.get("use_flow_sigmas"))


def _levels_misfit(configs: Configs) -> str:
    for part in ("unet", "vae"):
        levels = configs[part]["block_out_channels"]
        if not isinstance(levels, list | tuple) or not levels or not all(map(whole_number, levels)):
            return f"has no block_out_channels in {part}/config.json that can be used: {levels}"
    return ""


def _unet_misfit(configs: Configs) -> str:
    unet, latents = configs["unet"], configs["vae"]["latent_channels"]
    takes, gives = unet["in_channels"], unet["out_channels"]
    extra = [key for key in CONDITIONED if unet.get(key) is not None]
    if takes != latents or extra:
        found = f"asks for {', '.join(extra)}" if extra else f"takes {takes} channels, its vae/ gives {latents}"
        return f"is no plain {StableDiffusion.family} (inpainting, XL ... do not work): its unet/ {found}"
    if gives != takes:
        return f"has a unet/ that takes {takes} channels and gives {gives}, such as a learned variance: not supported"
    width, wanted = configs["text_encoder"]["hidden_size"], unet["cross_attention_dim"]
    if any(one != width for one in (wanted if isinstance(wanted, list | tuple) else [wanted])):
        return f"has a unet/ for texts of width {wanted} and a text_encoder/ of width {width}: they do not fit"
    return ""


def _vae_misfit(configs: Configs) -> str:
    vae = configs["vae"]
    scale = vae["scaling_factor"]
    if (vae["in_channels"], vae["out_channels"]) != (3, 3):
        return f"has a vae/ for {vae['in_channels']} and {vae['out_channels']} channels; pictures have 3"
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        return f"has no scaling_factor in vae/config.json that can be used: {scale}"
    if moved := [key for key in ("shift_factor", "latents_mean", "latents_std") if vae.get(key) is not None]:
        return f"is no plain {StableDiffusion.family}: its vae/ moves latents ({moved[0]})"
    return ""


def _text_misfit(configs: Configs) -> str:
    length, most = configs["tokenizer"].get("model_max_length"), configs["text_encoder"]["max_position_embeddings"]
    if not whole_number(length) or not SHORTEST <= length <= most:
        return f"has a tokenizer/ of length {length} (model_max_length), a text_encoder/ of {SHORTEST} to {most}"
    return ""


def schedule_misfit(config: Mapping[str, Any], defaults: Defaults) -> str:
    """What is wrong with a DDPM's noise schedule, in words; nothing where it can be used."""
    steps, prediction = config.get("num_train_timesteps", 1000), config.get("prediction_type", "epsilon")
    if flows(config):
        return "" if prediction == "flow_prediction" else f"is a flow that predicts {prediction}; flow_prediction works"
    if prediction not in ("epsilon", "v_prediction"):
        return f"predicts {prediction}; epsilon and v_prediction work"
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:  # a flow's or EDM's
        return (
            f"is no plain {StableDiffusion.family}: its scheduler/ ({config.get('_class_name')}) has no beta_schedule"
        )
    try:
        with made_on_cpu():
            noise = DDPMScheduler.from_config(config).alphas_cumprod
    except (TypeError, ValueError, RuntimeError) as error:  # for values of it; NotImplementedError is a RuntimeError
        return f"has a noise schedule that cannot be computed: scheduler_config.json: {first_line(error)}"
    if not whole_number(steps) or len(noise) != steps or not ((noise >= 0) & (noise <= 1)).all():  # NaN is neither
        return f"has a noise schedule that cannot be used: scheduler_config.json: {steps} steps (num_train_timesteps)"
    if steps < defaults.sampling_steps:
        return (
            f"has a noise schedule of {steps} steps (num_train_timesteps), and pictures are drawn in "
            f"{defaults.sampling_steps}: write a smaller sampling_steps into its antidreambooth.json"
        )
    return ""
