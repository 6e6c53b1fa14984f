"""Stable Diffusion 1.x and 2.x: one U-Net, one CLIP text encoder, an f8 autoencoder, DDPM noise."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from antidreambooth.diffusion.backbone import Backbone, Checkpointing, Posterior, precise
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.precision import borrowing, made_on_cpu
from antidreambooth.errors import InputError, first_line

FAMILY = "Stable Diffusion 1.x / 2.x"
PARTS = {  # each component's folder and the file without which it is missing
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
NETWORKS: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
OTHERS: dict[str, Any] = {"tokenizer": CLIPTokenizer, "scheduler": DDPMScheduler}
HARMLESS = {  # what may be left over in files: the rest of a whole CLIP, and the positions that old ones hold
    "text_encoder": re.compile(r"(^|\.)position_ids$|^logit_scale$|^(vision_model|visual_projection|text_projection)\.")
}
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
        named_parts: the same by name.
    """

    def __init__(self, *parts: Any, **named_parts: Any) -> None:
        super().__init__(*parts, **named_parts)
        self.known_tokens: dict[tuple[str, int, torch.device], Tensor] = {}
        self.decoder_rests = False

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def downscale(self) -> int:
        """Pixels of an image per latent, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Posterior:
        """Images in [-1, 1] to the posterior of their latents."""
        posterior = self.vae.encode(images).latent_dist
        scale = self.vae.config.scaling_factor
        return Posterior(precise(posterior.mean) * scale, precise(posterior.std) * scale)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Latents to images in [-1, 1]."""
        with borrowing(self.vae.decoder, latents.device) if self.decoder_rests else nullcontext():
            pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return cast(Tensor, pictures.float().clamp(-1, 1))

    def embed(self, prompts: list[str]) -> Float[Tensor, "p length width"]:
        """Prompts to the text encoder's last hidden states, padded or truncated to the tokenizer's length."""
        return cast(Tensor, self.text_encoder(torch.stack([self._tokens(prompt) for prompt in prompts]))[0])

    def _tokens(self, prompt: str) -> Int[Tensor, " length"]:
        """A prompt's tokens, on the device: copied there once, as a run asks for the same few in every step."""
        device = self.alphas_cumprod.device
        key = prompt, len(self.tokenizer), device  # textual inversion adds a token
        if key not in self.known_tokens:
            length = self.tokenizer.model_max_length
            found = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=length)
            with torch.inference_mode(False):  # what a test asks for may be trained on later
                self.known_tokens[key] = torch.tensor(found.input_ids, device=device)
        return self.known_tokens[key]

    def predict(
        self,
        noisy: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        embeddings: Float[Tensor, "n length width"],
    ) -> Float[Tensor, "n c h w"]:
        """u(z_t, t, c) in fp32: the noise or v, whichever the model predicts."""
        return precise(self.unet(noisy, timesteps, embeddings).sample)

    def checkpoint(self, which: Checkpointing) -> None:
        """Recomputes activations of U-Net and VAE, or of the VAE alone (the text encoder's are small)."""
        if which:
            self.vae.enable_gradient_checkpointing()
        if which is True:
            self.unet.enable_gradient_checkpointing()

    def rest_decoder(self) -> None:
        """The VAE's decoder."""
        self.decoder_rests = True
        self.vae.decoder.to("cpu")

    def pipeline(self) -> StableDiffusionPipeline:
        """A diffusers pipeline around these very modules, with a DDIM sampler and no progress bar."""
        with made_on_cpu():
            scheduler = DDIMScheduler.from_config(self.scheduler.config)
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def check(configs: Mapping[str, dict[str, Any]], defaults: Defaults, name: str) -> None:
    """Refuses what has this layout and cannot work: something else, or components that do not fit each other.

    Args:
        configs: each component's config file.
        defaults: what the model wants where the user says nothing.
        name: of the model, for messages.

    Raises:
        InputError: an inpainting model, XL, a model that predicts neither noise nor v, a text encoder of another width
            than the U-Net's, a noise schedule that cannot be computed, and the like.
    """
    whole = {part: completed(part, values) for part, values in configs.items()}
    for wrong in (_other_kind, _unet_misfit, _vae_misfit, _text_misfit, partial(_schedule_misfit, defaults)):
        if reason := wrong(whole):
            raise InputError(f"the backbone {name} {reason}")


def check_tokens(tokenizer: CLIPTokenizer, text_encoder: Mapping[str, Any], name: str) -> None:
    """Refuses a tokenizer with tokens that the text encoder has no embedding for.

    Args:
        tokenizer: as loaded.
        text_encoder: its config file.
        name: of the model, for messages.
    """
    known = completed("text_encoder", text_encoder)["vocab_size"]
    if len(tokenizer) > known:
        raise InputError(
            f"the backbone {name} has a tokenizer of {len(tokenizer)} tokens and a text_encoder that knows {known}: "
            "they are of different models"
        )


def downscale(vae: Mapping[str, Any]) -> int:
    """Pixels of an image per latent, along one side, from the autoencoder's config file."""
    return int(2 ** (len(completed("vae", vae)["block_out_channels"]) - 1))


