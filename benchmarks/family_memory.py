"""Memory of the steps that a run on each family of base models consists of, counted on tensors without content.

A step is the engine's own: a PGD step against a LoRA surrogate, and a training step of a LoRA, on weights held in bf16,
with text encoders at rest, for one photo at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.optim import AdamW
from tqdm import tqdm

from antidreambooth.attack.canvas import SquareCanvas
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.surrogates import Alternating
from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.families import family_named
from antidreambooth.diffusion.families.z_image import Ragged
from antidreambooth.diffusion.precision import held_in_bf16
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.lora import LoRA
from antidreambooth.finetuning.weights import Weights
from benchmarks.base_models import BASE_MODELS, BaseModel
from benchmarks.counting import Counter, cuda_autocast, fake
from benchmarks.stable_diffusion import size
from benchmarks.tables import write

GIB = 2**30
CARDS = (8, 12, 16, 24, 40, 48, 80)  # GiB
RESERVE = GIB  # for the CUDA context, kernels' workspaces and what the allocator cannot reuse
RESOLUTIONS = (512, 1024)
FULL = 16  # bytes of a weight that learns, its gradient and two moments in fp32
NF4 = 0.55  # bytes of a weight of 4 bits, with its share of the scales: of 64 weights an 8-bit number, and so on
STEPS = ("PGD, LoRA surrogate", "LoRA training")


def smallest(wanted: int) -> str:
    """The smallest card for so many bytes."""
    return next((f"{card} GB" for card in CARDS if wanted + RESERVE <= card * GIB), "none")


@dataclass(frozen=True)
class Count:
    """What a base model takes, in bytes.

    Args:
        name: of the base model.
        resolution: side of the photos in pixels.
        checkpointing: whether activations are computed again in the backward pass.
        held: denoiser and autoencoder.
        texts: text encoders, which embed a run's prompts before the others are on the device.
        peaks: most bytes of each of ``STEPS``, with what is held.
        four_bits: how much less is held if the denoiser's linear layers take 4 bits a weight.
        full: weights, gradients and moments if the denoiser learns as a whole.
    """

    name: str
    resolution: int
    checkpointing: bool
    held: int
    texts: int
    peaks: tuple[int, ...]
    four_bits: int
    full: int


def made(model: BaseModel) -> Backbone:
    """A base model without text encoders, its frozen weights in bf16; call it inside ``fake``."""
    kind = family_named(model.pipeline)
    assert kind is not None
    name = kind.denoiser_name()
    backbone = _empty(model)
    denoiser = kind.networks[name].from_config(model.denoiser)
    vae = kind.networks["vae"].from_config(model.vae)
    assert (round(size(denoiser) / 1e6), round(size(vae) / 1e6)) == model.parameters
    held_in_bf16(denoiser)
    setattr(backbone, name, denoiser.eval())
    backbone.vae = vae.eval()
    for key, buffer in backbone.noising.named_buffers():
        setattr(backbone.noising, key, torch.empty(buffer.shape, dtype=buffer.dtype))
    backbone.requires_grad_(False)
    return backbone


def _empty(model: BaseModel) -> Backbone:
    """A family's model without networks; its noise schedule needs content, so that it is made of real tensors."""
    kind = family_named(model.pipeline)
    assert kind is not None
    with unset_fake_temporarily():
        chosen = DDPMScheduler if model.scheduler else FlowMatchEulerDiscreteScheduler
        parts: dict[str, Any] = {**dict.fromkeys(kind.tokenizers), **{part: nn.Identity() for part in kind.networks}}
        return kind(**parts, scheduler=chosen.from_config(model.scheduler))


def conditioning(model: BaseModel) -> Conditioning:
    """Of one prompt."""
    if model.pipeline == "ZImagePipeline":
        return Ragged([torch.empty(shape) for shape in model.told if not isinstance(shape, int)])
    return Conditioning(
        torch.ones(1, part, dtype=torch.bool) if isinstance(part, int) else torch.empty(1, *part) for part in model.told
    )


