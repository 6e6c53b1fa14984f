"""What the official pipelines, schedulers and autoencoders of diffusers compute for a model: nothing here is ours."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

PROMPTS = ("a photo of sks person", "a cat")
SIZE = (32, 64)  # pixels, height and width: whoever mistakes one for the other is found out
ROWS = (0, 1, 250, 500, 800, 999)  # of a noise law, the least noise first
STEPS = 2


@dataclass(frozen=True)
class Family:
    """How an official pipeline is asked.

    Args:
        returns: what ``encode_prompt`` gives, by the names of the pipeline's arguments.
        asking: arguments of ``encode_prompt`` beside the prompts.
        prompting: arguments of every call with prompts.
        options: arguments of every call.
        unguided: arguments of a call without guidance.
        guided: arguments of a call with it.
    """

    returns: tuple[str, ...]
    asking: Mapping[str, Any] = field(default_factory=dict)
    prompting: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    guided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})


BOTH = ("prompt_embeds", "negative_prompt_embeds")
POOLED = (*BOTH, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
SD = Family(BOTH, {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True})
FAMILIES = {
    "sd": SD,
    "sd-v": SD,
    "sdxl": Family(POOLED),
    # As many tokens of T5 as examples/dreambooth takes; the pipeline's own number is 256.
    "sd3": Family(POOLED, {"prompt_2": None, "prompt_3": None}, {"max_sequence_length": 77}),
    "flux": Family(("prompt_embeds", "pooled_prompt_embeds"), {"prompt_2": None}, {"max_sequence_length": 512}),
    "flux-schnell": Family(("prompt_embeds", "pooled_prompt_embeds"), {"prompt_2": None}, {"max_sequence_length": 256}),
    "flux2-klein": Family(("prompt_embeds",)),
    "z-image": Family(BOTH, unguided={"guidance_scale": 0.0}),
    "qwen-image": Family(
        ("prompt_embeds", "prompt_embeds_mask"),
        unguided={"true_cfg_scale": 1.0},
        guided={"true_cfg_scale": 3.0, "negative_prompt": [""] * len(PROMPTS)},
    ),
    # Without the instructions that its pipeline puts before a prompt, and for the size that was asked for.
    "sana": Family(MASKED, prompting={"complex_human_instruction": None}, options={"use_resolution_binning": False}),
    "lumina2": Family(MASKED),
}
APART = ("flux2-klein", "qwen-image")  # whose encode_prompt has to be asked for negative prompts separately


@dataclass(frozen=True)
class Step:
    """One step of the official pipeline.

    Args:
        inputs: numbers and tensors that the pipeline hands its denoiser, by name.
        time: in the scheduler's unit.
        noisy: z_t, n c h w.
        prediction: in the scheduler's sense, n c h w.
    """

    inputs: dict[str, Tensor]
    time: Tensor
    noisy: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class Drawing:
    """What the official pipeline draws.

    Args:
        steps: in their order.
        latents: in the denoiser's unit, n c h w.
        pictures: in [0, 1], n 3 h w.
    """

    steps: list[Step]
    latents: Tensor
    pictures: Tensor


@dataclass(frozen=True)
class Oracle:
    """What is given (images, noises, rows, prompts) and what follows for one model.

    Args:
        images: in [-1, 1], 2 3 h w.
        posterior_noise: standard normal, 2 c h w.
        latents: of the images, with that noise.
        rows: numbers of rows of the noise law, the least noise first.
        clean: latents, one for each row.
        noise: standard normal, one for each row.
        times: the rows' times in the scheduler's unit.
        noisy: z_t.
        target: what should be predicted.
        guess: some prediction.
        back: z_{t-1}, if that were the prediction; of DDPM without the noise that is added.
        told: of the prompts, by the names of the pipeline's arguments.
        against: of the negative prompts; empty for a family without any.
        start: what is drawn from, standard normal, 2 c h w.
        drawing: without guidance.
        guided: with guidance of 3.
    """

    images: Tensor
    posterior_noise: Tensor
    latents: Tensor
    rows: Tensor
    clean: Tensor
    noise: Tensor
    times: Tensor
    noisy: Tensor
    target: Tensor
    guess: Tensor
    back: Tensor
    told: dict[str, Any]
    against: dict[str, Any]
    start: Tensor
    drawing: Drawing
    guided: Drawing


@torch.no_grad()
def consult(name: str, folder: Path) -> Oracle:
    """Asks the official code about a model.

    Args:
        name: of the family, as in ``tiny.TINY``.
        folder: the model in diffusers layout.
    """
    pipe = load(folder)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(len(PROMPTS), 3, *SIZE, generator=generator) * 2 - 1
    shape = latents_of(name, pipe, images, 2).shape
    start, posterior_noise = torch.randn(shape, generator=generator), normal(shape, 2)
    latents = latents_of(name, pipe, images, 2)
    clean = latents.repeat(len(ROWS) // len(PROMPTS), 1, 1, 1)
    noise, guess = torch.randn(2, *clean.shape, generator=generator)
    told, against = embeddings(name, pipe)
    return Oracle(
        images=images,
        posterior_noise=posterior_noise,
        latents=latents,
        rows=torch.tensor(ROWS),
        clean=clean,
        noise=noise,
        guess=guess,
        **law(dict(pipe.scheduler.config), clean, noise, guess),
        told=told,
        against=against,
        start=start,
        drawing=draw(name, pipe, start, FAMILIES[name].unguided),
        guided=draw(name, pipe, start, FAMILIES[name].guided),
    )


def load(folder: Path) -> DiffusionPipeline:
    """The official pipeline of a folder, with its own sampler.

    A DDPM law is the exception: this project draws from it with DDIM. The config files of other samplers need not say
    that DDIM should not clip latents and should end at the law's first row, which are not its defaults.
    """
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if is_diffusion(config := pipe.scheduler.config):
        pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False)
    return pipe


def is_diffusion(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's law is DDPM's, rather than a flow's; the DPM solver of Sana has betas, too."""
    return "beta_schedule" in config and not config.get("use_flow_sigmas")


