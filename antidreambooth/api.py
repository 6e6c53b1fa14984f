"""``antidreambooth.cloak``: the methods as one function, for notebooks and other programs."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Iterable
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
from antidreambooth.attack.rounds import alternate, require_vital
from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.diffusion.class_images import Progress, class_images
from antidreambooth.diffusion.loading import load_backbone, shared_resolution
from antidreambooth.diffusion.precision import computes_in_bf16, unaffected
from antidreambooth.diffusion.seeding import Turn, require_seed
from antidreambooth.diffusion.source import EMBEDDED, Named, Source, locate
from antidreambooth.errors import InputError, require
from antidreambooth.finetuning.dreambooth import PriorPreservation
from antidreambooth.photos.decoding import to_float
from antidreambooth.photos.delivery import require_change, to_8bit
from antidreambooth.photos.given import Picture, described, squares
from antidreambooth.provenance import person_in

log = logging.getLogger("antidreambooth")


def cloak(
    images: Iterable[Picture],
    backbone: Named = "embedded",
    method: str = "aspl",
    budget: float = 8.0,
    *,
    clean_images: Iterable[Picture] | None = None,
    ensemble: Named | Iterable[Named] = (),
    settings: Settings | None = None,
    seed: int = 0,
    rounds: int | None = None,
    resolution: int | None = None,
    device: str | torch.device | None = None,
    again: bool = False,
    progress: Progress = iter,
) -> list[Image.Image]:
    """Cloaks photos of one person; the same pixels as ``cli.py fit -c configs/METHOD.yaml`` on the same machine.

    Save what comes back without loss (PNG): a JPEG washes the perturbation out.

    What the caller has set for torch (``no_grad``, ``autocast``, a default device or dtype) changes nothing. One call
    works at a time: a second thread waits.

    Args:
        images: photos: paths, Pillow images, or arrays of uint8 (h w 3, in sRGB), in any mixture. Each is cropped to
            its centred square and scaled to ``resolution``.
        backbone: base model: ``embedded``, a folder in diffusers layout, or a hub id; or a ``Source``, which is one of
            these with a revision or a variant of the weights. For ``fsmg``, ``t-fsmg`` and
            ``e-fsmg`` a model that was trained on the person, such as ``model/`` of ``fit -c configs/dreambooth.yaml``;
            the ``manifest.json`` beside such a ``model/`` says that it was, and by which prompt it knows the person.
            The embedded model is refused for these methods, and so is one whose manifest speaks of no person; of one
            without a manifest, a warning says that it is not known whether it was.
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
        again: whether files may be given that a run of this project has cloaked, as a manifest near them says.
        progress: wraps the loop over rounds (and one over class images), such as ``tqdm.auto.tqdm``.

    Returns:
        The cloaked photos, RGB, in the order of ``images``.

    Raises:
        InputError: there is no such method or backbone, no photo, a setting is out of range, or a method of several
            models was given one.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    if not isinstance(budget, Real):
        raise InputError(f"budget is a number of 8-bit steps: got {budget!r}")
    if not isinstance(settings, Settings | None):
        raise InputError(f"settings are Settings(...) of antidreambooth.attack.methods: got {described(settings)}")
    if not callable(progress):
        raise InputError(f"progress wraps a loop, as tqdm.auto.tqdm does: got {described(progress)}")
    if not isinstance(ensemble, Iterable | Source | os.PathLike):
        raise InputError(f"ensemble is a list of base models: got {described(ensemble)}")
    chosen = METHODS[method]
    run = Turn(0, whole("seed", seed), rounds=chosen.rounds if rounds is None else whole("rounds", rounds))
    require_seed("seed", run.seed)
    require("rounds", run.rounds, 1)
    side = None if resolution is None else whole("resolution", resolution)
    names = Source.several([backbone, *Source.several(ensemble)])
    if chosen.several != (len(names) > 1):
        raise InputError(f"{method} attacks {'several models: give ensemble' if chosen.several else 'one model'}")
    assembly = Assembly(chosen, replace(settings or Settings(), budget=float(budget)))
    where = device_named(device)
    side = shared_resolution(names, side)
    prompts = [trained_prompt(source, assembly.settings) for source in names] if chosen.surrogate == "trained" else None
    photos = squares(images, "images", side, again)
    others = photos if clean_images is None else squares(clean_images, "clean_images", side, again)
    with unaffected(where):
        return _cloaked(torch.stack(photos), torch.stack(others), names, assembly, prompts, run, where, progress)


