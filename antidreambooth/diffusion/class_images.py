"""Class images for prior preservation: sampled once from the untouched base model, cached by what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.precision import autocasts
from antidreambooth.diffusion.sampling import blank, noise_of, sample
from antidreambooth.errors import InputError
from antidreambooth.files import cache_folder, writing
from antidreambooth.photos.delivery import write_png

Progress = Callable[[Iterable[int]], Iterable[int]]
BATCH = 4  # pictures that are drawn at a time; fewer on request, as this is what needs most memory


def class_images(
    backbone: Backbone,
    prompt: str,
    count: int,
    resolution: int,
    seed: int = 0,
    batch: int = BATCH,
    progress: Progress = iter,
    fingerprint: str | None = None,
) -> UInt8[Tensor, "n 3 h w"]:
    """``count`` pictures of the class prompt, from the cache or sampled now.

    Several processes may ask at once: one samples, the others wait for it. A killed run goes on where it stopped.
    ``backbone`` must be untouched, since its weights are part of the cache's key, as is the precision of whoever asks.

    Args:
        backbone: what samples them.
        prompt: the class prompt.
        count: how many.
        resolution: side in pixels.
        seed: of the noise.
        batch: how many are sampled at a time; at most ``BATCH``.
        progress: wraps the loop over batches, for a progress bar.
        fingerprint: of the backbone, where it is known already: it takes seconds for a large one.

    Raises:
        InputError: they cannot be written to the cache, or are none: nothing but one colour, or not finite.
    """
    batch = min(batch, BATCH)
    folder = folder_of(backbone, prompt, resolution, seed, batch, fingerprint)
    files = files_of(folder, count)
    with writing(folder, "make room and make it writable, or name another cache folder with XDG_CACHE_HOME"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock")).acquire()
    with lock:
        for start in progress(left_to_draw(files, batch)):
            # Always a whole batch, so that the pictures do not depend on how many were asked for.
            noise = noise_of(backbone, resolution, range(start, start + batch), seed)
            pictures = sample(backbone, prompt, noise).cpu()
            if blank(pictures).all():
                raise InputError(
                    f"the base model draws class images of {prompt!r} that have one colour all over, of which nothing "
                    "can be learned: use another base model"
                )
            for file, picture in zip(files[start:], pictures, strict=False):
                write_png(file, picture)
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


def folder_of(
    backbone: Backbone, prompt: str, resolution: int, seed: int = 0, batch: int = BATCH, fingerprint: str | None = None
) -> Path:
    """Where ``class_images`` keeps what it draws, for the same arguments; need not exist."""
    kind = backbone.device.type
    made_by: dict[str, Any] = {
        "backbone": fingerprint or backbone.fingerprint(),
        "prompt": prompt,
        "resolution": resolution,
        "seed": seed,
        "batch": batch,  # a batch of another size rounds differently
        "guidance_scale": backbone.defaults.guidance_scale,
        "sampling_steps": backbone.defaults.sampling_steps,
        **({"autocast": str(torch.get_autocast_dtype(kind))} if autocasts(kind) else {}),
    }
    return cache_folder("class-images") / hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


def files_of(folder: Path, count: int) -> list[Path]:
    """The files of so many class images, there or not."""
    return [folder / f"{index:04d}.png" for index in range(count)]


def left_to_draw(files: Sequence[Path], batch: int) -> list[int]:
    """The first image of each batch of which an image is missing."""
    return [s for s in range(0, len(files), batch) if not all(file.is_file() for file in files[s : s + batch])]