def flow_of(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Euler's scheduler with the rows of training, and the end after them as ``set_timesteps`` has it.

    A DPM solver's shift has another name, which this scheduler would not know.
    """
    shift = {"shift": config["flow_shift"]} if "flow_shift" in config else {}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({**config, **shift})
    scheduler.sigmas = torch.cat([scheduler.sigmas, torch.zeros(1)])
    return scheduler


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """What an official posterior draws first from a generator of this seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents_of(name: str, pipe: Any, images: Tensor, seed: int) -> Tensor:
    """Latents of images, in the denoiser's unit.

    Where the family has an official image-to-image pipeline, that one's: what it adds noise to. Else the autoencoder's,
    with the scale that the family's text-to-image pipeline takes back before it decodes.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "sana":  # deterministic
        return pipe.vae.encode(images).latent * pipe.vae.config.scaling_factor
    if name == "lumina2":
        latents = pipe.vae.encode(images).latent_dist.sample(generator)
        return (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    if name == "flux2-klein":
        with mock.patch(f"{type(pipe).__module__}.retrieve_latents", sampled):  # it takes the mean, as it edits
            return pipe._encode_vae_image(images, generator)
    scheduler = pipe.scheduler
    method = "scale_noise" if hasattr(scheduler, "scale_noise") else "add_noise"
    twin = AutoPipelineForImage2Image.from_pipe(pipe)
    twin.set_progress_bar_config(disable=True)
    size = {} if name in ("sd", "sd-v", "sdxl") else {"height": SIZE[0], "width": SIZE[1]}
    with heard(scheduler, method) as calls:
        twin(
            prompt=list(PROMPTS),
            image=images / 2 + 0.5,
            strength=1.0,
            num_inference_steps=STEPS,
            generator=generator,
            output_type="latent",
            **size,
        )
    latents = calls[0][0][0]
    return latents[:, 0] if name == "qwen-image" else latents  # videos of one frame


def sampled(output: Any, generator: torch.Generator, **_: Any) -> Tensor:
    """A draw from an autoencoder's posterior, with noise that is drawn for patches of 2 x 2 latents."""
    dist = output.latent_dist
    n, c, h, w = dist.mean.shape
    return dist.mean + dist.std * nn.functional.pixel_shuffle(
        torch.randn(n, c * 4, h // 2, w // 2, generator=generator), 2
    )


def law(config: dict[str, Any], clean: Tensor, noise: Tensor, guess: Tensor) -> dict[str, Tensor]:
    """The scheduler's times, noisy latents, targets and steps back at ``ROWS``."""
    rows = torch.tensor(ROWS)
    if is_diffusion(config):
        ddpm = DDPMScheduler.from_config(config, clip_sample=False)
        noisy = ddpm.add_noise(clean, noise, rows)
        velocity = config["prediction_type"] == "v_prediction"
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: torch.zeros(shape)):
            back = [ddpm.step(guess[i], row, noisy[i]).prev_sample for i, row in enumerate(ROWS)]
        target = ddpm.get_velocity(clean, noise, rows) if velocity else noise
        return {"times": rows, "noisy": noisy, "target": target, "back": torch.stack(back)}
    flow = flow_of(config)
    places = len(flow.timesteps) - 1 - rows
    times = flow.timesteps[places]
    noisy, back = flow.scale_noise(clean, times, noise), []
    for i, place in enumerate(places.tolist()):
        flow = flow_of(config)  # a scheduler remembers where it is
        flow.set_begin_index(place)
        back.append(flow.step(guess[i], times[i], noisy[i]).prev_sample)
    return {"times": times, "noisy": noisy, "target": noise - clean, "back": torch.stack(back)}


def embeddings(name: str, pipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``encode_prompt`` makes of the prompts and of negative ones, by the pipeline's names of them."""
    family = FAMILIES[name]
    found = dict(zip(family.returns, ask(name, pipe, list(PROMPTS)), strict=False))
    told = {key: value for key, value in found.items() if not key.startswith("negative_")}
    against = {key: value for key, value in found.items() if key.startswith("negative_")}
    if name in APART:
        found = dict(zip(family.returns, ask(name, pipe, [""] * len(PROMPTS)), strict=False))
        against = {f"negative_{key}": value for key, value in found.items() if value is not None}
    return told, against


def ask(name: str, pipe: Any, prompts: list[str]) -> tuple[Any, ...]:
    """The results of ``encode_prompt``; some pipelines give more than is used here, such as places of words."""
    return pipe.encode_prompt(prompts, **FAMILIES[name].asking, **FAMILIES[name].prompting)


def draw(name: str, pipe: Any, start: Tensor, guidance: Mapping[str, Any], prompts: Sequence[str] = PROMPTS) -> Drawing:
    """Pictures of the prompts by the official pipeline, and what it did on the way."""
    family = FAMILIES[name]
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    with heard_inputs(denoiser) as inputs, heard(pipe.scheduler, "step") as calls, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept")  # of Sana's solver, about NumPy 2
        pictures = pipe(
            prompt=list(prompts),  # a list of its own: Z-Image's writes its chat template into it
            **family.prompting,
            **family.options,
            **guidance,
            latents=packed(name, pipe, start),
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=STEPS,
            output_type="pt",
        ).images
    steps = [
        Step(told, torch.as_tensor(time), unpacked(name, pipe, noisy, start), unpacked(name, pipe, prediction, start))
        for told, ((prediction, time, noisy), _) in zip(inputs[:: len(inputs) // STEPS], calls, strict=True)
    ]
    return Drawing(steps, unpacked(name, pipe, calls[-1][1][0], start), pictures)


def packed(name: str, pipe: Any, latents: Tensor) -> Tensor:
    """Latents in the form that a pipeline takes, by its own means."""
    if name.startswith(("flux-", "qwen")) or name == "flux":
        return pipe._pack_latents(latents, *latents.shape)
    return latents


def unpacked(name: str, pipe: Any, tokens: Tensor, like: Tensor) -> Tensor:
    """Latents n c h w out of the form that a pipeline works with, by its own means."""
    if tokens.ndim == 4:
        return tokens
    if name == "flux2-klein":
        return pipe._unpack_latents_with_ids(tokens, pipe._prepare_latent_ids(like))
    return pipe._unpack_latents(tokens, *SIZE, pipe.vae_scale_factor).reshape(like.shape)


@contextmanager
def heard(owner: Any, method: str) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """Positional arguments and result of each call of a method inside."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    real = getattr(owner, method)

    def spy(*args: Any, **kwargs: Any) -> Any:
        before = tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)
        calls.append((before, real(*args, **kwargs)))
        return calls[-1][1]

    # The signature says to a pipeline what it may pass.
    with mock.patch.object(owner, method, mock.Mock(side_effect=spy, __signature__=inspect.signature(real))):
        yield calls


@contextmanager
def heard_inputs(module: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Numbers and tensors that a module is called with inside, by name: ``x[1]`` is the second of a list ``x``."""
    calls: list[dict[str, Tensor]] = []
    signature = inspect.signature(type(module).forward)

    def hook(own: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature.bind(own, *args, **kwargs).arguments
        leaves, _ = tree_flatten_with_path({key: arguments[key] for key in arguments if key != "self"})
        named = {"".join(map(str, path)).removeprefix("['").replace("']", "", 1): leaf for path, leaf in leaves}
        calls.append(
            {
                key: torch.as_tensor(leaf).clone()
                for key, leaf in named.items()
                if isinstance(leaf, Tensor | int | float) and not isinstance(leaf, bool)
            }
        )

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
