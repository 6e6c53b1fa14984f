"""The verdict's launcher: which cells there are, what each runs, how it stops and goes on, what it refuses."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import launch.jobs
import launch.runs
import launch.tasks
import launch.verdict.command
import lightning_modules.victim
from antidreambooth.attack.perturbation import random_noise
from antidreambooth.errors import InputError
from antidreambooth.evaluation.conditions import JPEG, Scene
from antidreambooth.files import locked, write_json
from cli import main, parsed
from launch.cost import duration, footprint_of_cloak
from launch.jobs import Launcher, run_jobs, workers_of
from launch.runs import contents
from launch.verdict.cell import BASE, Cell, Person, arriving, make_cloak, originals, protected, run_cell
from launch.verdict.command import parser, read_experiment, verdict
from launch.verdict.estimate import run_of_cloak
from launch.verdict.experiment import Experiment
from tests.conftest import ROOT, random_images
from tests.conftest import contents as contents_of
from tests.helpers import make_photos

VERDICTS = sorted((ROOT / "configs" / "verdict").glob("*.yaml"))
CPU = "--trainer.accelerator cpu --trainer.precision 32-true"
ASPL = (
    f"configs/aspl.yaml --trainer.max_epochs 1 {CPU} --model.pgd_steps 1 --model.surrogate.steps 1 "
    "--model.surrogate.batch_size 1 --model.surrogate.prior.weight 0"
)
VICTIM = (
    f"configs/dreambooth.yaml {CPU} --model.training.steps 2 --model.training.batch_size 1 "
    "--model.training.prior.weight 0 --model.faces tests.launch.fake_verdict_faces.FakeFaces"
)
JPEG75 = [{"class_path": "JPEG", "init_args": {"quality": 75}}]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """As in a process of its own: photos are read once in each."""
    contents.cache_clear()
    monkeypatch.setattr(launch.jobs, "POLL", 0.05)


def make_people(folder: Path, *names: str, photos: int = 2) -> Path:
    for number, name in enumerate(names):
        for part, letter in enumerate("ABC"):
            make_photos(folder / name / f"set_{letter}", photos, 10 * number + part)
    return folder


@pytest.fixture
def people(tmp_path) -> Path:
    return make_people(tmp_path / "people", "ann", "bob")


def experiment_of(people: Path, /, **more) -> Experiment:
    return Experiment(**{"name": "e", "folder": str(people.parent), "people_folder": str(people)} | more)


# Which cells there are


def test_what_cannot_differ_is_one_cell(people):
    given = make_people(people.parent / "given", "bob", "ann")  # other photos than theirs
    experiment = experiment_of(
        people,
        protections={"none": "none", "noise": "noise", "aspl": "configs/aspl.yaml", "given": str(given)},
        budgets=[4, 8],
        victims={"full": "configs/dreambooth.yaml", "lora": "configs/dreambooth-lora.yaml"},
        conditions={"nothing": [], "jpeg": [JPEG()]},
        cloak_seeds=[0, 1],
        victim_seeds=[0, 1, 2],
    )
    cloaks, cells = experiment.resolve()
    assert len(set(cells)) == len(cells) == len({cell.name for cell in cells})
    for person in ("ann", "bob"):
        own = [cell for cell in cells if cell.cloak.person == person]
        counts = {p: sum(cell.cloak.protection == p for cell in own) for p in (BASE, "none", "given", "noise", "aspl")}
        tried = 2 * 2 * 3  # victims, conditions, victim seeds
        changing = tried * 2 * 2  # and budgets, cloak seeds
        assert counts == {BASE: 1, "none": tried, "given": tried, "noise": changing, "aspl": changing}
    assert {cell.cloak.budget for cell in cells if cell.cloak.protection in ("none", "given", BASE)} == {0.0}
    assert {(cell.cloak.budget, cell.cloak.seed) for cell in cells if cell.cloak.protection == "noise"} == {
        (4, 0),
        (4, 1),
        (8, 0),
        (8, 1),
    }
    assert len(cloaks) == 2 * 2 * 2  # shared by victims, conditions and victim seeds
    assert {cloak.protection for cloak in cloaks} == {"aspl"}
    assert set(cloaks) == {cell.cloak for cell in cells if cell.cloak.protection == "aspl"}


def only(cells, **wanted) -> Cell:
    """The one cell whose names (and those of its cloak) are as wanted."""
    (cell,) = [c for c in cells if wanted.items() <= {**vars(c.cloak), **vars(c)}.items()]
    return cell


def test_names_are_a_file_format(people):
    """Results of long runs lie in folders of these names."""
    who = Person(*(str(people / "ann" / part) for part in ("set_B", "set_A")))
    conditions = {"jpeg75-half": [JPEG(75)]}
    experiment = experiment_of(
        people, people_folder=None, people={"lfw-Alvaro_Uribe": who}, conditions=conditions, victim_seeds=[1]
    )
    cloaks, cells = experiment.resolve()
    root = people.parent / "e"
    assert [cloak.record for cloak in cloaks] == [root / "cloaks" / "lfw-Alvaro_Uribe-aspl-8-s0" / "done.json"]
    assert [cell.record.relative_to(root / "cells").as_posix() for cell in cells] == [
        f"lfw-Alvaro_Uribe-{name}/cell.json"
        for name in (
            "base-0-s0-nothing-untrained-v0",
            "none-0-s0-jpeg75-half-full-v1",
            "noise-8-s0-jpeg75-half-full-v1",
            "aspl-8-s0-jpeg75-half-full-v1",
        )
    ]


def test_squares_are_made_and_counted(people, small_model, fit):
    """Whatever comes back otherwise, figures are compared in this form."""
    cloak = experiment_of(people, backbone=str(small_model)).resolve().cloaks[0]
    make_cloak(cloak, fit)
    assert "--model.parametrisation=Square" in fit.commands[0]
    footprint = run_of_cloak(cloak, parsed).footprint()
    assert not footprint.own_size
    assert footprint_of_cloak(parsed(launch.runs.command(cloak.how, {})), parsed).own_size


def test_a_cell_needs_no_experiment(people, small_model, fit):
    """All that its runs and its record say comes from the cell itself."""
    cloaks, cells = experiment_of(people, backbone=str(small_model), budgets=[4.0]).resolve()
    cell = only(cells, person="bob", protection="aspl")
    assert cell.cloak in cloaks
    make_cloak(cell.cloak, fit)
    run_cell(cell, fit)
    cloaking, training, testing = fit.commands
    assert {"--model.budget=4.0", f"--model.backbone={small_model}"} <= set(cloaking)
    assert (training[0], testing[0]) == ("fit", "test")
    record = json.loads(cell.record.read_text())
    assert record["settings"] == cell.settings
    assert (record["person"], record["budget"]) == ("bob", 4.0)


def test_odd_names_lie_in_folders_of_their_own(people):
    who = Person(*(str(people / "ann" / part) for part in ("set_B", "set_A", "set_C")))
    names = ["a b", "a/b", "a_b", "../a", "Zoë"]
    experiment = Experiment(name="e", folder=str(people.parent), people=dict.fromkeys(names, who))
    cells = experiment.resolve().cells
    folders = {cell.record.parent.resolve() for cell in cells}
    assert len(folders) == len(cells) == len(names) * 4
    assert {folder.parent for folder in folders} == {(experiment.root / "cells").resolve()}


def folders_of(experiment: Experiment) -> dict[str, Person]:
    return {cell.cloak.person: cell.cloak.folders for cell in experiment.resolve().cells}


def test_people_are_those_asked_for_with_the_folders_they_have(people):
    shutil.rmtree(people / "bob" / "set_C")
    (people / "notes").mkdir()
    everyone = folders_of(experiment_of(people))
    assert list(everyone) == ["ann", "bob"]
    assert everyone["bob"] == Person(str(people / "bob" / "set_B"), str(people / "bob" / "set_A"), None)
    assert everyone["ann"].references == [str(people / "ann" / part) for part in ("set_A", "set_C")]
    assert list(folders_of(experiment_of(people, people_names=["bob"]))) == ["bob"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"people_folder": None}, "nobody"),
        ({"people_folder": "empty"}, "nobody"),
        ({"people_names": ["carol"]}, r"carol/set_B does not exist"),
        ({"people": {"carol": Person("nowhere", "nowhere")}}, "nowhere does not exist"),
        ({"victims": {}}, "victims is empty"),
        ({"budgets": []}, "budgets is empty"),
        ({"baseline": "mist"}, "--baseline 'mist' is none of the protections: aspl"),
        ({"baseline": "noise"}, "--baseline 'noise' is none of the protections: aspl"),
        ({"protections": {"base": "none"}}, "'base' is the name of the control"),
        ({"protections": {"mine": ""}}, "mine: '' is neither"),
        ({"protections": {"mine": "nowhere"}}, "'nowhere' is neither none, noise, a folder of photos nor"),
        ({"protections": {"mine": "far " * 100}}, "is neither none, noise, a folder of photos nor"),  # no file's name
        (
            {"protections": {"mine": "configs/nowhere.yaml --x 1"}},
            "mine: there is no config file 'configs/nowhere.yaml'",
        ),
        ({"victims": {"full": ""}}, "full: there is no config file ''"),
        ({"victims": {"full": "configs/dreambooth.yaml --x '"}}, "is no command line: No closing quotation"),
        ({"victims": {"full": "nowhere.yaml"}}, "'nowhere.yaml'"),
        ({"victims": {"b-c": "configs/dreambooth.yaml"}, "conditions": {"a": [], "a-b": []}}, None),
        (
            {
                "victims": {"b-c": "configs/dreambooth.yaml", "c": "configs/dreambooth.yaml"},
                "conditions": {"a": [], "a-b": []},
            },
            "two cells would be called",
        ),
    ],
)
def test_what_cannot_work_is_refused_first(people, settings, message):
    experiment = experiment_of(people, **settings)
    if message is None:
        assert len(experiment.resolve().cells) == 2 * (1 + 2 * 3)
        return
    with pytest.raises(InputError, match=message):
        experiment.resolve()


@pytest.mark.parametrize("config", VERDICTS, ids=lambda path: path.stem)
def test_every_verdict_config_parses(config, tmp_path):
    names = parser().parse_args([f"--config={config}"]).people_names
    people = make_people(tmp_path / "people", *names, photos=1)
    options = parser().parse_args([f"--config={config}", f"--people_folder={people}", f"--folder={tmp_path}"])
    experiment = read_experiment(options)
    assert experiment.name == config.stem
    cloaks, cells = experiment.resolve()
    assert list(folders_of(experiment)) == names
    made = sum(how.split()[0].endswith(".yaml") for how in experiment.protections.values()) * len(experiment.budgets)
    noise = len(experiment.budgets) if "noise" in experiment.protections else 0
    none = "none" in experiment.protections  # whatever the budget
    protections = none + noise + made
    variants = protections * len(experiment.victims) * len(experiment.conditions)
    assert len(cells) == len(names) * (1 + variants * len(experiment.victim_seeds))
    assert len(cloaks) == len(names) * made
    photos = random_images(2)
    scene = Scene(lambda: pytest.fail("no base model is needed"), photos)
    for conditions in experiment.conditions.values():
        for condition in conditions:
            if type(condition).__name__ != "Clean":  # needs a base model
                assert condition(photos, scene).shape == photos.shape


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verdict", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    options = re.split(r"\n(?=  -)", text.partition("options:")[2] or text)[1:]
    explained = {re.findall(r"--([\w.+-]+)", option)[0]: option for option in options}
    wanted = {"photos", "clean_photos", "name", "people_folder", "protections", "budgets", "victims", "conditions"}
    wanted |= {"launcher.workers", "launcher.timeout_min", "launcher.parameters", "generation.images", "keep_models"}
    assert wanted <= set(explained)
    for name, option in explained.items():
        words = re.sub(r"\(type:.*", "", option, flags=re.DOTALL)  # names, then the explanation, then the type
        words = re.sub(r"^\s+-.*?(\n|  |$)", "", words).strip()
        if "CONFIG" not in option and ".help" not in name:
            assert len(words) > 10, f"--{name} is not explained: {option}"


# What reaches the victim


@pytest.mark.parametrize("budget", [1.0, 8.0, 8.9, 255.0])
def test_noise_is_the_whole_budget_in_each_value(budget):
    originals = torch.cat([random_images(3), torch.zeros(1, 3, 16, 16).byte(), torch.full((1, 3, 16, 16), 255).byte()])
    noisy = random_noise(originals, budget, 0)
    steps = int(budget)
    up, down = (originals.int() + steps).clamp(max=255), (originals.int() - steps).clamp(min=0)
    assert noisy.dtype == torch.uint8
    assert ((noisy == up) | (noisy == down)).all()
    went_up = ((noisy == up) & (up != down)).float().sum() / (up != down).float().sum()
    assert 0.4 < went_up < 0.6
    assert torch.equal(noisy, random_noise(originals, budget, 0))
    assert not torch.equal(noisy, random_noise(originals, budget, 1))


def test_conditions_follow_each_other_on_the_protected_photos(people, small_model):
    conditions = {"twice": [JPEG(10), JPEG(30)]}
    experiment = experiment_of(people, backbone=str(small_model), conditions=conditions, cloak_seeds=[3])
    cell = only(experiment.resolve().cells, person="ann", protection="noise")
    noisy = random_noise(originals(cell.cloak), 8.0, 3)
    assert torch.equal(protected(cell.cloak), noisy)
    scene = Scene(lambda: pytest.fail("no base model is needed"), noisy)
    assert torch.equal(arriving(cell), JPEG(30)(JPEG(10)(noisy, scene), scene))


# A verdict with a fit that does nothing but note its command line


class FakeFit:
    """Writes the files that a fit and a test leave behind; some of them fail."""

    def __init__(self):
        self.commands: list[list[str]] = []
        self.failing = ""

    def __call__(self, command):
        self.commands.append(command)
        if self.failing and self.failing in " ".join(command):
            sys.exit("error: this one fails\nand says more")
        root = Path(self.value(command, "trainer.default_root_dir"))
        if "aspl.yaml" in command[1]:
            assert command[0] == "fit"
            shutil.copytree(self.value(command, "data.photos"), root / "cloaked", dirs_exist_ok=True)
            (root / "manifest.json").write_text('{"passes": {"denoiser": 12, "encoder": 34}}')
        elif command[0] == "fit":
            assert sorted(Path(self.value(command, "data.photos")).iterdir())
            (root / "model").mkdir()
            (root / "model" / "weights").write_text("large")
        else:
            lines = ["prompt,index,file,face,accepted,ism,joint_ism,distance"]
            lines += [f"a,{index},images/0-{index:03d}.png,1.0,1.0,0.5,0.5,0.4" for index in range(2)]
            root.mkdir(parents=True, exist_ok=True)
            (root / "per_image.csv").write_text("\n".join(lines) + "\n")

    @staticmethod
    def value(command, name):
        return next(word.partition("=")[2] for word in command if word.startswith(f"--{name}="))


@pytest.fixture
def fit():
    return FakeFit()


@pytest.fixture
def ask(people, small_model, fit, monkeypatch):
    """Asks for a verdict whose jobs run here, one after the other."""
    jobs = []

    def run_here(commands, launcher, logs, title, total, done):
        jobs.extend(commands)
        for command in commands:
            assert command[:3] == [sys.executable, str(ROOT / "cli.py"), "verdict"]
            verdict(command[3:], fit, parsed)

    monkeypatch.setattr(launch.tasks, "run_jobs", run_here)
    monkeypatch.setattr(launch.tasks, "gc", SimpleNamespace(collect=int))  # slow, and there are no models
    base = [f"--people_folder={people}", f"--folder={people.parent}", f"--backbone={small_model}", "--name=e"]

    def run(*more):
        jobs.clear()
        fit.commands.clear()
        contents.cache_clear()
        verdict([*base, *more], fit, parsed)
        return len(jobs)

    return run


def stamps(folder: Path) -> dict[str, int]:
    kept = [path for part in ("cloaks", "cells") for path in (folder / part).rglob("*") if path.is_file()]
    return {str(path): path.stat().st_mtime_ns for path in kept}


def test_each_cell_is_trained_and_measured_once(ask, fit, people, capsys):
    assert ask("--launcher.workers=3", "--victim_seeds=[4, 5]") == 2 + 3  # no more jobs than there are cloaks
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "ann  2 photos, 1 cloaks and 6 victims to do"
    assert "2 people: 2 cloaks and 12 victims to do, and 2 controls that are not trained, 3 at a time (local)" in lines
    assert "time: known after the first one" in lines
    assert "the page: " in printed
    cloaking, training = (
        [c for c in fit.commands if c[0] == "fit" and name in c[1]] for name in ("aspl", "dreambooth")
    )
    testing = [c for c in fit.commands if c[0] == "test"]
    assert [len(cloaking), len(training), len(testing)] == [2, 12, 14]
    assert len({FakeFit.value(c, "trainer.default_root_dir") for c in testing}) == 14
    root = people.parent / "e"
    for name in ("table.csv", "table.md", "index.html"):
        assert (root / name).stat().st_size > 0
    assert len(list((root / "cells").glob("*/cell.json"))) == 14
    assert not list(root.glob("cells/*/model"))  # weights are not kept
    cell = json.loads((root / "cells" / "ann-aspl-8-s0-nothing-full-v5" / "cell.json").read_text())
    assert cell.items() >= {"person": "ann", "protection": "aspl", "budget": 8.0, "victim_seed": 5}.items()
    assert cell["settings"]["victim"] == "configs/dreambooth.yaml"
    (one,) = [c for c in training if "ann-aspl-8-s0-nothing-full-v5" in FakeFit.value(c, "data.photos")]
    assert "--seed_everything=5" in one
    (two,) = [
        c for c in testing if FakeFit.value(c, "trainer.default_root_dir").endswith("ann-none-0-s0-nothing-full-v4")
    ]
    references = json.loads(FakeFit.value(two, "data.reference_photos"))
    assert references == [str(people / "ann" / part) for part in ("set_A", "set_C")]
    assert FakeFit.value(two, "model.generation.images") == "8"
    cloaked = FakeFit.value(cloaking[0], "trainer.default_root_dir")
    assert FakeFit.value(cloaking[0], "data.clean_photos") == str(people / "ann" / "set_A")
    assert cloaked == str(root / "cloaks" / "ann-aspl-8-s0")


def test_cloaked_photos_are_no_originals(ask, fit, people, capsys):
    """Figures that compare with them would be wrong."""
    photo = next((people / "ann" / "set_A").iterdir())
    made = {"source": "a.jpg", "sha256": "", "cloaked_sha256": hashlib.sha256(photo.read_bytes()).hexdigest()}
    write_json(people / "ann" / "manifest.json", {"settings": {}, "versions": {}, "photos": [made]})
    with pytest.raises(InputError, match=rf"{re.escape(photo.name)} is no original: the run in .*ann made it"):
        ask()
    assert fit.commands == []


def test_a_second_command_at_the_same_time_is_told(ask, fit, people, tmp_path):
    (people.parent / "out").mkdir(exist_ok=True)
    experiment = experiment_of(people)
    with locked(experiment.root, "wait"), pytest.raises(InputError, match="another run is at work in"):
        ask()
    assert fit.commands == []


def test_the_second_time_nothing_runs(ask, fit, people, capsys):
    ask()
    before = stamps(people.parent / "e")
    capsys.readouterr()
    assert ask() == 0
    assert fit.commands == []
    assert stamps(people.parent / "e") == before
    assert "to do" not in capsys.readouterr().out


def test_a_dry_run_says_what_is_left_and_writes_nothing(ask, fit, people, capsys):
    fit.failing = "bob-noise"
    victims = "--victims={full: configs/dreambooth.yaml, bad: configs/dreambooth.yaml --model.nonsense 1}"
    with pytest.raises(InputError):
        ask()
    for path, seconds in (("none-0", 30.0), ("noise-8", 100.0), ("aspl-8", 50.0)):
        record = people.parent / "e" / "cells" / f"ann-{path}-s0-nothing-full-v0" / "cell.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "seconds": seconds}))
    shutil.rmtree(people.parent / "e" / "cells" / "bob-aspl-8-s0-nothing-full-v0")
    shutil.rmtree(people.parent / "e" / "cells" / "bob-none-0-s0-nothing-full-v0")
    shutil.rmtree(people.parent / "e" / "cells" / "bob-base-0-s0-nothing-untrained-v0")
    before = contents_of(people.parent)
    capsys.readouterr()
    assert ask("--dry_run", victims, "--launcher.workers=2") == 0
    assert fit.commands == []
    assert contents_of(people.parent) == before
    printed = capsys.readouterr()
    assert "nonsense" in printed.err  # the parser says why
    for line in (
        "ann  2 photos, 0 cloaks and 3 victims to do",
        "bob  2 photos, 0 cloaks and 6 victims to do",
        r"2 people: 0 cloaks and 9 victims to do, and 1 controls that are not trained, 2 at a time \(local\)",
        # Three of the kind "full" are left and each takes 50 s, two at a time; the finished control takes no time.
        r"time: about 75 s, from the median of those that are finished \(a control 0 s, a victim full 50 s\); "
        "more for a victim bad: known after the first one",
        r"disk: at most [\d.]+ MB to stay in .*/e, and on the way [\d.]+ MB for weights, "
        r"and [\d.]+ MB for class images in .* where they are not there; [\d.]+ .B are free; "
        r"without a victim bad \(its command line is wrong\)",
    ):
        assert re.search(f"^{line}$", printed.out, re.MULTILINE), f"{line} is not in {printed.out}"


def test_a_dry_run_of_what_is_done_says_so(ask, capsys):
    ask()
    capsys.readouterr()
    assert ask("--dry_run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "ann  2 photos, done",
        "bob  2 photos, done",
        f"2 people: 0 cloaks and 0 victims to do, {workers_of(Launcher())} at a time (local)",
    ]


def test_other_settings_in_the_same_folder_end_in_one_error(ask, fit, people):
    ask()
    before = stamps(people.parent / "e")
    for changed in ("--generation.images=3", "--victims={full: configs/dreambooth.yaml --seed_everything 1}"):
        with pytest.raises(InputError, match=r"was made with other settings \(.+: .* then, .* now\)"):
            ask(changed)
    (people / "ann" / "set_B" / "0.png").write_bytes((people / "ann" / "set_A" / "1.png").read_bytes())
    with pytest.raises(InputError, match=r"ann-aspl-8-s0 was made with other settings \(photos"):
        ask()
    assert fit.commands == []
    assert stamps(people.parent / "e") == before
    assert not list((people.parent / "e").rglob("*.failed"))


def test_the_control_is_the_first_victim_untrained(ask, fit, people):
    ask("--victims={lora: configs/dreambooth-lora.yaml --model.resolution 16, full: configs/dreambooth.yaml}")
    own = [c for c in fit.commands if "ann-base" in FakeFit.value(c, "trainer.default_root_dir")]
    assert [c[0] for c in own] == ["test"]
    assert own[0][1] == f"--config={ROOT / 'configs' / 'dreambooth-lora.yaml'}" or own[0][1].endswith("-lora.yaml")
    flags = [w for w in own[0] if not w.startswith("--data.") and "generation" not in w]
    assert flags[-3:] == ["--model.resolution", "16", "--model.adaptation=Untrained"]
    settings = json.loads(
        (people.parent / "e" / "cells" / "ann-base-0-s0-nothing-untrained-v0" / "cell.json").read_text()
    )
    assert settings["settings"]["victim"] == BASE


def test_a_victim_may_ask_for_pictures_of_its_own(ask, fit, people):
    """Who trains on another identifier asks for it."""
    victim = """configs/dreambooth.yaml --model.generation.prompts '["a photo of t@t person"]'"""
    ask(f"--victims={json.dumps({'full': victim})}")
    for command in (c for c in fit.commands if c[0] == "test"):
        last = max(i for i, word in enumerate(command) if word.startswith("--model.generation.prompts"))
        assert command[last : last + 2] == ["--model.generation.prompts", '["a photo of t@t person"]']


def test_failed_cells_are_named_and_tried_again(ask, fit, people, capsys):
    fit.failing = "ann-noise"
    with pytest.raises(InputError) as failed:
        ask()
    name = "ann-noise-8-s0-nothing-full-v0"
    assert str(failed.value).startswith(f"1 cells failed, the first: {name}: error: this one fails (more in ")
    root = people.parent / "e"
    assert len(list(root.glob("cells/*/cell.json"))) == 7
    assert name in (root / "index.html").read_text()
    assert "7 of 8 cells finished, 1 failed" in (root / "index.html").read_text()
    fit.failing = ""
    ask()
    assert {Path(FakeFit.value(c, "trainer.default_root_dir")).name for c in fit.commands} == {name}
    assert not list(root.rglob("*.failed"))


def test_without_its_cloak_a_cell_fails_and_the_report_is_there(ask, fit, people):
    fit.failing = "cloaks/bob-aspl"
    with pytest.raises(InputError) as failed:
        ask()
    assert str(failed.value).startswith("1 cloaks and 1 cells failed, the first: bob-aspl-8-s0: error: this one fails")
    root = people.parent / "e"
    reason = (root / "cells" / "bob-aspl-8-s0-nothing-full-v0.failed").read_text()
    assert reason.startswith("its cloak is not finished: bob-aspl-8-s0")
    assert "7 of 8 cells finished, 1 failed" in (root / "table.md").read_text()
    assert "The cloak bob-aspl-8-s0 failed" in (root / "table.md").read_text()
    fit.failing = ""
    ask()
    assert len(list(root.glob("cells/*/cell.json"))) == 8


def test_an_interrupted_cloak_is_not_taken_for_one(ask, people):
    cloak = experiment_of(people).resolve().cloaks[0]
    shutil.copytree(people / "ann" / "set_B", cloak.record.parent / "cloaked")
    with pytest.raises(InputError, match="its cloak is not finished: ann-aspl-8-s0"):
        protected(cloak)


def test_a_lost_cloak_does_not_stop_the_report(ask, people):
    ask()
    shutil.rmtree(people.parent / "e" / "cloaks" / "ann-aspl-8-s0")
    (people.parent / "e" / "index.html").unlink()
    experiment = experiment_of(people)
    launch.verdict.command.write_results(experiment, experiment.resolve(), {}, {})
    assert (people.parent / "e" / "index.html").is_file()


def test_the_tables_compare_with_the_baseline_that_was_asked_for(ask, people):
    protections = {"none": "none", "aspl": "configs/aspl.yaml", "short": "configs/aspl.yaml --trainer.max_epochs 2"}
    ask(f"--protections={json.dumps(protections)}", "--baseline=short")
    with (people.parent / "e" / "table.csv").open() as file:
        compared = {(row["protection"], row["control"]) for row in csv.DictReader(file) if row["control"]}
    assert compared == {("aspl", "none"), ("aspl", "short"), ("short", "none")}


def test_half_a_cell_is_started_anew_and_half_a_cloak_gone_on_with(ask, fit, people):
    root = people.parent / "e"
    half, cloak = root / "cells" / "ann-none-0-s0-nothing-full-v0", root / "cloaks" / "ann-aspl-8-s0"
    (half / "photos").mkdir(parents=True)
    (half / "photos" / "rest.png").write_text("of an earlier try")
    (cloak / "checkpoints").mkdir(parents=True)
    (cloak / "checkpoints" / "last.ckpt").write_text("half")
    ask()
    assert not (half / "photos" / "rest.png").exists()
    resumed = [FakeFit.value(c, "trainer.default_root_dir") for c in fit.commands if "--ckpt_path=last" in c]
    assert resumed == [str(cloak)]
    assert not (cloak / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("code", [1, None, 143])
def test_a_worker_that_is_told_to_stop_stops(people, small_model, code):
    """Lightning turns Ctrl-C into exit code 1, SIGTERM into none; a run that a signal ends has 143."""
    calls = []

    def stopped(command):
        calls.append(command)
        raise SystemExit(code)

    share = "--share=cells:0/1"
    with pytest.raises(SystemExit):
        verdict(
            [f"--people_folder={people}", f"--folder={people.parent}", f"--backbone={small_model}", "--name=e", share],
            stopped,
            parsed,
        )
    assert len(calls) == 1
    assert not list(people.parent.rglob("*.failed"))


def test_shares_are_all_cells_and_none_twice(fit, people, small_model, monkeypatch):
    monkeypatch.setattr(launch.tasks, "gc", SimpleNamespace(collect=int))
    base = [f"--people_folder={people}", f"--folder={people.parent}", f"--backbone={small_model}", "--name=e"]
    seen = []
    for number in range(3):
        fit.commands.clear()
        verdict([*base, f"--share=cloaks:{number}/3"], fit, parsed)
        seen.append([FakeFit.value(c, "trainer.default_root_dir") for c in fit.commands])
    assert [len(part) for part in seen] == [1, 1, 0]
    seen = []
    for number in range(3):
        fit.commands.clear()
        verdict([*base, f"--share=cells:{number}/3"], fit, parsed)
        seen += {FakeFit.value(c, "trainer.default_root_dir") for c in fit.commands}
    assert len(seen) == len(set(seen)) == 8


# One's own photos


@pytest.fixture
def own(tmp_path):
    """More cloaked photos than clean ones."""
    return make_photos(tmp_path / "cloaked", 3, 7), make_photos(tmp_path / "clean", 2, 8)


def test_own_photos_give_a_paragraph_and_a_page(ask, fit, people, own, capsys):
    photos, clean = own
    ask(f"--photos={photos}", f"--clean_photos={clean}", "--people_folder=null")
    lines = capsys.readouterr().out.splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith("the page: "))
    assert "photos" in lines[place - 1]
    assert len(lines[place - 1]) > 100
    defaults = parser().parse_args([f"--photos={photos}", f"--clean_photos={clean}"])  # all that has to be given
    assert read_experiment(defaults).root == Path("outputs/verdict/mine")
    root = people.parent / "e"
    assert (root / "index.html").is_file()
    assert {path.parent.name for path in root.glob("cells/*/cell.json")} == {
        "you-base-0-s0-nothing-untrained-v0",
        "you-none-0-s0-nothing-full-v0",
        "you-cloaked-0-s0-nothing-full-v0",
    }
    for name, source in (("cloaked", photos), ("none", clean)):
        folder = root / "cells" / f"you-{name}-0-s0-nothing-full-v0" / "photos"
        assert [np.asarray(Image.open(path)).tolist() for path in sorted(folder.iterdir())] == [
            np.asarray(Image.open(path)).tolist() for path in sorted(source.iterdir())
        ]
    # Cloaked once more into the same folder: that is another question.
    (photos / "0.png").write_bytes((clean / "0.png").read_bytes())
    with pytest.raises(InputError, match="you-cloaked-0-s0-nothing-full-v0 was made with other settings"):
        ask(f"--photos={photos}", f"--clean_photos={clean}", "--people_folder=null")


def refused(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["verdict", "--name=e", *arguments])
    line, hint = str(stopped.value).split("\n")
    assert hint == "(ANTIDREAMBOOTH_DEBUG=1 shows where)"
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("given", [0, 1])
def test_only_one_of_the_folders_is_refused(own, given, tmp_path):
    refused([f"--{('photos', 'clean_photos')[given]}={own[given]}", f"--folder={tmp_path}"], "give both: --photos")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--photos=nowhere", "--clean_photos={clean}"], "nowhere is no folder"),
        (["--photos={photos}", "--clean_photos=nowhere"], "nowhere does not exist"),
        ([], "there is nobody"),
        (["--people_folder=nowhere"], "there is nobody"),
        (["--people_folder={people}", "--launcher.cluster=cloud"], "local or slurm, got cloud"),
        (["--people_folder={people}", "--backbone=./nowhere"], "neither a folder"),
        (["--people_folder={people}", '--launcher.parameters={"nonsense": 1}'], "submitit refuses"),
    ],
)
def test_impossible_settings_end_in_one_line(people, own, small_model, flags, message, tmp_path):
    places = {"photos": own[0], "clean": own[1], "people": people}
    filled = [flag if "{" not in flag or "nonsense" in flag else flag.format(**places) for flag in flags]
    refused([f"--folder={tmp_path}", f"--backbone={small_model}", *filled], message)


@pytest.mark.parametrize("flag", ["--bugdets=[4]", "--budgets=many", "--conditions={a: [{class_path: Nonsense}]}"])
def test_a_misspelt_flag_stops_at_once(people, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verdict", "--name=e", f"--people_folder={people}", flag])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


# Jobs


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def run(commands, tmp_path, launcher=None, total=0, done=lambda: 0):
    run_jobs(commands, launcher or Launcher(), tmp_path / "jobs", "cells", total, done)


def test_jobs_run_side_by_side_with_a_bar(tmp_path, capsys):
    """Each waits for the other's file, so that they end only if both run."""
    code = (
        "import pathlib, sys, time; a, b = map(pathlib.Path, sys.argv[1:]); a.write_text('x')\n"
        "for _ in range(600):\n"
        "    if b.exists(): sys.exit(0)\n"
        "    time.sleep(.1)\n"
        "sys.exit(1)"
    )
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    count = lambda: sum(Path(path).exists() for path in (one, two))  # noqa: E731
    run([[*python(code), one, two], [*python(code), two, one]], tmp_path, total=2, done=count)
    bar = capsys.readouterr().out
    assert "cells" in bar
    assert "2/2" in bar


