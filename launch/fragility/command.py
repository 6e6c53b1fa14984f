"""How far the autoencoder of a base model can be fooled: the strongest attacks on its encoder, and what remains."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

from antidreambooth.attack.canvas import SquareCanvas
from antidreambooth.attack.objectives import EncoderAway, EncoderTarget, Objective
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import alternate, require_vital
from antidreambooth.attack.steps import Sign
from antidreambooth.attack.surrogates import Fixed
from antidreambooth.attack.targets import target_image
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.layout import read_defaults, resolution_of
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import usual_device
from antidreambooth.diffusion.seeding import Turn, require_seed
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError, require
from antidreambooth.evaluation.fragility import Fragility, compression
from antidreambooth.files import locked
from antidreambooth.photos.decoding import load_photos, to_float
from antidreambooth.photos.delivery import to_8bit
from antidreambooth.provenance import describe, read_manifest, require_originals, slug
from launch.flags import named
from launch.fragility.results import ATTACKS, Found, Trial, write_results
from launch.help import FRAGILITY, USAGE, Help
from launch.parsing import OneLine
from launch.runs import Fit, Parse

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "photos"
STEPS = 10  # of PGD in what the progress bar counts as one


@dataclass(frozen=True)
class Settings:
    """What is attacked, and how strongly.

    Args:
        backbone: the base model: ``embedded``, a folder in diffusers layout or a hub id.
        revision: branch, tag or commit of it, if it is a hub id.
        variant: variant of its weights' files, such as ``fp16``.
        components: where it is one ``.safetensors`` file, a folder in diffusers layout of the same kind of model.
        photos: a folder of two photos or more; the example photos when not given.
        resolution: side of the squares in pixels; what the base model was made for when not given.
        budgets: largest changes of a pixel's value, in 8-bit steps.
        steps: PGD steps of each attack, a multiple of 10. More of them find slightly stronger changes.
        micro_batch: photos at a time; memory grows with it.
        seed: of the noise that an attack starts from.
        output: folder of the results; one of the base model's name under outputs/fragility when not given.
    """

    backbone: str = "embedded"
    revision: str | None = None
    variant: str | None = None
    components: str | None = None
    photos: str | None = None
    resolution: int | None = None
    budgets: list[float] = field(default_factory=lambda: [4.0, 8.0, 16.0])
    steps: int = 50
    micro_batch: int = 4
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        for budget in self.budgets:
            require("budgets", budget, 1, 255, unit="in 8-bit steps")
        require("steps", self.steps, STEPS)
        require("micro_batch", self.micro_batch, 1)
        require_seed("seed", self.seed)
        if not self.budgets:
            raise InputError("--budgets is empty: there is nothing to try")
        if len(set(self.budgets)) < len(self.budgets):
            raise InputError(f"--budgets has one twice: {self.budgets}")
        if self.steps % STEPS:
            raise InputError(f"--steps is a multiple of {STEPS}: got {self.steps}")

    @property
    def source(self) -> Source:
        """The base model."""
        return Source(self.backbone, self.revision, self.variant, self.components)

    @property
    def root(self) -> Path:
        """The folder of the results."""
        return Path(self.output) if self.output else Path("outputs") / "fragility" / slug(self.backbone)


def fragility(arguments: list[str], fit: Fit, parse: Parse) -> None:
    """Attacks the autoencoder of a base model, and says what remains.

    Args:
        arguments: the command line after ``fragility``.
        fit: not used, as there is no run of Lightning's.
        parse: neither.
    """
    settings = read_settings(arguments)
    side = resolution_of(settings.source, settings.resolution)
    if notice := read_defaults(settings.source).notice:
        print(notice, flush=True)
    require_own_folder(settings)
    photos = load_photos(Path(settings.photos or EXAMPLES), side)
    require_originals([(photo.path, photo.sha256) for photo in photos], "give the originals")
    with locked(settings.root, "give another --output"):
        started = time.monotonic()
        backbone = load_backbone(settings.source, encoder_only=True).to(usual_device())
        found = list(measured(settings, backbone, torch.stack([photo.pixels for photo in photos])))
        asked = {**describe(settings), "output": None, "resolution": side}
        trial = Trial(asked, str(settings.source), compression(backbone, side), backbone.fingerprint(), photos, found)
        write_results(settings.root, trial, time.monotonic() - started)


def read_settings(arguments: list[str]) -> Settings:
    """What the command line asks for."""
    options = parser().parse_args(arguments)
    with named(options):
        return Settings(**vars(parser().instantiate(options)))


def parser() -> ArgumentParser:
    """The command's options."""
    options = OneLine(prog="cli.py fragility", description=FRAGILITY, usage=USAGE["fragility"], formatter_class=Help)
    options.add_class_arguments(Settings)
    return options


