"""``antidreambooth.cloak``: the methods as one function, for notebooks and other programs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.optim import AdamW

from antidreambooth.attack.methods import METHODS
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import alternate
from antidreambooth.attack.surrogates import Alternating, Fixed, Surrogate
from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.diffusion.class_images import Progress, class_images
from antidreambooth.diffusion.loading import load_backbone, resolution_of
from antidreambooth.diffusion.precision import computes_in_bf16
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.weights import Weights
from antidreambooth.photos.decoding import flatten, square, to_float
from antidreambooth.photos.delivery import to_8bit

log = logging.getLogger("antidreambooth")


def cloak(
    images: Sequence[Image.Image],
    backbone: str = "embedded",
    method: str = "aspl",
    budget: float = 8.0,
    *,
    clean_images: Sequence[Image.Image] | None = None,
    ensemble: Sequence[str] = (),
    seed: int = 0,
    rounds: int | None = None,
    device: str | None = None,
    progress: Progress = iter,
) -> list[Image.Image]:
    """Cloaks photos of one person; the same pixels as ``cli.py fit -c configs/METHOD.yaml`` on the same machine.

    Save what comes back without loss (PNG): a JPEG washes the perturbation out.

    Args:
        images: photos; each is cropped to its centred square and scaled to the backbone's resolution.
        backbone: base model: ``embedded``, a folder in diffusers layout, or a hub id. For ``fsmg``, ``t-fsmg`` and
            ``e-fsmg`` a model that was trained on the person, such as ``model/`` of ``fit -c configs/dreambooth.yaml``.
        method: ``aspl``, ``t-aspl``, ``e-aspl``, ``fsmg``, ``t-fsmg``, ``e-fsmg`` or ``advdm``.
        budget: largest change of a pixel's value, in 8-bit steps.
        clean_images: other photos of the person, which the surrogate learns from; ``images`` when not given.
        ensemble: further base models, for ``e-aspl`` and ``e-fsmg``.
        seed: the same one gives the same pixels.
        rounds: how many; the method's own number when not given.
        device: ``cpu``, ``cuda`` and so on; a GPU where there is one when not given.
        progress: wraps the loop over rounds (and one over class images), such as ``tqdm.auto.tqdm``.

    Returns:
        The cloaked photos, RGB, in the order of ``images``.

    Raises:
        InputError: there is no such method or backbone, no photo, or a method of several models was given one.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    chosen, names = METHODS[method], [backbone, *ensemble]
    if chosen.several != (len(names) > 1):
        raise InputError(f"{method} attacks {'several models: give ensemble' if chosen.several else 'one model'}")
    if not images:
        raise InputError("there are no images to cloak")
    side = resolution_of(backbone)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pixels = _pixels(images, side)
    originals = to_float(pixels).to(where)
    clean = to_float(_pixels(clean_images, side)).to(where) if clean_images else originals
    attack = PGD(budget, steps=chosen.pgd_steps, objective=chosen.objective())
    models = [load_backbone(name).to(where) for name in names]
    for notice in dict.fromkeys(model.defaults.notice for model in models if model.defaults.notice):
        log.warning(notice)
    # The perturbation is what is kept between rounds, as a training run keeps it: adding it rounds.
    perturbation = torch.zeros_like(originals)
    classes = [_classes(model, side, attack.micro_batch, progress) if chosen.alternating else None for model in models]
    with torch.autocast(where.type, torch.bfloat16, enabled=computes_in_bf16()):
        if chosen.alternating:
            surrogates: list[Surrogate] = [
                _alternating(model, clean, own, attack.micro_batch) for model, own in zip(models, classes, strict=True)
            ]
        else:
            usual = DreamBooth().instance_prompt
            surrogates = [Fixed(m, m.defaults.class_prompt if chosen.untouched else usual) for m in models]
        for number in progress(range(chosen.rounds if rounds is None else rounds)):
            outcome = alternate(surrogates, originals, originals + perturbation, attack, Turn(number, seed))
            perturbation = outcome.cloaked - originals
    cloaked = to_8bit((originals + perturbation).cpu(), pixels, budget)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in cloaked]


def _classes(backbone: Backbone, side: int, micro_batch: int, progress: Progress) -> Posterior | None:
    """Latents of the class images, in full precision; None without prior preservation."""
    prior = DreamBooth().completed(backbone.defaults).prior
    if not prior.weight:
        return None
    assert prior.class_prompt is not None
    pictures = class_images(backbone, prior.class_prompt, prior.images, side, progress=progress)
    return backbone.encode_all(to_float(pictures).to(backbone.alphas_cumprod.device), micro_batch)


def _alternating(backbone: Backbone, clean: Tensor, classes: Posterior | None, micro_batch: int) -> Alternating:
    """A base model that learns a little in every round."""
    adaptation = Full()
    training = adaptation.surrogate_settings(DreamBooth(), backbone.defaults)
    adaptation.apply(backbone, training, seed=0)
    assert training.learning_rate is not None
    learned = backbone.learned()
    optimizer = AdamW(learned, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    latents = backbone.encode_all(clean, micro_batch)
    return Alternating(backbone, training, Weights(learned, optimizer), latents, classes, micro_batch)


def _pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """Centred squares, n 3 side side in 8 bits."""
    return torch.stack([square(flatten(image, f"image {n}"), side)[0] for n, image in enumerate(images)])
