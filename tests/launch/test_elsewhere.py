"""Photos that another tool has cloaked, beside our methods in a verdict."""

import io
import json
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import launch.jobs
import launch.tasks
import lightning_modules.victim
from antidreambooth.errors import InputError
from antidreambooth.evaluation.prose import STANDS_FOR
from cli import main, parsed
from launch.runs import contents
from launch.verdict.cell import arriving, originals, protected
from launch.verdict.command import verdict
from launch.verdict.elsewhere import content_hash, counterparts, largest_change, without_added
from launch.verdict.experiment import Experiment
from tests.conftest import contents as contents_of
from tests.helpers import pixels, refused
from tests.launch.test_verdict import VICTIM, FakeFit, make_people, only

BUDGET = 5


@pytest.fixture(autouse=True)
def _fresh():
    """As in a process of its own: photos are read once in each."""
    contents.cache_clear()


def strangers_work(people: Path, folder: Path, *, by_part: bool = False) -> Path:
    """A folder as a tool leaves it: the people's photos, each changed by ``BUDGET`` here and there."""
    for person in sorted(people.iterdir()):
        place = folder / person.name / ("set_B" if by_part else "")
        place.mkdir(parents=True)
        for number, path in enumerate(sorted((person / "set_B").iterdir())):
            photo = pixels(path).astype(int)
            up = np.random.default_rng(number).random(photo.shape) < 0.5
            changed = np.clip(photo + np.where(up, BUDGET, -BUDGET), 0, 255).astype(np.uint8)
            Image.fromarray(changed).save(place / f"{path.stem}.png")
    return folder


@pytest.fixture
def people(tmp_path) -> Path:
    """Two of them; the originals are JPEG files, as photos are."""
    folder = make_people(tmp_path / "people", "ann", "bob")
    for path in [*folder.glob("*/set_B/*.png")]:
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    return folder


@pytest.fixture
def made(people, tmp_path) -> Path:
    return strangers_work(people, tmp_path / "theirs")


def experiment_of(people: Path, model: Path, **protections: str) -> Experiment:
    return Experiment(
        name="e",
        folder=str(people.parent),
        people_folder=str(people),
        backbone=str(model),
        protections={"none": "none", **protections},
    )


@pytest.mark.parametrize("by_part", [False, True])
def test_a_strangers_photos_take_the_place_of_the_originals_by_their_stems(people, small_model, tmp_path, by_part):
    made = strangers_work(people, tmp_path / "theirs", by_part=by_part)
    Path(made / "ann" / "log.txt").write_text("a tool may say how it went")
    cloaks, cells = experiment_of(people, small_model, mist=str(made)).resolve()
    assert cloaks == []  # nothing is left to cloak
    cell = only(cells, person="bob", protection="mist")
    assert (cell.cloak.origin, cell.cloak.budget, cell.cloak.seed) == ("elsewhere", 0.0, 0)
    folder = made / "bob" / "set_B" if by_part else made / "bob"
    expected = torch.stack([torch.from_numpy(pixels(folder / f"{n}.png").copy()).permute(2, 0, 1) for n in range(2)])
    assert torch.equal(protected(cell.cloak), expected)
    assert torch.equal(arriving(cell), expected)
    assert not torch.equal(originals(cell.cloak), expected)


