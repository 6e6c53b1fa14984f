"""Every way through the engine, on models of milliseconds: what is tried on each kind of device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from antidreambooth.attack.canvas import Canvas, OwnSizeCanvas, SquareCanvas
from antidreambooth.attack.methods import METHODS, Assembly, Lend, Settings, plain_weights
from antidreambooth.attack.objectives import (
    Denoising,
    EncoderAway,
    ScoreDistillation,
    Targeted,
    Term,
    Transformed,
    Weighted,
)
from antidreambooth.attack.objectives.ratio import against_base, decoys
from antidreambooth.attack.parametrisation import OwnSize, Square
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import Outcome, alternate
from antidreambooth.attack.steps import Momentum, NormalizedL2, Sign
from antidreambooth.attack.surrogates import Surrogate
from antidreambooth.attack.transforms import Crop, Flip
from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning import Adaptation, Full, LoRA, TextualInversion
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation, dreambooth_loss
from antidreambooth.photos.decoding import to_float
from antidreambooth.photos.whole import Reduced
from tests.conftest import random_images

PROMPT = "a photo of sks person"
RATE = 1e-3
TRAINING = DreamBooth(learning_rate=RATE, steps=1, batch_size=2, prior=PriorPreservation(weight=0.5, images=4))
ROUND = Settings(pgd_steps=1, micro_batch=2, members=1, training=TRAINING, parametrisation=Square())
OWN = replace(ROUND, parametrisation=OwnSize(), pgd_steps=2)  # a whole view and a part
BOTH = Transformed([Flip(), Crop()])
AWAY = Transformed([Crop()], EncoderAway())
SUM = Weighted([Term(Denoising()), Term(AWAY), Term(ScoreDistillation())])
CHECKPOINTED = replace(TRAINING, gradient_checkpointing=True)

ROUNDS: dict[str, tuple[str, Settings]] = {  # each method as it is, and what a user may have otherwise
    **{method: (method, ROUND) for method in METHODS},
    "momentum": ("advdm", replace(ROUND, step_rule=Momentum(random_start=True, schedule="linear"))),
    "l2": ("advdm", replace(ROUND, step_rule=NormalizedL2(random_start=True))),
    "random start": ("aspl", replace(ROUND, step_rule=Sign(random_start=True))),
    "transformed": ("aspl", replace(ROUND, objective=BOTH)),
    "transformed target": ("advdm", replace(ROUND, objective=Transformed([Crop()], Targeted("rings")))),
    "stripes": ("advdm", replace(ROUND, objective=Targeted("stripes"))),
    "lora": ("aspl", replace(ROUND, adaptation=LoRA(rank=2))),
    "textual inversion": ("aspl", replace(ROUND, adaptation=TextualInversion())),
    "checkpointing": ("aspl", replace(ROUND, training=CHECKPOINTED)),
    "offload": ("e-aspl", replace(ROUND, offload=True)),
    "own size": ("aspl", OWN),
    "own size of several": ("e-aspl", OWN),
    "own size, momentum": ("advdm", replace(OWN, step_rule=Momentum(random_start=True))),
    "own size, sum": ("advdm", replace(OWN, objective=SUM, step_rule=Sign(random_start=True), draws=2)),
    "no prior": ("aspl", replace(ROUND, training=replace(TRAINING, prior=PriorPreservation(weight=0.0)))),
}
QUICK = ("aspl", "t-aspl", "advdm", "momentum", "l2", "transformed", "lora", "textual inversion", "own size")
EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ROUNDS]
KINDS = ("aspl", "e-aspl", "fsmg", "simac", "pid", "ours", "textual inversion", "checkpointing", "own size, sum")
# What is tried in several ways: all of it in one of them, of each kind of state one in the others.
OF_EACH_KIND = [
    pytest.param(name, marks=[] if name in KINDS else [pytest.mark.slow, pytest.mark.thorough]) for name in ROUNDS
]
VICTIMS: dict[str, tuple[Callable[[], Adaptation], bool]] = {  # what learns, and whether the text encoder does
    "full": (Full, True),
    "denoiser": (Full, False),
    "lora": (lambda: LoRA(rank=2), False),
    "lora of the text encoder": (lambda: LoRA(rank=2), True),
    "textual inversion": (TextualInversion, False),
}


def photos(count: int, device: torch.device, seed: int = 0, side: int = 16) -> Tensor:
    """Pictures of nobody on a device, in [-1, 1]."""
    return to_float(random_images(count, side, seed)).to(device)


class Ready(NamedTuple):
    """All that a round is called with."""

    surrogates: list[Surrogate]
    canvas: Canvas
    state: Tensor
    attack: PGD
    turn: Turn

    def round(self) -> Outcome:
        """The round."""
        return alternate(*self)


def canvas_of(settings: Settings, device: torch.device, seed: int = 0, side: int = 16) -> Canvas:
    """Three photos as the settings want them: of one size, or of three with a face, a mask, and without colour."""
    if isinstance(settings.parametrisation, Square):
        return SquareCanvas(photos(3, device, seed, side))
    wide, grey, masked = random_images(3, 32, seed)
    allowed = torch.arange(32 * 32, device="cpu").view(32, 32) % 3 > 0
    reduced = [Reduced(wide[:, :24], (400, 300), ((100, 50, 180, 130),)), Reduced(grey, (90, 90), grey=True)]
    return OwnSizeCanvas([*reduced, Reduced(masked, (32, 32), allowed=allowed)], side).to(device)


def ready(
    name: str, models: Sequence[Backbone], device: torch.device, lend: Lend = plain_weights, side: int = 16
) -> Ready:
    """One of ``ROUNDS`` on loaded models, before its first round."""
    method, settings = ROUNDS[name]
    assembly = Assembly(METHODS[method], settings)

    def class_latents(backbone: Backbone, prior: PriorPreservation) -> Posterior:
        return backbone.encode_all(photos(3, device, 2, side), 2)

    assembly.adopt(models if assembly.method.several else models[:1], class_latents, seed=0)
    for ratio in (*decoys(assembly.attack.objective), *against_base(assembly.attack.objective)):
        ratio.oppose(models[0], models[1], models[1].embed([PROMPT]))
    canvas = canvas_of(settings, device, side=side)
    clean = canvas_of(settings, device, 1, side)
    surrogates = assembly.surrogates(canvas.images(canvas.blank), clean.lessons(clean.blank), lend)
    state = canvas.blank + assembly.attack.start(canvas, 0)
    return Ready(surrogates, canvas, state, assembly.attack, Turn(0, rounds=2))


def a_victims_step(
    name: str, backbone: Backbone, device: torch.device, lend: Lend = plain_weights, side: int = 16
) -> Callable[[], Tensor]:
    """A training step of one of ``VICTIMS``, class images included; it gives the loss."""
    kind, text = VICTIMS[name]
    adaptation, turn = kind(), Turn(0)
    training = adaptation.surrogate_settings(replace(TRAINING, train_text_encoder=text), backbone.defaults)
    classes = backbone.encode_all(photos(3, device, 2, side), 2)
    adaptation.apply(backbone, training, seed=0)
    instances, weights = backbone.encode_all(photos(3, device, side=side), 2), lend(backbone, training)

    def step() -> Tensor:
        (batch,) = turn.batches(1, 2, 3, device)
        chosen = instances.rows(batch), classes.rows(batch)
        loss = dreambooth_loss(backbone, training, *chosen, turn.generator(device))
        weights.step(loss)
        return loss.detach()

    return step
