"""What a run costs on this machine: passes through its base model, timed, and how many a method needs."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from antidreambooth.attack.methods import Method
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.loading import load_backbone, resolution_of
from antidreambooth.diffusion.precision import computes_in_bf16

BATCH = 4
ENCODER = 2.0  # a PGD step through encoder and U-Net, in passes through the U-Net
FORWARD = 1 / 3  # of a pass forward and back


class Measured(NamedTuple):
    """What a base model needs here."""

    seconds: float  # of one image through the U-Net, forward and back
    learned: int  # bytes of the weights that a surrogate trains
    all: int  # bytes of all weights


def cloak_passes(method: Method, defaults: Defaults, photos: int, models: int) -> float:
    """Images through the U-Net for one person's cloak."""
    attack = method.rounds * method.pgd_steps * photos * ENCODER
    learns = method.surrogate == "alternating"
    recipe = defaults.surrogate if learns else defaults.full
    steps = 0 if method.surrogate == "untouched" else recipe.steps * (2 * method.rounds if learns else 1)
    return models * (attack + steps * recipe.batch_size * (2 if defaults.prior_weight else 1))


def drawing(sampling_steps: int) -> float:
    """One generated picture, in passes forward and back."""
    return sampling_steps * 2 * FORWARD  # two for guidance


def measure(
    name: str, workers: int, resolution: int | None = None, revision: str | None = None, variant: str | None = None
) -> Measured:
    """Times a few passes on this machine's first GPU, or on a worker's part of its cores."""
    backbone = load_backbone(name, revision, variant).to(device())
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        seconds = _seconds_a_pass(backbone, resolution or resolution_of(name, revision))
    finally:
        torch.set_num_threads(threads)
    learned = [*backbone.unet.parameters(), *backbone.text_encoder.parameters()]
    return Measured(seconds, *(sum(weights.nbytes for weights in part) for part in (learned, backbone.parameters())))


def device() -> torch.device:
    """Where runs compute on a machine like this one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _seconds_a_pass(backbone: Backbone, resolution: int) -> float:
    """Of one image through the U-Net, forward and back."""
    backbone.unet.requires_grad_(True)
    side, where = resolution // backbone.downscale, backbone.alphas_cumprod.device
    latents = torch.zeros(BATCH, backbone.latent_channels, side, side, device=where)
    timesteps = torch.zeros(BATCH, dtype=torch.long, device=where)
    embeddings = backbone.embed([backbone.defaults.class_prompt]).expand(BATCH, -1, -1)
    times = []
    for _ in range(3):  # the first one warms up
        started = time.monotonic()
        with torch.autocast(where.type, torch.bfloat16, enabled=computes_in_bf16()):
            loss = backbone.denoising_loss(latents, timesteps, torch.ones_like(latents), embeddings).sum()
        loss.backward()
        if where.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - started)
    return min(times) / BATCH