def test_a_job_that_dies_names_its_log(tmp_path):
    with pytest.raises(InputError, match=r"a job ended early \(exit code 3\): see (.*\.err), and run the same") as died:
        run([python("import sys; print('the reason', file=sys.stderr); sys.exit(3)"), python("")], tmp_path)
    (log,) = re.findall(r"see (.*\.err)", str(died.value))
    assert "the reason" in Path(log).read_text()


def test_a_killed_job_names_its_log(tmp_path):
    with pytest.raises(InputError, match=r"exit code -9.*\.err"):
        run([python("import os; os.kill(os.getpid(), 9)")], tmp_path)


def test_ctrl_c_takes_the_jobs_along(tmp_path):
    file = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(600)"

    main_thread = threading.get_ident()

    def press():
        while not (file.exists() and file.read_text()):
            time.sleep(0.05)
        signal.pthread_kill(main_thread, signal.SIGINT)

    presser = threading.Thread(target=press, daemon=True)
    presser.start()
    with pytest.raises(InputError, match="stopped: run the same command again"):
        run([python(code)], tmp_path)
    presser.join()
    deadline = time.monotonic() + 10
    while alive(int(file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_local_jobs_share_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environment = launch.jobs._environment(Launcher(), 4, 5) or {}
    assert environment.items() >= {"OMP_NUM_THREADS": "2", "KEPT": "yes"}.items()
    assert "CUDA_VISIBLE_DEVICES" not in environment

    def given(name, jobs):
        return [(launch.jobs._environment(Launcher(), number, jobs) or {}).get(name) for number in range(jobs)]

    assert given("OMP_NUM_THREADS", 40) == ["1"] * 40
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert given("CUDA_VISIBLE_DEVICES", 3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")  # those that this process may use
    assert given("CUDA_VISIBLE_DEVICES", 3) == ["5", "GPU-7", "5"]
    assert launch.jobs._environment(Launcher(cluster="slurm"), 1, 3) is None  # SLURM's own, on its machine


def test_a_task_of_a_cluster_takes_no_more_cores_than_it_was_given(tmp_path, monkeypatch):
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['OMP_NUM_THREADS'])"
    command = [sys.executable, "-c", code, str(tmp_path / "threads")]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    for own, expected in ((None, "3"), ("2", "2")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if own:
            monkeypatch.setenv("OMP_NUM_THREADS", own)
        launch.jobs._job(command, None)()
        assert (tmp_path / "threads").read_text() == expected


def test_jobs_get_their_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "99")
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['OMP_NUM_THREADS'])"
    run([[*python(code), str(tmp_path / "threads")]], tmp_path)
    assert (tmp_path / "threads").read_text() == str(len(os.sched_getaffinity(0)))


def test_as_many_workers_as_gpus_or_cores_unless_asked(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert workers_of(Launcher()) == 12
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert workers_of(Launcher()) == 2
    assert workers_of(Launcher(workers=5)) == 5


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        (Launcher(cluster="cloud"), "local or slurm, got cloud"),
        (Launcher(parameters={"nonsense": 1}), "submitit refuses --launcher local: .*nonsense"),
        (Launcher(cluster="slurm"), 'submitit refuses --launcher slurm: .*"srun"'),
    ],
)
def test_what_submitit_cannot_do_is_one_line(tmp_path, launcher, message):
    if launcher.cluster == "slurm" and shutil.which("srun"):
        pytest.skip("there is a cluster")
    with pytest.raises(InputError, match=message):
        run([python("")], tmp_path, launcher)


