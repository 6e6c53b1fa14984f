"""The verdict's files from synthetic cells, whose outcome is known."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from antidreambooth.errors import InputError
from antidreambooth.evaluation.prose import paragraph
from antidreambooth.evaluation.report import write_report
from antidreambooth.evaluation.results import read_results

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
            Image.fromarray(pixels).save(place / name)
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
    cells = read_results(folder)
    settings: dict[str, Any] = {"title": "quick", "expected": len(cells), "resamples": 200}
    page = write_report(folder, cells, **settings | given)
    with (folder / "table.csv").open() as file:
        return page.read_text(), (folder / "table.md").read_text(), list(csv.DictReader(file))


class Page(HTMLParser):
    """Tags that are balanced, and what the page links."""

    VOID = ("meta", "link", "img", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_everything_is_written_and_opens_from_disk(tmp_path):
    write_experiment(tmp_path)
    html, markdown, rows = report(tmp_path)
    page = Page(html)
    assert {"svg", "table", "img", "th"} <= set(page.tags)
    assert "script" not in page.tags
    assert not [link for link in page.links if "//" in link]
    assert "url(" not in html
    assert "@import" not in html
    assert all((tmp_path / link).is_file() for link in page.links if not link.startswith("data:"))
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == 3 * 7 * 6  # people, settings, pictures
    assert "aspl 8" in markdown
    assert {row["measure"] for row in rows} >= {"acceptance", "joint_ism", "ism", "fdfr", "brisque"}


def test_figures_and_paired_differences(tmp_path):
    write_experiment(tmp_path)
    rows = report(tmp_path)[2]
    found = {
        (row["condition"], row["control"]): row
        for row in rows
        if row["protection"] == "aspl" and row["measure"] == "acceptance"
    }
    assert set(found) == {(way, control) for way in ("nothing", "jpeg75") for control in ("", "none", "noise")}
    assert float(found["nothing", ""]["mean"]) == 1 / 16
    assert float(found["nothing", "none"]["mean"]) == -14 / 16
    assert float(found["nothing", "none"]["high"]) < 0 < float(found["jpeg75", "none"]["high"])
    assert (found["nothing", ""]["people"], found["nothing", ""]["cells"]) == ("3", "6")


def test_the_same_cells_give_the_same_files(tmp_path):
    write_experiment(tmp_path)
    assert report(tmp_path) == report(tmp_path)


def test_failures_come_first(tmp_path):
    write_experiment(tmp_path)
    html, markdown, _ = report(tmp_path)
    for text in (html, markdown):
        assert "Partly protected: of 2 settings tried, protection held in 1 and not in 1." in text
        fails, held = text.index("Where protection does not hold"), text.index("Where protection held here")
        assert fails < held < text.index("BRISQUE")
        assert "jpeg75" in text[fails:held]
        good = text[held : text.index("</section>" if text == html else "## Figures", held)]
        assert "aspl 8" in good
        assert "jpeg75" not in good


def test_a_weak_victim_judges_nothing(tmp_path):
    write_experiment(tmp_path, none=0.5)
    for text in report(tmp_path)[:2]:
        assert "The victim full is too weak to judge protections" in text
        assert "protection held in 0" in text


def test_a_protection_without_control_is_not_judged(tmp_path):
    write_cell(tmp_path, "Ada", "aspl", 0.0, budget=8)
    html, markdown, _ = report(tmp_path)
    assert "No verdict: the control none is missing for the same people and seeds." in html
    assert "Nothing." in markdown


def test_a_face_that_is_still_recognised_is_a_failure_even_if_it_fell(tmp_path):
    write_cell(tmp_path, "Ada", "none", 1.0, images=64)
    write_cell(tmp_path, "Ada", "aspl", 0.5, budget=8, images=64)
    assert "Not protected against anything tried here" in report(tmp_path)[0]


def test_only_the_same_person_and_seed_are_compared(tmp_path):
    write_cell(tmp_path, "Ada", "none", 1.0, seed=0)
    write_cell(tmp_path, "Ada", "none", 0.0, seed=1)
    write_cell(tmp_path, "Ben", "none", 0.0, seed=0)
    write_cell(tmp_path, "Ada", "aspl", 0.5, budget=8, seed=0)
    rows = report(tmp_path)[2]
    differences = [row for row in rows if row["control"] == "none" and row["measure"] == "acceptance"]
    assert [(row["mean"], row["people"], row["over"]) for row in differences] == [("-0.5", "1", "images only")]


@pytest.mark.parametrize(
    ("noise", "level"), [(0.94, None), (0.06, "acceptance and joint ISM")], ids=["as good as none", "as good as aspl"]
)
def test_what_noise_does_as_well_is_named_by_measure(tmp_path, noise, level):
    for person in ("Ada", "Ben", "Cleo"):
        write_cell(tmp_path, person, "none", 0.94)
        write_cell(tmp_path, person, "noise", noise, budget=8)
        write_cell(tmp_path, person, "aspl", 0.06, budget=8)
    _, markdown, _ = report(tmp_path)
    aspl = next(line for line in markdown.splitlines() if line.startswith("| aspl 8"))
    assert ("not shown to be better than noise" in aspl) == bool(level)
    assert level is None or f"better than noise of the same budget in {level}" in aspl


def test_noise_of_another_budget_is_no_control(tmp_path):
    write_cell(tmp_path, "Ada", "none", 1.0)
    write_cell(tmp_path, "Ada", "noise", 1.0, budget=4)
    write_cell(tmp_path, "Ada", "aspl", 0.0, budget=8)
    html, _, rows = report(tmp_path)
    assert {row["control"] for row in rows if row["protection"] == "aspl"} == {"", "none"}
    assert "not compared with noise of the same budget" in html


@pytest.mark.parametrize(("baseline", "other"), [("aspl", "ours"), ("ours", "aspl")])
def test_protections_are_compared_with_the_baseline(tmp_path, baseline, other):
    share = {"none": 1.0, "noise": 0.875, "aspl": 0.75, "ours": 0.25}
    for name, accepted in share.items():
        for person in ("Ada", "Ben", "Cleo"):
            write_cell(tmp_path, person, name, accepted, budget=0 if name == "none" else 8)
    write_cell(tmp_path, "Ada", other, 0.5, budget=4)  # of another budget, so compared with none alone
    html, markdown, rows = report(tmp_path, baseline=baseline)
    found = {
        (row["protection"], float(row["budget"])): float(row["mean"])
        for row in rows
        if row["control"] == baseline and row["measure"] == "acceptance"
    }
    assert found == {(other, 8.0): share[other] - share[baseline]}
    assert f"| {other} 8 | {baseline} |" in markdown
    assert f"full, minus {baseline}" in html


def test_measures_may_be_missing(tmp_path):
    columns = tuple(column for column in COLUMNS if column not in ("stability", "brisque", "joint_ism", "distance"))
    write_cell(tmp_path, "Ada", "none", 1.0, columns=columns)
    write_cell(tmp_path, "Ada", "aspl", 0.0, budget=8, columns=columns)
    html, _, rows = report(tmp_path)
    assert {row["measure"] for row in rows} == {"acceptance", "ism", "fdfr"}
    assert "BRISQUE" not in html


def test_without_a_verifier_there_is_no_verdict(tmp_path):
    for protection in ("none", "aspl"):
        write_cell(tmp_path, "Ada", protection, 1.0, columns=("prompt", "index", "file", "brisque"))
    assert "No verdict: acceptance was not measured." in report(tmp_path)[0]
    assert paragraph(read_results(tmp_path)).startswith("Nothing can be said about the photos of Ada")


def test_no_face_is_not_the_persons_face(tmp_path):
    place = write_cell(tmp_path, "Ada", "none", 0.5, images=4)
    text = (place / "per_image.csv").read_text().splitlines()
    header = text[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in text[1:]]
    rows[3] |= {"accepted": "", "joint_ism": ""}  # the one without a face
    (place / "per_image.csv").write_text("\n".join([text[0], *(",".join(row.values()) for row in rows)]))
    cell = read_results(tmp_path)[0]
    assert cell.values["acceptance"].tolist() == [1, 1, 0, 0]
    assert cell.values["joint_ism"][3] == 0
    assert np.isnan(cell.values["ism"][3])


def test_unfinished_and_failed_cells_are_counted(tmp_path):
    write_cell(tmp_path, "Ada", "none", 1.0)
    write_cell(tmp_path, "Ada", "aspl", 1.0, budget=8, complete=False)
    (tmp_path / "cells" / "started").mkdir()
    html, markdown, _ = report(tmp_path, expected=3, failed=[("ada-lora", "out of memory | <b>")])
    for text in (html, markdown):
        assert "1 of 3 cells finished" in text
        assert "1 failed" in text
        assert "out of memory" in text
        assert "<b>" not in text.replace("<b>ada-lora</b>", "").partition("Failed")[2]


def test_a_report_of_nothing(tmp_path):
    html, markdown, rows = report(tmp_path, expected=4)
    assert "No protection has been measured yet." in html
    assert "0 of 4 cells finished" in markdown
    assert rows == []


def test_names_are_text(tmp_path):
    name = '<script>alert("1")</script>|`'
    write_cell(tmp_path, name, "none", 1.0)
    html, _, _ = report(tmp_path, title=name, notes=[name], qualities={(name, "none", 0.0): {"psnr": None}})
    page = Page(html)
    assert "script" not in page.tags
    assert page.images[0]["alt"].startswith(name)


def test_qualities_and_notes_are_shown(tmp_path):
    write_experiment(tmp_path, people=("Ada",))
    quality = {"psnr": 36.21, "ssim": 0.951, "lpips": None, "largest_difference": 8}
    html, _, _ = report(tmp_path, notes=["LPIPS is left out"], qualities={("Ada", "aspl", 8.0): quality})
    assert "<td>36.2</td><td>0.951</td><td>\N{EN DASH}</td><td>8</td>" in html
    assert "<td>8</td>" + "<td>\N{EN DASH}</td>" * 3 + "</tr>" in html  # nobody counted what it took
    assert "LPIPS is left out" in html
    assert "Only one person" in html


def test_costs_are_means_over_people(tmp_path):
    write_experiment(tmp_path, people=("Ada", "Bob"))
    costs = [{"psnr": 30.0, "seconds": 100.0, "denoiser": 1000, "encoder": None}, {"psnr": 34.0, "seconds": 60.5}]
    _, markdown, _ = report(
        tmp_path, qualities={(p, "aspl", 8.0): c for p, c in zip(("Ada", "Bob"), costs, strict=True)}
    )
    assert "| aspl 8 | 32.0 | \N{EN DASH} | \N{EN DASH} | \N{EN DASH} | 80 | 1000 | \N{EN DASH} |" in markdown


def test_a_cell_without_figures_names_the_fix(tmp_path):
    place = write_cell(tmp_path, "Ada", "none", 1.0)
    (place / "per_image.csv").write_text(",".join(COLUMNS))
    with pytest.raises(InputError, match="remove its folder and run again"):
        read_results(tmp_path)
    (place / "per_image.csv").unlink()
    with pytest.raises(InputError, match="remove its folder and run again"):
        read_results(tmp_path)


def test_the_paragraph_counts_pictures(tmp_path):
    write_cell(tmp_path, "Ada", "none", 0.97, images=64)
    write_cell(tmp_path, "Ada", "cloaked", 0.05, images=64)
    text = paragraph(read_results(tmp_path))
    assert "62 of 64 pictures from unprotected photos" in text
    assert "3 of 64 pictures from cloaked photos" in text
    assert "another model" in text
    assert "too weak" not in text


def test_the_paragraph_knows_a_weak_attack(tmp_path):
    write_cell(tmp_path, "Ada", "none", 0.5)
    write_cell(tmp_path, "Ada", "cloaked", 0.0)
    write_cell(tmp_path, "Ada", "base", 0.0, victim="untrained")
    text = paragraph(read_results(tmp_path))
    assert "too weak an attack to prove protection" in text
    assert "A model that had seen nobody drew that face in 0 of 16 pictures." in text


def test_nothing_promises_safety(tmp_path):
    write_experiment(tmp_path)
    html, markdown, _ = report(tmp_path)
    for text in (html, markdown, paragraph(read_results(tmp_path))):
        for said in ("is safe", "are safe", "guarantee", "fully protected", "secure"):
            assert said not in text.replace("does not show that a photo is safe", "").replace(
                "Nothing here says that a photo is safe", ""
            )
