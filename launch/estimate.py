"""How long an experiment will take, from a few passes through its base model on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from antidreambooth.defaults import Defaults
from antidreambooth.loading import load_backbone, read_defaults, resolution_of
from antidreambooth.methods import METHODS
from antidreambooth.precision import computes_in_bf16
from launch.experiment import BASE, Experiment, is_config

BATCH = 4
PHOTOS = 4  # a person has, typically
MODELS = 3  # of an ensemble, typically
ENCODER = 2.0  # a PGD step through encoder and U-Net, in passes through the U-Net
FORWARD = 1 / 3  # of a pass forward and back
OVERHEAD = 8.0  # seconds a cell: loading, writing, finding and measuring faces


def estimate(experiment: Experiment, workers: int, cloaks: int, cells: int) -> float:
    """Seconds for what is left to do, give or take a half; on GPUs the passes are timed on the first one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        passed = _seconds_a_pass(experiment.backbone, device)
    finally:
        torch.set_num_threads(threads)
    defaults, asked = read_defaults(experiment.backbone), experiment.generation
    sampling = asked.sampling_steps or defaults.sampling_steps
    pictures = len(asked.prompts) * asked.images * sampling * 2 * FORWARD  # two for guidance
    recipes = [defaults.recipe("lora" if "lora" in how else "full") for how in experiment.victims.values()]
    victim = sum(recipe.steps * recipe.batch_size for recipe in recipes) / len(recipes)
    made = [_cloak_passes(how, defaults) for how in experiment.protections.values() if is_config(how.split()[0])]
    cloak = sum(made) / max(1, len(made))
    seconds = passed * (cloaks * cloak + cells * (victim + pictures)) + cells * OVERHEAD
    return seconds / max(1, min(workers, cloaks + cells))


def _cloak_passes(how: str, defaults: Defaults) -> float:
    """Images through the U-Net for one person's cloak by the method that a config is named after; ASPL otherwise."""
    method = METHODS.get(Path(how.split()[0]).stem, METHODS["aspl"])
    attack = method.rounds * method.pgd_steps * PHOTOS * ENCODER
    if method.alternating:
        learning = method.rounds * 2 * defaults.surrogate.steps * defaults.surrogate.batch_size
    else:
        learning = 0 if method.untouched else defaults.full.steps * defaults.full.batch_size
    return (MODELS if method.several else 1) * (attack + learning)


def _seconds_a_pass(name: str, device: torch.device) -> float:
    """Of one image through the U-Net, forward and back."""
    backbone = load_backbone(name).to(device)
    backbone.unet.requires_grad_(True)
    side = resolution_of(name) // backbone.downscale
    latents = torch.zeros(BATCH, backbone.latent_channels, side, side, device=device)
    timesteps = torch.zeros(BATCH, dtype=torch.long, device=device)
    embeddings = backbone.embed([backbone.defaults.class_prompt]).expand(BATCH, -1, -1)
    times = []
    for _ in range(3):  # the first one warms up
        started = time.monotonic()
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16()):
            loss = backbone.denoising_loss(latents, timesteps, torch.ones_like(latents), embeddings).sum()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - started)
    return min(times) / BATCH


def left(experiment: Experiment) -> tuple[int, int]:
    """Cloaks and cells that are not finished."""
    cloaks = [cloak for cloak in experiment.cloaks() if not experiment.cloak_record(cloak).is_file()]
    cells = [cell for cell in experiment.cells() if not experiment.cell_record(cell).is_file()]
    return len(cloaks), len([cell for cell in cells if cell.cloak.protection != BASE])
