"""What an attack on an autoencoder leaves: tables, a picture, a manifest."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from antidreambooth.evaluation.fragility import Compression, Remains
from antidreambooth.evaluation.quality import LPIPS_MISSING, lpips_available
from antidreambooth.files import write_atomically, write_json
from antidreambooth.photos.decoding import Photo
from antidreambooth.photos.delivery import write_png
from antidreambooth.provenance import MANIFEST, versions
from callbacks.comparison import sheet

ATTACKS = ("away", "grey")
SHOWN, TILE = 4, 256  # photos in the picture, and pixels of each
COLUMNS = {
    "shift": "latent moved",
    "left": "left to grey",
    "moved": "decoded moved",
    "error": "decoded off",
    "lpips": "LPIPS of that",
}
SHARES = ("shift", "left")


class Found(NamedTuple):
    """An attack of one budget, and what remains of it; budget 0 is no attack."""

    attack: str
    budget: float
    changed: UInt8[Tensor, "n 3 h w"]
    remains: Remains


class Trial(NamedTuple):
    """All that was tried on an autoencoder."""

    settings: dict[str, Any]  # of the command
    backbone: str  # as the user calls it
    kept: Compression
    fingerprint: str  # of the autoencoder
    photos: list[Photo]
    found: list[Found]  # the clean photos first


def write_results(root: Path, trial: Trial, seconds: float) -> None:
    """Writes tables, picture and manifest; prints the table.

    Args:
        root: the folder that they go to.
        trial: what was tried.
        seconds: that it took.
    """
    lines = table(trial)
    write_atomically(root / "table.md", ("\n".join(lines) + "\n").encode())
    write_atomically(root / "table.csv", per_photo(trial).encode())
    write_png(root / "comparison.png", picture(trial.found))
    record = {
        "command": "fragility",
        "settings": trial.settings,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "autoencoder": trial.fingerprint,
        "compression": trial.kept._asdict(),
        "photos": [{"source": photo.name, "sha256": photo.sha256} for photo in trial.photos],
        "seconds": round(seconds, 1),
        "complete": True,
    }
    write_json(root / MANIFEST, record)
    print("\n".join(lines))
    where = f"for each photo: {root / 'table.csv'}; pictures (`away` above, `grey` below): {root / 'comparison.png'}"
    print(f"\n{seconds:.0f} seconds; {where}", flush=True)


def table(trial: Trial) -> list[str]:
    """What remains, on average over photos, with the lowest and the highest of them."""
    names = [name for name in COLUMNS if name != "lpips" or lpips_available()]
    lines = [
        f"The autoencoder of {trial.backbone} keeps {trial.kept}, at {trial.settings['resolution']} pixels. Over "
        f"{len(trial.photos)} photos, {trial.settings['steps']} steps of each attack: mean (lowest to highest).",
        "",
        f"| attack | budget | {' | '.join(COLUMNS[name] for name in names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for one in trial.found:
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


def per_photo(trial: Trial) -> str:
    """One row for each photo and attack; empty where a measure does not apply."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["photo", "attack", "budget", *COLUMNS])
    for one in trial.found:
        columns = [getattr(one.remains, name) for name in COLUMNS]
        for index, photo in enumerate(trial.photos):
            figures = ["" if v is None or v[index].isnan() else f"{float(v[index]):.5g}" for v in columns]
            writer.writerow([photo.name, one.attack, f"{one.budget:g}", *figures])
    return text.getvalue()


def picture(found: list[Found]) -> UInt8[Tensor, "3 h w"]:
    """A row for each photo under each attack: it and what the decoder gives back, clean and with each budget."""
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