# The real thing, through the command line, on a small model


def real(folder: Path, small_model: Path, *more: str) -> list[str]:
    """A verdict on one person; relative paths, as its users write."""
    return [
        "verdict",
        "--name=e",
        "--people_folder=people",
        f"--folder={folder}",
        f"--backbone={small_model}",
        f"--protections={json.dumps({'none': 'none', 'noise': 'noise', 'aspl': ASPL})}",
        f"--victims={json.dumps({'full': VICTIM})}",
        f"--conditions={json.dumps({'nothing': [], 'jpeg': JPEG75})}",
        "--generation.images=1",
        "--generation.sampling_steps=2",
        "--launcher.workers=1",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(small_model, tmp_path_factory):
    """A verdict whose worker was killed after two cells, and the same command again; in another folder than ours."""
    place = tmp_path_factory.mktemp("real")
    make_people(place / "people", "ann")
    (place / "results").mkdir()
    (place / "results" / "kill").write_text("2")
    command = real(Path("results"), small_model)
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(launch.jobs, "POLL", 0.1)
        patch.setattr(os, "sched_getaffinity", lambda _: {0})  # one thread, see conftest
        patch.setenv("KILLED_AFTER", str(place / "results" / "kill"))
        with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as killed:
            main(command)
        first = {path.parent.name: path.stat().st_mtime_ns for path in place.glob("results/e/cells/*/cell.json")}
        outputs.append(printed.getvalue())
        with redirect_stdout(io.StringIO()) as printed:
            main(command)
        outputs.append(printed.getvalue())
    return SimpleNamespace(
        place=place, root=place / "results" / "e", killed=str(killed.value), first=first, outputs=outputs
    )


CELLS = {"ann-base-0-s0-nothing-untrained-v0"} | {
    f"ann-{protection}-s0-{condition}-full-v0"
    for protection in ("none-0", "noise-8", "aspl-8")
    for condition in ("nothing", "jpeg")
}


@pytest.mark.slow
def test_a_killed_worker_is_reported_and_the_same_command_goes_on(finished):
    assert re.match(
        r"error: a job ended early \(exit code -9\): see .*/e/jobs/.*\.err, and run the same", finished.killed
    )
    assert len(finished.first) == 2
    records = {path.parent.name: path.stat().st_mtime_ns for path in finished.root.glob("cells/*/cell.json")}
    assert set(records) == CELLS
    assert all(records[name] == stamp for name, stamp in finished.first.items())  # not made again
    first, second = finished.outputs
    assert "1 cloaks and 6 victims to do, and 1 controls that are not trained, 1 at a time (local)" in first
    assert "time: known after the first one\n" in first
    assert "0 cloaks and 5 victims to do, 1 at a time (local)" in second
    (made,) = [
        json.loads(path.read_text())["seconds"] for path in finished.root.glob("cells/*none-0*nothing*/cell.json")
    ]
    assert f"time: about {duration(5 * made)}, from the median of those that are finished (a victim full" in second
    assert "cloaks" in first
    assert "1/1" in first
    assert "7/7" in second
    assert f"the page: {Path('results') / 'e' / 'index.html'}" in second


@pytest.mark.slow
def test_a_verdict_leaves_tables_a_page_and_shared_cloaks(finished):
    page = (finished.root / "index.html").read_text()
    links = re.findall(r'(?:src|href)="(cells/[^"]+)"', page)
    assert len(links) >= len(CELLS)
    assert all((finished.root / link).is_file() for link in links)
    rows = (finished.root / "table.csv").read_text().splitlines()
    assert any("aspl" in row and "jpeg" in row and "acceptance" in row for row in rows)
    assert "aspl" in (finished.root / "table.md").read_text()
    assert [path.name for path in (finished.root / "cloaks").iterdir()] == ["ann-aspl-8-s0"]
    record = json.loads((finished.root / "cloaks" / "ann-aspl-8-s0" / "done.json").read_text())
    assert record["complete"] is True
    assert record["settings"]["protection"] == ASPL
    cloaked = finished.root / "cloaks" / "ann-aspl-8-s0" / "cloaked"
    for protection, folder in (("aspl-8", cloaked), ("none-0", finished.place / "people" / "ann" / "set_B")):
        photos = finished.root / "cells" / f"ann-{protection}-s0-nothing-full-v0" / "photos"
        for name in ("0.png", "1.png"):
            assert np.array_equal(np.asarray(Image.open(photos / name)), np.asarray(Image.open(folder / name)))
    assert not list(finished.root.rglob("*.failed"))
    assert not list(finished.root.glob("cells/*/model"))
    for name in CELLS:
        assert len((finished.root / "cells" / name / "per_image.csv").read_text().splitlines()) == 1 + 2


@pytest.fixture
def copy(finished, tmp_path, monkeypatch, small_model):
    """The finished verdict in a folder of its own, its worker in this process."""
    shutil.copytree(finished.root, tmp_path / "e")
    monkeypatch.chdir(finished.place)

    def run_here(commands, *_):
        for command in commands:
            main(command[2:])

    monkeypatch.setattr(launch.tasks, "run_jobs", run_here)

    # A loader gives lists for tuples, which the type check of the tests refuses.
    named = lightning_modules.victim.reference
    tuples = lambda model, photos: named(model, [(name, pixels) for name, pixels in photos])  # noqa: E731
    monkeypatch.setattr(lightning_modules.victim, "reference", tuples)

    def again(*more):
        main(real(tmp_path, small_model, *more))

    return SimpleNamespace(root=tmp_path / "e", again=again)


@pytest.mark.slow
def test_one_deleted_cell_is_run_again_to_the_byte(copy, capsys):
    before = stamps(copy.root)
    name = "ann-aspl-8-s0-jpeg-full-v0"
    figures = (copy.root / "cells" / name / "per_image.csv").read_bytes()
    shutil.rmtree(copy.root / "cells" / name)
    copy.again()
    assert "0 cloaks and 1 victims to do" in capsys.readouterr().out
    assert (copy.root / "cells" / name / "per_image.csv").read_bytes() == figures
    after = stamps(copy.root)
    others = [{path: stamp for path, stamp in found.items() if name not in path} for found in (before, after)]
    assert others[0] == others[1]
    assert len(others[0]) < len(after)
    figures_of = {(copy.root / "cells" / cell / "per_image.csv").read_bytes() for cell in CELLS}
    assert len(figures_of) > 1  # victims differ


@pytest.mark.slow
def test_nothing_is_left_to_do(copy):
    before = stamps(copy.root)
    copy.again()
    assert stamps(copy.root) == before


@pytest.mark.slow
def test_other_settings_are_one_line(copy):
    with pytest.raises(SystemExit, match=r"^error: .* was made with other settings \(generation.seed: 0 then, 1 now\)"):
        copy.again("--generation.seed=1")


@pytest.mark.slow
def test_a_victim_with_nonsense_fails_alone(copy, capsys):
    bad = VICTIM.replace("steps 2", "steps nonsense")
    victims = f"--victims={json.dumps({'full': VICTIM, 'bad': bad})}"
    with pytest.raises(SystemExit) as failed:
        copy.again(victims, "--protections={none: none}", "--conditions={nothing: []}")
    name = "ann-none-0-s0-nothing-bad-v0"
    assert str(failed.value).startswith(
        f"error: 1 cells failed, the first: {name}: its command line is wrong (more in "
    )
    assert "nonsense" in capsys.readouterr().err
    assert (copy.root / "cells" / f"{name}.failed").is_file()
    assert not (copy.root / "cells" / name / "cell.json").exists()
    assert name in (copy.root / "index.html").read_text()


@pytest.mark.slow
def test_cell_settings_are_a_file_format(finished, small_model, monkeypatch):
    """A finished cell is recognised by these: another key would make long runs start anew."""
    monkeypatch.chdir(finished.place)
    cells = experiment_of(Path("people"), backbone=str(small_model)).resolve().cells
    settings = only(cells, protection="none").settings
    assert list(settings) == ["cloak", "victim", "condition", "seed", "generation", "defaults", "references"]
    assert list(settings["cloak"]) == ["backbone", "protection", "budget", "seed", "photos", "clean_photos"]