def bytes_of(network: nn.Module) -> int:
    """Of its weights and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def texts_of(model: BaseModel) -> int:
    """Bytes of the text encoders, as they are held."""
    total = 0
    for kind, config in model.texts:
        with torch.device("meta"):
            encoder = kind(config)
        held_in_bf16(encoder)
        total += bytes_of(encoder)
    return total


def count(name: str, resolution: int, checkpointing: bool) -> Count:
    """A base model's steps."""
    model = BASE_MODELS[name]
    texts = texts_of(model)
    with ExitStack() as stack:
        stack.enter_context(fake())
        backbone = made(model)
        held = bytes_of(backbone.denoiser) + bytes_of(backbone.vae)
        linear = sum(size(layer) for layer in backbone.denoiser.modules() if isinstance(layer, nn.Linear))
        learned = FULL * size(backbone.denoiser)
        plain = DreamBooth(steps=2, gradient_checkpointing=checkpointing, prior=PriorPreservation(weight=0.0))
        training = LoRA().surrogate_settings(plain, backbone.defaults)
        LoRA().apply(backbone, training, seed=0)
        backbone.text_rests, backbone.text_present = True, False
        backbone.remembered[training.instance_prompt,] = told = conditioning(model)
        weights = Weights(backbone.learned(), AdamW(backbone.learned(), lr=1e-6, fused=True))
        photo = torch.zeros(1, 3, resolution, resolution)
        latents = torch.zeros(1, *backbone.latent_shape(resolution, resolution))
        clean = Posterior(latents, torch.zeros_like(latents))
        surrogate = Alternating(backbone, training, weights, clean, micro_batch=1)
        counter = Counter(backbone, weights.optimizer, photo, *clean, *told)

        def attack() -> None:
            with surrogate.borrowed():
                PGD(steps=1, micro_batch=1)(surrogate, SquareCanvas(photo), photo, Turn(0), torch.Generator("cpu"))

        def learn() -> None:
            surrogate.learn_clean(Turn(0), torch.Generator("cpu"))

        words = [part for part in model.told if isinstance(part, int)]
        if words:  # Lumina2 reads from its mask how many there are, and fake tensors say nothing
            stack.enter_context(patch.object(FakeTensor, "tolist", lambda values: words * len(values)))
        stack.enter_context(cuda_autocast(True))
        peaks = tuple(counter.peak(step) for step in (attack, learn))
    gc.collect()
    return Count(name, resolution, checkpointing, held, texts, peaks, int((2 - NF4) * linear), learned)


def rows(name: str) -> list[list[str]]:
    """A base model's lines of the table: what is needed in each mode, and the smallest card."""
    sides = [[count(name, side, again) for side in RESOLUTIONS] for again in (False, True)]
    first = sides[0][0]

    def line(mode: str, sizes: list[int], how: str) -> list[str]:
        return [name, mode, *(f"{one / GIB:.1f}" for one in sizes), *map(smallest, sizes), how]

    lines = [
        line("held: denoiser in bf16, VAE in fp32", [first.held] * 2, "counted"),
        line("text encoders in bf16, while they embed", [first.texts] * 2, "counted"),
    ]
    for found, way in zip(sides, ("", ", checkpointed"), strict=True):
        for number, step in enumerate(STEPS):
            # At the start the text encoders are on the device, without the others.
            most = [max(one.peaks[number], one.texts) for one in found]
            lines.append(line(f"{step}{way}", most, "counted"))
    for number, step in enumerate(STEPS):
        less = [max(one.peaks[number] - one.four_bits, one.texts) for one in sides[1]]
        lines.append(line(f"{step}, checkpointed, nf4", less, "computed"))
    lines.append(line("full AdamW, 16 bytes a weight", [first.full] * 2, "computed"))
    return lines


def report(folder: Path, names: Sequence[str]) -> str:
    """Writes the table after each base model, since all of them take a while; returns it."""
    found: list[list[str]] = []
    text = ""
    header = ["base model", "mode, peak GiB", *(f"{side} px" for side in RESOLUTIONS)]
    header += [*(f"card, {side} px" for side in RESOLUTIONS), "how"]
    title = (
        "Most GiB that a step holds, by base model, for one photo: counted without a GPU, as allocations of its code. "
        f"torch {torch.__version__}. Frozen weights in bf16, a LoRA of rank 16 in fp32 with its AdamW, autocast to "
        "bf16. Not in it: drawing class images and sample grids. PGD on a model that does not learn takes the same "
        "less the LoRA. Where text encoders take more than the step, theirs is the figure. nf4 is the counted step "
        f"less what the denoiser's linear layers take less ({NF4} bytes a weight instead of 2). Cards: the smallest "
        f"of {', '.join(map(str, CARDS))} GB that leaves {RESERVE / GIB:.0f} GiB for the CUDA context, kernels' "
        "workspaces and fragmentation."
    )
    for name in tqdm(names, desc="base models"):
        found += rows(name)
        text = write(folder, "memory-families", title, header, found)
    return text