def require_own_folder(settings: Settings) -> None:
    """Refuses a folder for the results in which something else lies that would be replaced.

    Raises:
        InputError: it is the photos' folder, or another command's.
    """
    root, photos = settings.root, Path(settings.photos or EXAMPLES).expanduser()
    if root.resolve() in (photos.resolve(), *photos.resolve().parents):
        raise InputError(f"--output {root} holds the photos: choose another folder for the results")
    record = read_manifest(root)
    if record is not None and record.get("command") != "fragility":
        raise InputError(f"{root} holds the result of another run: choose another folder with --output")


def measured(settings: Settings, backbone: Backbone, clean: UInt8[Tensor, "n 3 h w"]) -> Iterator[Found]:
    """The clean photos, then each attack of each budget, with a progress bar.

    Args:
        settings: of the command.
        backbone: on the device that runs it.
        clean: the photos' squares.
    """
    grey = target_image("grey", clean.shape[-1])
    measure = Fragility(backbone, clean, grey, settings.micro_batch)
    yield Found("none", 0.0, clean, measure(clean))
    tried = [(attack, budget) for attack in ATTACKS for budget in settings.budgets]
    rounds = settings.steps // STEPS
    with tqdm(total=len(tried) * rounds, desc="attacks", unit="", file=sys.stdout, dynamic_ncols=True) as bar:
        for attack, budget in tried:
            objective = EncoderTarget("grey") if attack == "grey" else EncoderAway(log_variance=0.0)
            changed = attacked(backbone, clean, objective, budget, settings, bar)
            yield Found(attack, budget, changed, measure(changed, pulled=attack == "grey"))


def attacked(
    backbone: Backbone,
    clean: UInt8[Tensor, "n 3 h w"],
    objective: Objective,
    budget: float,
    settings: Settings,
    bar: Any,
) -> UInt8[Tensor, "n 3 h w"]:
    """The photos as strongly changed as PGD can within the budget, in 8 bits.

    Steps begin at half the budget and shrink to nothing. On the embedded model 50 of them move the latent by 31 % of
    the distance between two photos at budget 8, and 100 by 31.6 %; 300 of half that size come to 31.9, and 100 with
    momentum to 30. It starts at noise, as on the clean photo there is no way that leads away from it.
    """
    rule, batch = Sign(schedule="linear", random_start=True), settings.micro_batch
    pgd = PGD(budget, step_size=budget / 2, steps=STEPS, micro_batch=batch, objective=objective, rule=rule)
    canvas = SquareCanvas(to_float(clean).to(backbone.device))
    objective.prepare(backbone, canvas.blank)
    state, memory = canvas.blank + pgd.start(canvas, settings.seed), None
    rounds = settings.steps // STEPS
    for number in range(rounds):
        turn = Turn(number, settings.seed, rounds=rounds)
        outcome = alternate([Fixed(backbone, None)], canvas, state, pgd, turn, memory)
        require_vital(outcome.vital_signs.tolist(), turn)
        state, memory = outcome.state, outcome.memory
        bar.update()
    return to_8bit(state.cpu(), clean, budget)
