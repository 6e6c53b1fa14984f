"""``antidreambooth.cloak``: the methods as one function, for notebooks and other programs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
from antidreambooth.attack.rounds import alternate, require_vital
from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.diffusion.class_images import Progress, class_images
from antidreambooth.diffusion.loading import load_backbone, resolution_of
from antidreambooth.diffusion.precision import computes_in_bf16
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.diffusion.source import Named, Source
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import PriorPreservation
from antidreambooth.photos.decoding import flatten, square, to_float
from antidreambooth.photos.delivery import require_change, to_8bit

log = logging.getLogger("antidreambooth")


def cloak(
    images: Sequence[Image.Image],
    backbone: Named = "embedded",
    method: str = "aspl",
    budget: float = 8.0,
    *,
    clean_images: Sequence[Image.Image] | None = None,
    ensemble: Named | Sequence[Named] = (),
    settings: Settings | None = None,
    seed: int = 0,
    rounds: int | None = None,
    resolution: int | None = None,
    device: str | None = None,
    progress: Progress = iter,
) -> list[Image.Image]:
    """Cloaks photos of one person; the same pixels as ``cli.py fit -c configs/METHOD.yaml`` on the same machine.

    Save what comes back without loss (PNG): a JPEG washes the perturbation out.

    Args:
        images: photos; each is cropped to its centred square and scaled to ``resolution``.
        backbone: base model: ``embedded``, a folder in diffusers layout, or a hub id; or a ``Source``, which is one of
            these with a revision or a variant of the weights. For ``fsmg``, ``t-fsmg`` and
            ``e-fsmg`` a model that was trained on the person, such as ``model/`` of ``fit -c configs/dreambooth.yaml``.
        method: ``aspl``, ``t-aspl``, ``e-aspl``, ``fsmg``, ``t-fsmg``, ``e-fsmg`` or ``advdm``.
        budget: largest change of a pixel's value, in 8-bit steps.
        clean_images: other photos of the person, which the surrogate learns from; ``images`` when not given.
        ensemble: further base models, for ``e-aspl`` and ``e-fsmg``.
        settings: whatever else the command line can change, such as ``Settings(adaptation=LoRA(), micro_batch=1,
            training=DreamBooth(gradient_checkpointing=True))``; its budget gives way to ``budget``.
        seed: the same one gives the same pixels.
        rounds: how many; the method's own number when not given.
        resolution: side in pixels of what comes back; what the backbone was made for when not given.
        device: ``cpu``, ``cuda`` and so on; a GPU where there is one when not given.
        progress: wraps the loop over rounds (and one over class images), such as ``tqdm.auto.tqdm``.

    Returns:
        The cloaked photos, RGB, in the order of ``images``.

    Raises:
        InputError: there is no such method or backbone, no photo, a setting is out of range, or a method of several
            models was given one.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    names = Source.several([backbone, *Source.several(ensemble)])
    if METHODS[method].several != (len(names) > 1):
        several = METHODS[method].several
        raise InputError(f"{method} attacks {'several models: give ensemble' if several else 'one model'}")
    if not images:
        raise InputError("there are no images to cloak")
    total = METHODS[method].rounds if rounds is None else rounds
    if total < 1:
        raise InputError(f"rounds are 1 or more, got {rounds}")
    assembly = Assembly(METHODS[method], replace(settings or Settings(), budget=budget))
    side = resolution_of(names[0], resolution)
    for name in names[1:]:
        resolution_of(name, side)  # a wrong one is found before the first is loaded
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pixels = _pixels(images, side)
    originals = to_float(pixels).to(where)
    clean = to_float(_pixels(clean_images, side)).to(where) if clean_images else originals
    models = [load_backbone(name).to(where) for name in names]
    for notice in dict.fromkeys(model.defaults.notice for model in models if model.defaults.notice):
        log.warning(notice)

    def class_latents(model: Backbone, prior: PriorPreservation) -> Posterior:
        assert prior.class_prompt is not None
        pictures = class_images(model, prior.class_prompt, prior.images, side, progress=progress)
        return model.encode_all(to_float(pictures).to(where), assembly.attack.micro_batch)

    assembly.adopt(models, class_latents, seed)
    # The perturbation is what is kept between rounds, as a training run keeps it: adding it rounds.
    perturbation, memory = assembly.attack.start(originals, seed), None
    with torch.autocast(where.type, torch.bfloat16, enabled=computes_in_bf16()):
        surrogates = assembly.surrogates(originals, clean, plain_weights)
        for number in progress(range(total)):
            turn = Turn(number, seed, rounds=total)
            outcome = alternate(surrogates, originals, originals + perturbation, assembly.attack, turn, memory)
            require_vital(outcome.vital_signs.tolist(), turn)
            perturbation, memory = outcome.cloaked - originals, outcome.memory
    cloaked = to_8bit((originals + perturbation).cpu(), pixels, budget)
    require_change(pixels, cloaked, [f"image {number}" for number in range(len(cloaked))])
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in cloaked]


def _pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """Centred squares, n 3 side side in 8 bits."""
    return torch.stack([square(flatten(image, f"image {n}"), side)[0] for n, image in enumerate(images)])
