"""``antidreambooth.cloak``: the methods as one function, for notebooks and other programs."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
from antidreambooth.attack.rounds import alternate, require_vital
from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.diffusion.class_images import Progress, class_images
from antidreambooth.diffusion.loading import load_backbone, shared_resolution
from antidreambooth.diffusion.precision import computes_in_bf16, unaffected
from antidreambooth.diffusion.seeding import Turn, require_seed
from antidreambooth.diffusion.source import Named, Source
from antidreambooth.errors import InputError, require
from antidreambooth.finetuning.dreambooth import PriorPreservation
from antidreambooth.photos.decoding import square, to_float
from antidreambooth.photos.delivery import require_change, to_8bit
from antidreambooth.photos.given import Picture, pictures
from antidreambooth.provenance import read_manifest

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
    device: str | None = None,
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
            the embedded model is refused for these, and of one without a manifest beside it a warning says that it is
            not known whether it was.
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
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    for name, value in (("seed", seed), ("rounds", rounds), ("resolution", resolution)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise InputError(f"{name} is a whole number: got {value!r}")
    if not isinstance(budget, int | float):
        raise InputError(f"budget is a number of 8-bit steps: got {budget!r}")
    require_seed("seed", seed)
    require("rounds", rounds, 1)
    names = Source.several([backbone, *Source.several(ensemble)])
    if METHODS[method].several != (len(names) > 1):
        several = METHODS[method].several
        raise InputError(f"{method} attacks {'several models: give ensemble' if several else 'one model'}")
    if METHODS[method].surrogate == "trained":
        for source in names:
            require_trained(source)
    where = device_named(device)
    photos = pictures(images, "images", again)
    others = None if clean_images is None else pictures(clean_images, "clean_images", again)
    assembly = Assembly(METHODS[method], replace(settings or Settings(), budget=float(budget)))
    side = shared_resolution(names, resolution)
    run = Turn(0, seed, rounds=METHODS[method].rounds if rounds is None else rounds)
    with unaffected(where):
        return _cloaked(photos, others, names, assembly, run, side, where, progress)


def _cloaked(
    photos: list[Image.Image],
    others: list[Image.Image] | None,
    names: list[Source],
    assembly: Assembly,
    run: Turn,
    side: int,
    where: torch.device,
    progress: Progress,
) -> list[Image.Image]:
    """The photos after all rounds; ``run`` says how many, and the seed."""
    pixels = _pixels(photos, side)
    originals = to_float(pixels).to(where)
    clean = originals if others is None else to_float(_pixels(others, side)).to(where)
    models = [load_backbone(name).to(where) for name in names]
    for notice in dict.fromkeys(model.defaults.notice for model in models if model.defaults.notice):
        log.warning(notice)

    def class_latents(model: Backbone, prior: PriorPreservation) -> Posterior:
        assert prior.class_prompt is not None
        pictures = class_images(model, prior.class_prompt, prior.images, side, progress=progress)
        return model.encode_all(to_float(pictures).to(where), assembly.attack.micro_batch)

    assembly.adopt(models, class_latents, run.seed)
    # The perturbation is what is kept between rounds, as a training run keeps it: adding it rounds.
    perturbation, memory = assembly.attack.start(originals, run.seed), None
    with torch.autocast(where.type, torch.bfloat16, enabled=computes_in_bf16()):
        surrogates = assembly.surrogates(originals, clean, plain_weights)
        for number in progress(range(run.rounds)):
            turn = replace(run, number=number)
            outcome = alternate(surrogates, originals, originals + perturbation, assembly.attack, turn, memory)
            require_vital(outcome.vital_signs.tolist(), turn)
            perturbation, memory = outcome.cloaked - originals, outcome.memory
    cloaked = to_8bit((originals + perturbation).cpu(), pixels, assembly.attack.budget)
    require_change(pixels, cloaked, [f"image {number}" for number in range(len(cloaked))])
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in cloaked]


def require_trained(source: Source) -> None:
    """Looks whether a model that is attacked as one that knows the person can be one.

    Raises:
        InputError: it is the embedded base model, which knows nobody. Of any other one only the manifest of a victim
            of ours beside it tells; where there is none, a warning says that it is not known.
    """
    if source.name == "embedded":
        raise InputError(
            "this method attacks a model that was trained on the person, and the embedded one knows nobody: give "
            "backbone the model/ of `fit -c configs/dreambooth.yaml`, or use method='advdm' for an untouched model"
        )
    folder = Path(source.name).expanduser()
    record = read_manifest(folder.parent) if folder.is_dir() else None
    if record is None or record["settings"].get("model", {}).get("class") != "Victim":
        log.warning("nothing says that %s was trained on the person: if it was not, use method='advdm'", source)


def device_named(name: str | None) -> torch.device:
    """A device by name; a GPU where there is one when there is no name.

    Raises:
        InputError: this machine has no such device.
    """
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    there = [*(["cuda", *gpus] if gpus else []), *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name is not None and str(name) not in there:
        raise InputError(f"there is no device {str(name)!r} here: choose {', '.join(there)}")
    return torch.device(there[0] if name is None else name)


def _pixels(images: list[Image.Image], side: int) -> Tensor:
    """Centred squares, n 3 side side in 8 bits."""
    return torch.stack([square(image, side)[0] for image in images])
