"""How far the autoencoder of a base model can be fooled: the strongest attacks on its encoder, and what remains."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from jsonargparse import ArgumentParser
from torch import Tensor
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from antidreambooth.attack.canvas import SquareCanvas
from antidreambooth.attack.objectives import EncoderAway, EncoderTarget, Objective
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import alternate, require_vital
from antidreambooth.attack.steps import Momentum
from antidreambooth.attack.surrogates import Fixed
from antidreambooth.attack.targets import target_image
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.layout import read_defaults, resolution_of
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import usual_device
from antidreambooth.diffusion.seeding import Turn, require_seed
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError, require
from antidreambooth.evaluation.fragility import Compression, Fragility, Remains, compression
from antidreambooth.evaluation.quality import LPIPS_MISSING, lpips_available
from antidreambooth.files import locked, write_atomically, write_json
from antidreambooth.photos.decoding import Photo, load_photos, to_float
from antidreambooth.photos.delivery import to_8bit, write_png
from antidreambooth.provenance import MANIFEST, describe, read_manifest, require_originals, slug, versions
from callbacks.comparison import sheet
from launch.flags import named
from launch.help import FRAGILITY, USAGE, Help
from launch.parsing import OneLine
from launch.runs import Fit, Parse

EXAMPLES = Path(__file__).parent.parent / "examples" / "photos"
ATTACKS = ("away", "grey")
STEPS = 10  # of PGD in what the progress bar counts as one
SHOWN, TILE = 4, 256  # photos in the picture, and pixels of each
COLUMNS = {"shift": "latent moved", "left": "left to grey", "error": "decoded off", "lpips": "LPIPS"}
SHARES = ("shift", "left")


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
    steps: int = 100
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


class Found(NamedTuple):
    """An attack of one budget, and what remains of it; budget 0 is no attack."""

    attack: str
    budget: float
    changed: UInt8[Tensor, "n 3 h w"]
    remains: Remains


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
        write_results(settings, photos, compression(backbone, side), found, backbone, time.monotonic() - started)


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
            objective = EncoderTarget("grey") if attack == "grey" else EncoderAway(log_variance=0)
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

    Momentum and steps that shrink to nothing make it stronger than plain PGD; it starts at noise, as on the clean photo
    there is no way that leads away from it.
    """
    rule = Momentum(decay=0.9, schedule="linear", random_start=True)
    pgd = PGD(
        budget, step_size=budget / 4, steps=STEPS, micro_batch=settings.micro_batch, objective=objective, rule=rule
    )
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


def write_results(
    settings: Settings,
    photos: list[Photo],
    kept: Compression,
    found: list[Found],
    backbone: Backbone,
    seconds: float,
) -> None:
    """Writes tables, picture and manifest; prints the table."""
    lines = table(settings, photos, kept, found)
    root = settings.root
    write_atomically(root / "table.md", ("\n".join(lines) + "\n").encode())
    write_atomically(root / "table.csv", per_photo(photos, found).encode())
    write_png(root / "comparison.png", picture(found))
    record = {
        "command": "fragility",
        "settings": {**describe(settings), "output": None, "resolution": found[0].changed.shape[-1]},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "autoencoder": backbone.fingerprint(),
        "compression": kept._asdict(),
        "photos": [{"source": photo.name, "sha256": photo.sha256} for photo in photos],
        "seconds": round(seconds, 1),
        "complete": True,
    }
    write_json(root / MANIFEST, record)
    print("\n".join(lines))
    print(f"\n{seconds:.0f} seconds; the picture: {root / 'comparison.png'}; for each photo: {root / 'table.csv'}")


def table(settings: Settings, photos: list[Photo], kept: Compression, found: list[Found]) -> list[str]:
    """What remains, on average over photos, with the lowest and the highest of them."""
    names = [name for name in COLUMNS if name != "lpips" or lpips_available()]
    side = found[0].changed.shape[-1]
    lines = [
        f"The autoencoder of {settings.source} keeps {kept}, at {side} pixels. Over {len(photos)} photos, "
        f"{settings.steps} steps of each attack: mean (lowest to highest).",
        "",
        f"| attack | budget | {' | '.join(COLUMNS[name] for name in names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for one in found:
        cells = [spread(getattr(one.remains, name), name) for name in names]
        lines.append(f"| {one.attack} | {one.budget:g} | {' | '.join(cells)} |")
    return [*lines, *([] if lpips_available() else ["", LPIPS_MISSING])]


def spread(values: Tensor, name: str) -> str:
    """A mean with the lowest and the highest; nothing where it does not apply."""
    if values.isnan().any():
        return "\N{EN DASH}"
    scale, digits, unit = (100, 0, " %") if name in SHARES else (1, 3 if name == "lpips" else 1, "")
    mean, low, high = (f"{scale * float(v):.{digits}f}" for v in (values.mean(), values.min(), values.max()))
    return f"{mean}{unit} ({low} to {high})"


def per_photo(photos: list[Photo], found: list[Found]) -> str:
    """One row for each photo and attack; empty where a measure does not apply."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["photo", "attack", "budget", *COLUMNS])
    for one in found:
        for index, photo in enumerate(photos):
            values = [getattr(one.remains, name) for name in COLUMNS]
            figures = ["" if v is None or v[index].isnan() else f"{float(v[index]):.5g}" for v in values]
            writer.writerow([photo.name, one.attack, f"{one.budget:g}", *figures])
    return text.getvalue()


def picture(found: list[Found]) -> UInt8[Tensor, "3 h w"]:
    """A row for each photo under each attack: it and what the decoder gives back, clean and cloaked with each budget."""
    clean, *others = found
    side = min(clean.changed.shape[-1], TILE)
    titles, rows = ["photo", "decoded"], []
    for budget in dict.fromkeys(one.budget for one in others):
        titles += [f"cloaked {budget:g}", "decoded"]
    for attack in ATTACKS:
        shown = [clean, *(one for one in others if one.attack == attack)]
        for index in range(min(SHOWN, len(clean.changed))):
            pairs = [(one.changed[index], one.remains.decoded[index]) for one in shown]
            rows.append([resize(tile, [side, side], antialias=True) for pair in pairs for tile in pair])
    return sheet(titles, rows)
