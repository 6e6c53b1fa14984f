"""``antidreambooth.cloak``: the methods as one function, for notebooks and other programs."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from numbers import Real
from typing import Any

import torch
from PIL import Image

from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
from antidreambooth.attack.objectives.ratio import against_base, oppose_base, require_decoys
from antidreambooth.attack.parametrisation import Shape
from antidreambooth.attack.rounds import alternate, require_vital
from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.diffusion.class_images import Progress, class_images
from antidreambooth.diffusion.defaults import given
from antidreambooth.diffusion.layout import shared_resolution
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import computes_in_bf16, has_own_memory, unaffected
from antidreambooth.diffusion.seeding import Turn, require_seed
from antidreambooth.diffusion.source import EMBEDDED, Named, Source, whole_folder
from antidreambooth.errors import InputError, require
from antidreambooth.finetuning.dreambooth import PriorPreservation
from antidreambooth.photos.decoding import Photo, to_float
from antidreambooth.photos.delivery import Delivery
from antidreambooth.photos.given import Picture, described
from antidreambooth.photos.regions import Region
from antidreambooth.provenance import base_in, person_in

log = logging.getLogger("antidreambooth")


def cloak(
    images: Iterable[Picture],
    backbone: Named = "embedded",
    method: str = "aspl",
    budget: float = 8.0,
    *,
    shape: Shape | None = None,
    clean_images: Iterable[Picture] | None = None,
    ensemble: Named | Iterable[Named] = (),
    settings: Settings | None = None,
    seed: int = 0,
    rounds: int | None = None,
    resolution: int | None = None,
    device: str | torch.device | None = None,
    region: Region = Region(),  # noqa: B008 (frozen)
    again: bool = False,
    progress: Progress = iter,
) -> list[Image.Image]:
    """Cloaks photos of one person; the same pixels as ``cli.py fit -c configs/METHOD.yaml`` on the same machine.

    Save what comes back without loss (PNG): a JPEG washes the perturbation out.

    What the caller has set for torch (``no_grad``, ``autocast``, a default device or dtype) changes nothing. One call
    works at a time: a second thread waits.

    Args:
        images: photos of any size: paths, Pillow images, or arrays of uint8 (h w 3, in sRGB), in any mixture.
        backbone: base model: ``embedded``, a folder in diffusers layout, or a hub id; or a ``Source``, which is one of
            these with a revision or a variant of the weights, one ``.safetensors`` file with a folder of the other
            components, or how weights are held (``frozen_weights``, for large models). For ``fsmg``, ``t-fsmg``,
            ``e-fsmg``, ``decoy`` and ``ours`` a model that was trained on the person, such as ``model/`` of ``fit -c
            configs/dreambooth.yaml``; the ``manifest.json`` beside such a ``model/`` says that it was, from which base
            model, and by which prompt it knows the person. The embedded model is refused for these methods, and so is
            one whose manifest speaks of no person; of one without a manifest, a warning says that it is not known
            whether it was.
        method: ``aspl``, ``t-aspl``, ``e-aspl``, ``fsmg``, ``t-fsmg``, ``e-fsmg``, ``advdm``, ``mist``, ``ace``,
            ``sds``, ``photoguard``, ``pid``, ``simac``, ``caat``, ``metacloak``, or ``decoy`` and ``ours`` with
            ``Settings(objective=LikelihoodRatio(decoy=FOLDER))``.
        budget: largest change of a pixel's value, in 8-bit steps.
        shape: of the budget: ``flat``, the same for all pixels, or ``visible``: more for those at which less is seen,
            up to four times as much, and less for the others; as visible on the whole, by SSIM. When not given,
            that of the settings, which is ``flat`` if they say nothing.
        clean_images: other photos of the person, which the surrogate learns from; ``images`` when not given.
        ensemble: further base models, for ``e-aspl`` and ``e-fsmg``.
        settings: whatever else the command line can change, such as ``Settings(adaptation=LoRA(), micro_batch=1,
            training=DreamBooth(gradient_checkpointing=True))``; its budget gives way to ``budget``.
        seed: the same one gives the same pixels.
        rounds: how many; the method's own number when not given.
        resolution: side in pixels of the squares that the model sees; what it was made for when not given.
        device: ``cpu``, ``cuda`` and so on; a GPU where there is one when not given.
        region: where the photos may change, such as ``Region(widths=2.0)`` for faces alone: everywhere when not given.
        again: whether files may be given that a run of this project has cloaked, as a manifest near them says.
        progress: wraps the loop over rounds (and those over class images and a pool's training), such as
            ``tqdm.auto.tqdm``.

    Returns:
        The cloaked photos in the order of ``images``, upright, at their own size, with their colour profile and alpha
        (``image.info["icc_profile"]``), 8 bits. With ``Settings(parametrisation=Square())`` their centred squares at
        the resolution, in sRGB.

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
    if not isinstance(region, Region) or region.faces == "person":
        raise InputError("region is a Region(...) of antidreambooth.photos.regions, of all faces or the largest")
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
    wanted = settings or Settings()
    assembly = Assembly(chosen, replace(wanted, budget=float(budget), shape=given(shape, wanted.shape)))
    require_decoys(assembly.attack.objective)
    if against_base(assembly.attack.objective):
        oppose_base(assembly.attack.objective, base_of(names, chosen.surrogate == "trained"))
    where = device_named(device)
    side = shared_resolution(names, side)
    assembly.require_possible(names)
    prompts = [trained_prompt(source, assembly.settings) for source in names] if chosen.surrogate == "trained" else None
    take = assembly.parametrisation.take
    with unaffected(where):
        photos = take(images, "images", side, again, region)
        others = photos if clean_images is None else take(clean_images, "clean_images", side, again)
        return _cloaked(photos, others, side, names, assembly, prompts, run, where, progress)


def _cloaked(
    photos: list[Photo],
    others: list[Photo],
    side: int,
    names: list[Source],
    assembly: Assembly,
    prompts: list[str] | None,
    run: Turn,
    where: torch.device,
    progress: Progress,
) -> list[Image.Image]:
    """The photos after all rounds; ``run`` says how many, and the seed."""
    parametrisation, attack = assembly.parametrisation, assembly.attack
    resting = parametrisation.canvas(photos, side)
    canvas, reference = resting.to(where), parametrisation.canvas(others, side).to(where)
    low = computes_in_bf16(where)
    if not low and any(name.frozen_weights != "fp32" for name in names):
        raise InputError(f"{where} does not compute in bf16: leave out frozen_weights, or choose another device")
    models = []
    for number, name in enumerate(names):
        model = load_backbone(name, assembly.encoder_only)
        asked = assembly.asks(model, prompts[number] if prompts else None)
        if asked and has_own_memory(where):
            with torch.autocast(where.type, torch.bfloat16, enabled=low):
                model.rest_text_encoders(where, asked)
        models.append(model.to(where))
    for notice in dict.fromkeys(model.defaults.notice for model in models if model.defaults.notice):
        log.warning(notice)
    for name, model in zip(names, models, strict=True):
        if model.advice:
            log.warning("%s: %s", name, model.advice)

    def class_latents(model: Backbone, prior: PriorPreservation) -> Posterior:
        assert prior.class_prompt is not None
        with torch.autocast(where.type, torch.bfloat16, enabled=low):
            batch = attack.micro_batch
            pictures = class_images(model, prior.class_prompt, prior.images, side, batch=batch, progress=progress)
        return model.encode_all(to_float(pictures).to(where), attack.micro_batch)

    assembly.adopt(models, class_latents, run.seed, prompts)
    # The perturbation is what is kept between rounds, as a training run keeps it: adding it rounds.
    perturbation, memory = attack.start(canvas, run.seed), None
    with torch.autocast(where.type, torch.bfloat16, enabled=low):
        seen = canvas.images(canvas.blank)
        surrogates = assembly.surrogates(seen, reference.lessons(reference.blank), plain_weights, progress)
        for number in progress(range(run.rounds)):
            turn = replace(run, number=number)
            outcome = alternate(surrogates, canvas, canvas.blank + perturbation, attack, turn, memory)
            require_vital(outcome.vital_signs.tolist(), turn)
            perturbation, memory = outcome.state - canvas.blank, outcome.memory
    state = resting.blank + perturbation.cpu()
    finished = parametrisation.finish(resting, state, photos, attack.budget, Delivery(format="png"))
    return [Image.open(BytesIO(one.file.data)).copy() for one in finished]


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
    folder = whole_folder(source)
    if folder == EMBEDDED:
        raise InputError(f"{wanted}, and the embedded one knows nobody: {advice}")
    try:
        prompt = person_in(folder) if folder else None
    except InputError as error:
        raise InputError(f"{wanted}, and {error}: {advice}") from error
    if prompt is None:
        log.warning("nothing says that %s was trained on the person: if it was not, use method='advdm'", source)
    return settings.prompt or prompt or settings.training.instance_prompt


def base_of(sources: list[Source], trained: bool) -> Source:
    """The untouched base model of a run.

    Args:
        sources: what is attacked.
        trained: whether that was trained on the person before.

    Raises:
        InputError: there are several, or no manifest beside the model says what it was trained from.
    """
    first, *others = sources
    if others:
        raise InputError("LikelihoodRatio('base') compares with one base model: leave out ensemble")
    if not trained:
        return first
    folder = whole_folder(first)
    known = base_in(folder) if folder else None
    if known is None:
        raise InputError(
            f"nothing says from which base model {first} was trained: name it, as in settings=Settings("
            "objective=LikelihoodRatio(decoy='embedded', prompt='a photo of person'))"
        )
    return Source(**known)


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
