"""The verdict's files from synthetic cells, whose outcome is known."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from antidreambooth.errors import InputError
from antidreambooth.evaluation.report import paragraph, read_cells, write_report

COLUMNS = ("prompt", "index", "file", "face", "ism", "joint_ism", "distance", "accepted", "stability", "brisque")


def write_cell(
    folder: Path,
    person: str,
    protection: str,
    accepted: float,
    *,
    budget: float = 0.0,
    victim: str = "full",
    condition: str = "nothing",
    seed: int = 0,
    images: int = 16,
    columns: tuple[str, ...] = COLUMNS,
    complete: bool = True,
) -> Path:
    """A cell in which the first ``accepted`` share of the pictures is recognised and the last one has no face."""
    place = folder / "cells" / f"{len(list(folder.glob('cells/*'))):04d}-{protection}-{condition}"
    (place / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with (place / "per_image.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for index in range(images):
            name, face, own = f"images/0-{index:02d}.png", index < images - 1, index < round(accepted * images)
            colour = (60, 140, 90) if own else (150, 150, 160)
            pixels = np.clip(np.array(colour) + rng.normal(0, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((128, 128)).save(place / name)
            ism = np.clip(rng.normal(0.7 if own else 0.2, 0.05), -1, 1)
            row = {"prompt": "a photo", "index": index, "file": name, "face": int(face or own), "accepted": int(own)}
            row |= {"ism": ism, "distance": 1 - ism / 2, "stability": 0.8} if face or own else {"ism": ""}
            writer.writerow(row | {"joint_ism": ism if face or own else 0.0, "brisque": rng.normal(30, 4)})
    facts = {"person": person, "protection": protection, "budget": budget, "victim": victim, "condition": condition}
    facts |= {"cloak_seed": 0, "victim_seed": seed, "seconds": 90.0, "complete": complete}
    (place / "cell.json").write_text(json.dumps(facts))
    return place


def write_experiment(folder: Path, people=("Ada", "Ben", "Cleo"), none: float = 0.94, images: int = 16) -> None:
    """ASPL holds against the full victim, not once the photos are compressed."""
    for seed, person in ((seed, person) for person in people for seed in (0, 1)):
        for condition, aspl in (("nothing", 0.06), ("jpeg75", 0.88)):
            write_cell(folder, person, "none", none, condition=condition, seed=seed, images=images)
            write_cell(folder, person, "noise", none, budget=8, condition=condition, seed=seed, images=images)
            write_cell(folder, person, "aspl", aspl, budget=8, condition=condition, seed=seed, images=images)
        write_cell(folder, person, "base", 0.0, victim="untrained", seed=seed, images=images)


def report(folder: Path, **given) -> tuple[str, str, list[dict[str, str]]]:
    cells = read_cells(folder)
    page = write_report(folder, cells, **{"title": "quick", "expected": len(cells), "resamples": 200} | given)
    with (folder / "table.csv").open() as file:
        return page.read_text(), (folder / "table.md").read_text(), list(csv.DictReader(file))