def smallest(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """The smallest side of images in pixels: the U-Net's coarsest level still has a latent of its own."""
    levels = len(completed("unet", configs["unet"])["block_out_channels"])
    return int(downscale(configs["vae"]) * 2 ** (levels - 1))


def latent_side(unet: Mapping[str, Any], name: str) -> int:
    """The side of the latents that a U-Net was made for, from its config file.

    Raises:
        InputError: it does not say, or says that they are no squares.
    """
    side: Any = unet.get("sample_size")
    sides = side if isinstance(side, list) else [side]
    if not sides or not all(map(_counts, sides)) or len(set(sides)) > 1:
        raise InputError(
            f"the backbone {name} does not say what square images it was made for (unet/config.json: sample_size "
            f"{side}): give --model.resolution, in Python cloak(..., resolution=...), or write it there"
        )
    return int(sides[0])


def _other_kind(configs: Mapping[str, dict[str, Any]]) -> str:
    for part, values in configs.items():
        if values.get("quantization_config"):
            return f"holds quantized weights ({part}/config.json); weights of 16 or 32 bits work"
    for part in ("unet", "vae"):
        found, ours = configs[part].get("_class_name", NETWORKS[part].__name__), NETWORKS[part].__name__
        if found != ours:
            return f"is no plain {FAMILY}: its {part}/ is of the kind {found}, not {ours}"
        levels = configs[part]["block_out_channels"]
        if not isinstance(levels, list | tuple) or not levels or not all(map(_counts, levels)):
            return f"has no block_out_channels in {part}/config.json that can be used: {levels}"
    kind = configs["text_encoder"].get("model_type", "clip_text_model")
    if kind not in ("clip_text_model", "clip"):
        return f"is no plain {FAMILY}: its text_encoder/ is of the kind {kind}, not clip_text_model"
    return ""


def _unet_misfit(configs: Mapping[str, dict[str, Any]]) -> str:
    unet, latents = configs["unet"], configs["vae"]["latent_channels"]
    takes, gives = unet["in_channels"], unet["out_channels"]
    extra = [key for key in CONDITIONED if unet.get(key) is not None]
    if takes != latents or extra:
        found = f"asks for {', '.join(extra)}" if extra else f"takes {takes} channels, its vae/ gives {latents}"
        return f"is no plain {FAMILY} (inpainting, XL ... do not work): its unet/ {found}"
    if gives != takes:
        return f"has a unet/ that takes {takes} channels and gives {gives}, such as a learned variance: not supported"
    width, wanted = configs["text_encoder"]["hidden_size"], unet["cross_attention_dim"]
    if any(one != width for one in (wanted if isinstance(wanted, list | tuple) else [wanted])):
        return f"has a unet/ for texts of width {wanted} and a text_encoder/ of width {width}: they do not fit"
    return ""


def _vae_misfit(configs: Mapping[str, dict[str, Any]]) -> str:
    vae = configs["vae"]
    scale = vae["scaling_factor"]
    if (vae["in_channels"], vae["out_channels"]) != (3, 3):
        return f"has a vae/ for {vae['in_channels']} and {vae['out_channels']} channels; pictures have 3"
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        return f"has no scaling_factor in vae/config.json that can be used: {scale}"
    if moved := [key for key in ("shift_factor", "latents_mean", "latents_std") if vae.get(key) is not None]:
        return f"is no plain {FAMILY}: its vae/ moves latents ({moved[0]})"
    return ""


def _text_misfit(configs: Mapping[str, dict[str, Any]]) -> str:
    length, most = configs["tokenizer"].get("model_max_length"), configs["text_encoder"]["max_position_embeddings"]
    if not _counts(length) or not SHORTEST <= length <= most:
        return f"has a tokenizer/ of length {length} (model_max_length), a text_encoder/ of {SHORTEST} to {most}"
    return ""


def _schedule_misfit(defaults: Defaults, configs: Mapping[str, dict[str, Any]]) -> str:
    config = configs["scheduler"]
    steps, prediction = config.get("num_train_timesteps", 1000), config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        return f"predicts {prediction}; epsilon and v_prediction work"
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:  # a flow's or EDM's
        return f"is no plain {FAMILY}: its scheduler/ ({config.get('_class_name')}) has no beta_schedule"
    try:
        with made_on_cpu():
            noise = DDPMScheduler.from_config(config).alphas_cumprod
    except (TypeError, ValueError, RuntimeError) as error:  # for values of it; NotImplementedError is a RuntimeError
        return f"has a noise schedule that cannot be computed: scheduler_config.json: {first_line(error)}"
    if not _counts(steps) or len(noise) != steps or not ((noise >= 0) & (noise <= 1)).all():  # NaN is neither
        return f"has a noise schedule that cannot be used: scheduler_config.json: {steps} steps (num_train_timesteps)"
    if steps < defaults.sampling_steps:
        return (
            f"has a noise schedule of {steps} steps (num_train_timesteps), and pictures are drawn in "
            f"{defaults.sampling_steps}: write a smaller sampling_steps into its antidreambooth.json"
        )
    return ""


def completed(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A component's config with the defaults where its file says nothing; of a whole CLIP, its text encoder's."""
    return {**STANDARD.get(part, {}), **values, **(values.get("text_config") or {})}


def _counts(value: Any) -> TypeGuard[int]:
    """Whether this is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _standard(kind: Any) -> dict[str, Any]:
    """What the config of a component is where its file says nothing: the defaults of its constructor."""
    signature = inspect.signature(kind.__init__).parameters.values()
    return {one.name: one.default for one in signature if one.default is not inspect.Parameter.empty}


STANDARD: dict[str, dict[str, Any]] = {
    **{part: _standard(NETWORKS[part]) for part in ("unet", "vae")},
    "text_encoder": CLIPTextConfig().to_dict(),
}