def test_the_order_is_that_of_the_originals(tmp_path):
    """Names that differ in the suffix only may be sorted otherwise."""
    for folder, names in (("a", ("x.png", "x.b.png")), ("b", ("x.avif", "x.b.png"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    assert sorted(("x.b.png", "x.avif"))[0] == "x.avif"
    pairs = counterparts(tmp_path / "a", tmp_path / "b")
    assert [(one.name, other.name) for one, other in pairs.items()] == [("x.b.png", "x.b.png"), ("x.png", "x.avif")]


def test_a_finished_cell_is_known_by_the_photos_and_not_by_where_they_lie(people, small_model, made, tmp_path):
    def settings(folder: Path):
        contents.cache_clear()
        cells = experiment_of(people, small_model, mist=str(folder)).resolve().cells
        return only(cells, person="ann", protection="mist").settings

    before = settings(made)
    moved = Path(shutil.copytree(made, tmp_path / "moved"))
    assert settings(moved) == before
    photo = pixels(moved / "ann" / "1.png").copy()
    photo[3, 3] ^= 1
    Image.fromarray(photo).save(moved / "ann" / "1.png")
    assert settings(moved) != before
    assert str(tmp_path / "theirs") not in json.dumps(before)


def test_the_budget_is_measured_and_the_content_has_a_name(people, made, tmp_path):
    pairs = {name: counterparts(people / name / "set_B", made / name) for name in ("ann", "bob")}
    assert largest_change(pair for own in pairs.values() for pair in own.items()) == BUDGET
    photos = {name: list(own.values()) for name, own in pairs.items()}
    name = content_hash(photos)
    assert re.fullmatch("[0-9a-f]{64}", name)
    shutil.copytree(made, tmp_path / "moved")
    moved = {who: [tmp_path / "moved" / who / path.name for path in reversed(paths)] for who, paths in photos.items()}
    assert content_hash(moved) == name
    assert content_hash({"ann": photos["bob"], "bob": photos["ann"]}) != name


def emptied(folder: Path) -> None:
    """Nothing is in it any more."""
    shutil.rmtree(folder)
    folder.mkdir()


def resized(path: Path, size: tuple[int, int]) -> None:
    Image.open(path).resize(size).save(path)


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (
            lambda m, p: shutil.rmtree(m / "bob"),
            ["theirs holds no folder of bob", "theirs/bob/set_B or ", "theirs/bob"],
        ),
        (
            lambda m, p: emptied(m),
            ["theirs holds a folder of none of the people (ann, bob)", "theirs/ann/set_B"],
        ),
        (lambda m, p: (m / "ann" / "1.png").unlink(), ["theirs/ann has no photo called 1", "ann/set_B/1.jpg"]),
        (
            lambda m, p: shutil.copy(m / "ann" / "1.png", m / "ann" / "IMG_2.png"),
            ["theirs/ann/IMG_2.png has no original", "ann/set_B"],
        ),
        (
            lambda m, p: shutil.copy(m / "ann" / "1.png", m / "ann" / "1.webp"),
            ["theirs/ann/1.png and 1.webp have one stem"],
        ),
        (
            lambda m, p: shutil.copy(m / "ann" / "1.png", p / "ann" / "set_B" / "1.png"),
            ["people/ann/set_B/1.jpg and 1.png have one stem"],
        ),
        (
            lambda m, p: resized(m / "bob" / "0.png", (8, 8)),
            ["theirs/bob/0.png has 8 x 8 pixels, and 0.jpg has 16 x 16", "the same size", "smaller squares"],
        ),
        (
            lambda m, p: shutil.copy(p / "bob" / "set_B" / "0.jpg", m / "bob" / "0.png"),
            ["theirs/bob/0.png is the original itself"],
        ),
        (lambda m, p: (m / "bob" / "0.png").write_text("no picture"), ["theirs/bob/0.png cannot be decoded"]),
        (lambda m, p: emptied(m / "bob"), ["theirs/bob holds no photo"]),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_file(people, small_model, made, spoil, messages):
    """Before anything is computed."""
    spoil(made, people)
    refused(
        [
            *("verdict", "--name=e", f"--folder={people.parent / 'out'}", f"--people_folder={people}"),
            *(f"--backbone={small_model}", "--protections", f"mist={made}", "--dry_run"),
        ],
        *messages,
    )
    assert not (people.parent / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["aspl={made}"], "there is a protection 'aspl' already"),
        (["none={made}"], "there is a protection 'none' already"),
        (["base={made}"], "'base' is the name of the control"),
        (["a={made}", "a={made}"], "there is a protection 'a' already"),
        (["a={made}/nowhere"], "neither none, noise, a folder of photos nor a config file"),
    ],
)
def test_a_name_means_one_protection(people, small_model, made, words, message):
    given = [word.format(made=made) for word in words]
    where = ["--name=e", f"--folder={people.parent}", f"--people_folder={people}", f"--backbone={small_model}"]
    refused(["verdict", *where, "--dry_run", "--protections", *given], message)


def test_a_control_is_none_of_them(people, small_model, made):
    with pytest.raises(InputError, match="'noise' is the name of a control"):
        experiment_of(people, small_model, noise=str(made)).resolve()


def test_pairs_are_told_from_a_whole_dictionary():
    pairs = [("mist", "a b"), ("v2.1", "c=d")]
    for words in (
        ["--name", "e", "--protections", "mist=a b", "v2.1=c=d", "-c", "x.yaml"],
        ["--protections=mist=a b", "--name", "e", "--protections=v2.1=c=d", "-c", "x.yaml"],
        ["--name", "e", "-c", "x.yaml", "--protections", "mist=a b", "v2.1=c=d"],
    ):
        assert without_added(words) == (["--name", "e", "-c", "x.yaml"], pairs)
    whole = ["--protections", "{a: configs/aspl.yaml --model.budget=4}", "--budgets=[4]"]
    assert without_added(whole) == (whole, [])
    assert without_added(["--protections={a: b=c}", "--protections"]) == (
        ["--protections={a: b=c}", "--protections"],
        [],
    )


def test_the_report_says_who_made_what(people, small_model, made, monkeypatch):
    """Beside ours, with its budget as measured; its photos stay as they were, and only the given path is shown."""
    monkeypatch.setattr(launch.tasks, "gc", SimpleNamespace(collect=int))
    fit = FakeFit()

    def run_here(commands, *_):
        for command in commands:
            verdict(command[3:], fit, parsed)

    monkeypatch.setattr(launch.tasks, "run_jobs", run_here)
    monkeypatch.chdir(people.parent)
    before = contents_of(made)
    base = ["--name=e", "--folder=out", "--people_folder=people", f"--backbone={small_model}"]
    with redirect_stdout(io.StringIO()):
        verdict([*base, "--protections", "mist=theirs"], fit, parsed)
    assert contents_of(made) == before
    root = people.parent / "out" / "e"
    page, table = (root / "index.html").read_text(), (root / "table.md").read_text()
    identity = content_hash({name: [*(made / name).iterdir()] for name in ("ann", "bob")})
    for text in (page, table):
        assert "The protection mist was made elsewhere" in text
        assert identity in text
        assert f"as measured, is {BUDGET} of 255" in text
        assert str(people.parent) not in text
        assert STANDS_FOR not in text  # this is not the embedded model
    for row in (r"\| full \| nothing \| mist \| 2 / 2 / 4 \|", rf"\| mist \| [\d.]+ \| 0\.\d+ \|.* {BUDGET} \|"):
        assert re.search(row, table), table
    record = json.loads((root / "cells" / "ann-mist-0-s0-nothing-full-v0" / "cell.json").read_text())
    assert record["settings"]["cloak"]["protection"] == "made elsewhere"
    photo = pixels(made / "ann" / "0.png")
    assert np.array_equal(pixels(root / "cells" / "ann-mist-0-s0-nothing-full-v0" / "photos" / "0.png"), photo)
    fit.commands.clear()
    with redirect_stdout(io.StringIO()):  # nothing is left to do, wherever the folder has gone
        made.rename(people.parent / "moved")
        verdict([*base, "--protections", "mist=moved"], fit, parsed)
    assert fit.commands == []
    Image.fromarray(photo ^ 1).save(people.parent / "moved" / "ann" / "0.png")
    contents.cache_clear()
    with pytest.raises(
        InputError, match=r"ann-mist-0-s0-nothing-full-v0 was made with other settings \(cloak.protected"
    ):
        verdict([*base, "--protections", "mist=moved"], fit, parsed)


@pytest.mark.slow
def test_the_real_command_judges_a_strangers_photos(people, small_model, made, tmp_path, monkeypatch):
    """A victim is trained on them and draws."""

    def run_here(commands, *_):
        for command in commands:
            main(command[2:])

    monkeypatch.setattr(launch.tasks, "run_jobs", run_here)
    # A loader gives lists for tuples, which the type check of the tests refuses.
    named = lightning_modules.victim.reference
    tuples = lambda model, photos: named(model, [(name, pixels) for name, pixels in photos])  # noqa: E731
    monkeypatch.setattr(lightning_modules.victim, "reference", tuples)
    shutil.rmtree(people / "bob")
    command = [
        *("verdict", "--name=e", f"--folder={tmp_path / 'out'}", f"--people_folder={people}"),
        *(f"--backbone={small_model}", "--protections={none: none}", "--protections", f"mist={made}"),
        *(f"--victims={json.dumps({'full': VICTIM})}", "--generation.images=1", "--generation.sampling_steps=2"),
    ]
    with redirect_stdout(io.StringIO()) as printed:
        main(command)
    assert "0 cloaks and 2 victims to do, and 1 controls that are not trained" in printed.getvalue()
    root = tmp_path / "out" / "e"
    assert len(list(root.glob("cells/*/cell.json"))) == 3
    page = (root / "index.html").read_text()
    assert "The protection mist was made elsewhere" in page
    assert 'alt="ann, mist, picture 1' in page