def _cloaked(
    pixels: UInt8[Tensor, "n 3 h w"],
    others: UInt8[Tensor, "m 3 h w"],
    names: list[Source],
    assembly: Assembly,
    prompts: list[str] | None,
    run: Turn,
    where: torch.device,
    progress: Progress,
) -> list[Image.Image]:
    """The photos after all rounds; ``run`` says how many, and the seed."""
    originals, clean = to_float(pixels).to(where), to_float(others).to(where)
    low = computes_in_bf16(where)
    models = [load_backbone(name).to(where) for name in names]
    for notice in dict.fromkeys(model.defaults.notice for model in models if model.defaults.notice):
        log.warning(notice)

    def class_latents(model: Backbone, prior: PriorPreservation) -> Posterior:
        assert prior.class_prompt is not None
        with torch.autocast(where.type, torch.bfloat16, enabled=low):
            batch, side = assembly.attack.micro_batch, pixels.shape[-1]
            pictures = class_images(model, prior.class_prompt, prior.images, side, batch=batch, progress=progress)
        return model.encode_all(to_float(pictures).to(where), assembly.attack.micro_batch)

    assembly.adopt(models, class_latents, run.seed, prompts)
    # The perturbation is what is kept between rounds, as a training run keeps it: adding it rounds.
    perturbation, memory = assembly.attack.start(originals, run.seed), None
    with torch.autocast(where.type, torch.bfloat16, enabled=low):
        surrogates = assembly.surrogates(originals, clean, plain_weights)
        for number in progress(range(run.rounds)):
            turn = replace(run, number=number)
            outcome = alternate(surrogates, originals, originals + perturbation, assembly.attack, turn, memory)
            require_vital(outcome.vital_signs.tolist(), turn)
            perturbation, memory = outcome.cloaked - originals, outcome.memory
    cloaked = to_8bit((originals + perturbation).cpu(), pixels, assembly.attack.budget)
    require_change(pixels, cloaked, [f"image {number}" for number in range(len(cloaked))])
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in cloaked]


def trained_prompt(source: Source, settings: Settings) -> str:
    """What a model that was trained on the person is asked for: what the settings say, or the model's manifest.

    Raises:
        InputError: the model knows nobody: it is the embedded one, or the manifest beside it speaks of no person. Where
            there is no manifest of ours, a warning says that it is not known.
    """
    advice = (
        "give backbone the model/ of `fit -c configs/dreambooth.yaml`, or use method='advdm' for an untouched model"
    )
    wanted = "this method attacks a model that was trained on the person"
    place = locate(source)
    if place == EMBEDDED:
        raise InputError(f"{wanted}, and the embedded one knows nobody: {advice}")
    try:
        prompt = person_in(place) if isinstance(place, Path) else None
    except InputError as error:
        raise InputError(f"{wanted}, and {error}: {advice}") from error
    if prompt is None:
        log.warning("nothing says that %s was trained on the person: if it was not, use method='advdm'", source)
    return settings.prompt or prompt or settings.training.instance_prompt


def whole(name: str, value: Any) -> int:
    """A whole number, NumPy's too.

    Raises:
        InputError: it is none.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} is a whole number: got {value!r}") from error


def device_named(name: str | torch.device | None) -> torch.device:
    """A device by name; a GPU where there is one when there is no name.

    Raises:
        InputError: this machine has no such device.
    """
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    there = [*(["cuda", *gpus] if gpus else []), *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name is not None and str(name) not in [*there, "cpu:0"]:
        raise InputError(f"there is no device {str(name)!r} here: choose {', '.join(there)}")
    return torch.device(there[0] if name is None else name)
