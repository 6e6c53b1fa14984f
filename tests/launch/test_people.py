"""Many people: who is done and how, who failed, going on, the plan; all on the small model."""

import json
import os
import re
import shutil
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import launch.tasks
import lightning_modules.backbone_module
from antidreambooth.diffusion.reuse import kept_in_memory, remembered
from antidreambooth.files import LOCK, locked, write_json
from antidreambooth.provenance import differences
from cli import main
from launch.people.command import parser, read_people
from launch.people.folders import People
from launch.runs import cloak_photos
from lightning_modules import ASPL
from tests.conftest import ROOT, contents
from tests.helpers import make_photos

CPU = "--trainer.accelerator cpu --trainer.precision 32-true"
FLAGS = f"{CPU} --trainer.max_epochs 2 --model.pgd_steps 1 --checkpoint.every_n_epochs 1"
ASPL_FLAGS = f"{FLAGS} --model.surrogate.steps 1 --model.surrogate.learning_rate 1e-3 --model.surrogate.prior.images 4"
ODD = "Zoë {Müller} '#1', jr."
READ = ["base model", "class images"]


def test_shares_are_everything_once_and_no_job_has_every_second_task():
    tasks = [launch.tasks.Task(Path(str(place)), print) for place in range(11)]
    for jobs in (1, 2, 3, 4, 20):
        parts = [launch.tasks.part(tasks, number, jobs) for number in range(jobs)]
        assert sorted(task for part in parts for task in part) == sorted(tasks)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in (launch.tasks.part(tasks, number, 2) for number in (0, 1)):
        assert {tasks.index(task) % 2 for task in part} == {0, 1}


def test_the_seconds_are_those_of_all_starts(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("launch.runs.time.monotonic", lambda: now[0])
    done = tmp_path / "ann" / "done.json"

    def fit(words):
        going_on = "--ckpt_path=last" in words
        now[0] += 5.0 if going_on else 30.0
        write_json(done.with_name("manifest.json"), {"passes": {}})
        (done.parent / "checkpoints").mkdir(exist_ok=True)
        (done.parent / "checkpoints" / "last.ckpt").touch()
        if not going_on:
            raise SystemExit(143)

    done.parent.mkdir()
    with pytest.raises(SystemExit):
        cloak_photos(done, {"seed": 0}, "configs/aspl.yaml", {}, fit)
    now[0] += 1000.0  # in the queue
    cloak_photos(done, {"seed": 0}, "configs/aspl.yaml", {}, fit)
    assert json.loads(done.read_text())["seconds"] == 35.0
    assert not done.with_name("begun.json").exists()


def make_people(parent: Path) -> Path:
    """Ann has photos, the other one photos to protect and clean ones; what else there is is nobody."""
    make_photos(parent / "ann", 2, 0)
    make_photos(parent / ODD / "set_B", 1, 1)
    make_photos(parent / ODD / "set_A", 2, 2)
    (parent / ".cache").mkdir()
    (parent / "notes.txt").write_text("a stray file")
    return parent


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_people(tmp_path / "all people")


def watched(patch) -> list[str]:
    """Notes when a model is read and when class images are; runs jobs here, one after the other."""
    module, seen = lightning_modules.backbone_module, []
    load, images = module.load_backbone, module.class_images

    def read(source, encoder_only):
        seen.append("surrogate" if "surrogates" in source.name else "base model")
        return load(source, encoder_only)

    def draw(*args, **options):
        seen.append("class images")
        return images(*args, **options)

    def run_here(commands, launcher, logs, title, total, done):
        for command in commands:
            assert command[:3] == [sys.executable, str(ROOT / "cli.py"), "people"]
            seen.append("worker")
            main(command[2:])

    patch.setattr(module, "load_backbone", read)
    patch.setattr(module, "class_images", draw)
    patch.setattr(launch.tasks, "run_jobs", run_here)
    patch.setattr(launch.tasks, "gc", SimpleNamespace(collect=int))  # slow, and the models are small
    return seen


def words(folder: Path, out: Path, model: Path, how: str) -> list[str]:
    fixed = [f"--folder={folder}", f"--output={out}", "--launcher.workers=1"]
    return ["people", *fixed, f"--protection={how} --model.backbone {model}"]


@pytest.fixture(scope="module")
def done(small_model, tmp_path_factory):
    """Both people's photos, cloaked by one worker."""
    place = tmp_path_factory.mktemp("people")
    folder, out = make_people(place / "all people"), place / "out"
    with pytest.MonkeyPatch.context() as patch:
        seen = watched(patch)
        main(words(folder, out, small_model, f"configs/aspl.yaml {ASPL_FLAGS}"))
    return SimpleNamespace(out=out, seen=seen)


@pytest.fixture
def out(done, tmp_path) -> Path:
    """A copy of that."""
    return Path(shutil.copytree(done.out, tmp_path / "out"))


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    return watched(monkeypatch)


@pytest.fixture
def ask(folder, tmp_path, small_model, seen):
    """The command; gives what its jobs read."""

    def run(*more, how=f"configs/aspl.yaml {ASPL_FLAGS}", out="out"):
        seen.clear()
        main([*words(folder, tmp_path / out, small_model, how), *more])
        return [*seen]

    return run


@pytest.fixture
def failed(ask):
    """The same where it ends with an error; gives the message."""

    def run(*more, **options):
        with pytest.raises(SystemExit) as stopped:
            ask(*more, **options)
        line, hint = str(stopped.value).split("\n")
        assert hint == "(ANTIDREAMBOOTH_DEBUG=1 shows where)"
        return line

    return run


def results(root: Path, name: str = "") -> dict[str, object]:
    """What runs are for: cloaked photos, manifests, comparisons."""
    wanted = re.compile(rf"{re.escape(name)}.*(cloaked/.*|manifest.json|comparison.png)$")
    return {path: content for path, content in contents(root).items() if wanted.match(path)}


def summary(root: Path) -> dict[str, dict]:
    lines = map(json.loads, (root / "summary.jsonl").read_text(encoding="utf-8").splitlines())
    return {line.pop("person"): line for line in lines}


def test_a_second_command_at_the_same_time_is_told(failed, seen, tmp_path):
    with locked(tmp_path / "out", "wait"):
        assert "another run is at work in" in (line := failed())
        assert "--output" in line
    assert seen == []


def test_cloaked_photos_are_no_originals(failed, out, folder):
    shutil.rmtree(folder / "ann")
    shutil.copytree(out / "ann", folder / "ann", ignore=shutil.ignore_patterns("*.json.lock", "checkpoints"))
    (folder / "ann" / "cloaked").rename(folder / "ann" / "set_B")
    assert re.search("1 of 2 people failed, the first: ann: .*set_B/0.png is no original", failed(out="new"))


def test_what_an_earlier_start_left_is_replaced_and_what_another_run_made_is_not(ask, failed, out):
    """The first was killed before its first checkpoint; the second never was a run of this command."""
    for name in ("ann", ODD):
        (out / name / "done.json").unlink()
        shutil.rmtree(out / name / "checkpoints", ignore_errors=True)
    (out / "ann" / "begun.json").write_text('{"settings": {}, "seconds": 0.0}')
    before = results(out)
    assert re.search(rf"1 of 2 people failed, the first: {re.escape(ODD)}: .*holds a finished run", failed())
    assert results(out) == before
    assert (out / "ann" / "done.json").is_file()


# What comes out


def test_everybody_has_a_run_of_their_own(done):
    assert {path.name for path in done.out.iterdir()} == {"ann", ODD, "summary.jsonl", "table.md", LOCK}
    manifest = json.loads((done.out / ODD / "manifest.json").read_text())
    assert [photo["source"] for photo in manifest["photos"]] == ["0.png"]
    assert list(manifest["settings"]["clean_photos"]) == ["0.png", "1.png"]
    assert len(list((done.out / "ann" / "cloaked").iterdir())) == 2
    for name in ("ann", ODD):
        assert not (done.out / name / "checkpoints" / "last.ckpt").exists()
        assert not (done.out / name / "begun.json").exists()


def test_the_summary_is_for_machines_and_the_table_for_people(done):
    lines = summary(done.out)
    assert set(lines) == {"ann", ODD}
    for line in lines.values():
        assert list(line) == ["state", "seconds", "error"]
        assert line["seconds"] > 0
        assert (line["state"], line["error"]) == ("done", None)
    table = (done.out / "table.md").read_text(encoding="utf-8")
    assert table.startswith("2 people: 2 done, 0 waiting, 0 failed.")
    assert re.search(r"^\| ann \| done \| [\d.]+ \| \d\d\.\d \|  \|$", table, re.M)


def test_the_second_time_nothing_runs(ask, out, capsys):
    before = contents(out)
    assert ask() == []
    assert contents(out) == before
    assert "people to do" not in capsys.readouterr().out


# Going on


def test_who_fails_is_named_and_tried_again(ask, failed, folder, out, capsys):
    bad, before = folder / "bob" / "bad.jpg", results(out)
    bad.parent.mkdir()
    bad.write_text("no picture at all")
    (folder / "empty").mkdir()
    message = failed()
    assert message.startswith("error: 2 of 4 people failed, the first: bob: bad.jpg cannot be decoded")
    assert message.endswith(f"(more in {out / 'jobs'}); run the same command again to retry")
    assert "2 of 4 people to do, 1 at a time" in capsys.readouterr().out
    lines = summary(out)
    states = {name: line["state"] for name, line in lines.items()}
    assert states == {"ann": "done", ODD: "done", "bob": "failed", "empty": "failed"}
    assert "holds no photo" in lines["empty"]["error"]
    assert lines["bob"]["seconds"] is None
    table = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[0] == "4 people: 2 done, 0 waiting, 2 failed."
    assert table[4].startswith("| bob | failed |  |  | bad.jpg cannot be decoded")
    bad.unlink()
    make_photos(folder / "empty" / "set_B", 1, 5)
    Image.open(folder / "ann" / "0.png").save(folder / "bob" / "good.png")
    ask()
    assert {line["state"] for line in summary(out).values()} == {"done"}
    assert results(out).items() >= before.items()
    assert not list(out.glob("*.failed"))


def test_other_settings_are_the_error_of_whom_they_concern(failed, folder, out, seen):
    before = results(out)
    Image.open(folder / "ann" / "1.png").save(folder / "ann" / "2.png")
    message = failed()
    assert "error: 1 of 2 people failed, the first: ann: " in message
    assert re.search(
        r"ann was made with other settings \(photos\.2\.png: None then, \w{64} now\): delete that", message
    )
    assert "retry" not in message  # it would not help
    assert {name: line["state"] for name, line in summary(out).items()} == {"ann": "failed", ODD: "done"}
    assert "2 of 2 people failed" in failed("--seed=1")
    assert "--model.budget 4" in failed(how=f"configs/aspl.yaml {ASPL_FLAGS} --model.budget 4")
    assert seen == []
    assert results(out) == before


def test_both_advices_are_given_where_both_help(failed, folder, out):
    Image.open(folder / "ann" / "1.png").save(folder / "ann" / "2.png")
    (folder / "bob").mkdir()
    (folder / "bob" / "bad.jpg").write_text("no picture at all")
    message = failed()
    assert "error: 2 of 3 people failed, the first: ann: " in message
    assert "delete that folder" in message
    assert message.endswith("; run the same command again to retry")


def test_a_config_that_was_edited_is_other_settings(folder, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text((ROOT / "configs" / "aspl.yaml").read_text())
    job = People(str(folder), protection=str(config))
    before = job.settings("ann")
    config.write_text("# only a remark\n" + config.read_text())
    assert job.settings("ann") == before
    config.write_text(config.read_text().replace("max_epochs: 50", "max_epochs: 40"))
    assert differences(before, job.settings("ann")) == ["config.trainer.max_epochs: 50 then, 40 now"]


def test_going_on_equals_not_stopping(ask, failed, done, tmp_path, monkeypatch, noted):
    step, disturbance = ASPL.training_step, signal.getsignal(signal.SIGINT)

    def stopped(module, batch, number):
        if module.current_epoch == 1:
            raise KeyboardInterrupt
        return step(module, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(ASPL, "training_step", stopped)
        with pytest.raises(SystemExit, match=r"^1$"):  # as a worker that was told to stop ends
            ask("--names=[ann]")
    signal.signal(signal.SIGINT, disturbance)  # Lightning ignores it from then on
    out = tmp_path / "out"
    checkpoint = out / "ann" / "checkpoints" / "last.ckpt"
    assert checkpoint.is_file()
    assert summary(out) == {"ann": {"state": "waiting", "seconds": None, "error": None}}
    assert "ann was made with other settings (seed: 0 then, 1 now)" in failed("--names=[ann]", "--seed=1")
    rounds = noted(ASPL)
    ask("--names=[ann]")
    assert rounds == [1]
    assert results(out) == results(done.out, "ann")
    assert not checkpoint.exists()
    assert summary(out)["ann"]["state"] == "done"


# Workers


def test_a_worker_reads_the_base_model_once_and_that_changes_nothing(ask, done, tmp_path, monkeypatch):
    assert done.seen == ["worker", *READ]
    monkeypatch.setattr(launch.tasks, "kept_in_memory", nullcontext)
    assert ask() == ["worker", *READ, *READ]
    assert results(tmp_path / "out") == results(done.out)


@pytest.mark.slow
def test_two_workers_give_the_same_as_one(ask, done, tmp_path):
    assert ask("--launcher.workers=2") == ["worker", *READ, "worker", *READ]
    assert results(tmp_path / "out") == results(done.out)


def test_there_are_no_more_workers_than_people(ask, out, folder):
    shutil.rmtree(out / "ann")
    assert ask("--launcher.workers=5") == ["worker", *READ]


@pytest.mark.slow
def test_everybody_has_a_surrogate_of_their_own(ask, tmp_path, monkeypatch):
    """FSMG's: trained on a copy of the base model, and not kept, neither in memory nor on disk."""
    victim = f"configs/dreambooth.yaml {CPU} --model.training.steps 1 --model.training.prior.weight 0"
    how = f'configs/fsmg.yaml {FLAGS} --model.surrogate "{victim}"'
    assert ask(how=how, out="once") == ["worker", "base model", "surrogate", "surrogate"]
    assert not list((tmp_path / "once").glob("*/surrogates"))
    passes = json.loads((tmp_path / "once" / "ann" / "done.json").read_text())["passes"]
    assert passes["denoiser"] == 2 * 2 + 2  # two rounds on two photos, a step on two
    monkeypatch.setattr(launch.tasks, "kept_in_memory", nullcontext)
    assert ask("--names=[ann]", how=how, out="each") == ["worker", "base model", "surrogate"]
    assert results(tmp_path / "each") == results(tmp_path / "once", "ann")


def test_what_is_remembered_is_copied():
    made = []

    def make():
        made.append(1)
        return [1]

    assert remembered(lambda: pytest.fail("no key is needed"), make) == [1]
    with kept_in_memory():
        first, second = (remembered(lambda: "a", make) for _ in range(2))
        assert first is not second
        first.append(2)
        assert remembered(lambda: "a", make) == [1]
        assert len(made) == 2
    assert remembered(lambda: "a", make) == [1]
    assert len(made) == 3


# The plan


def test_a_dry_run_says_what_would_be_and_writes_nothing(ask, failed, folder, out, capsys):
    (folder / "bob").mkdir()
    (folder / "bob" / "bad.jpg").write_text("no picture at all")
    failed()
    (folder / "empty").mkdir()
    shutil.rmtree(out / ODD)
    shutil.copytree(out / "ann", out / "eve")
    make_photos(folder / "eve", 1, 0)
    for name, seconds in (("ann", 90.0), ("eve", 4000.0)):
        record = json.loads((out / name / "done.json").read_text())
        (out / name / "done.json").write_text(json.dumps({**record, "seconds": seconds}))
    before = contents(out)
    capsys.readouterr()
    assert ask("--dry_run", "--launcher.workers=2") == []
    assert contents(out) == before
    text = capsys.readouterr().out
    for line in (
        r"ann +2 photos, done",
        r"bob +fails: bad.jpg cannot be decoded.*",
        r"empty +fails: .* holds no photo.*",
        rf"{re.escape(ODD)} +1 photos, to do",
        r"eve +1 photos, failed: .*eve was made with other settings.*",
        r"5 people: 1 done, 1 done with other settings, 3 to do \(1 of them failed before\), 1 photos, "
        r"1 at a time \(local\)",
        r"time: about 90 s, from the median of those that are finished \(a person 90 s\)",
        r"disk: at most [\d.]+ MB to stay in .*/out, and on the way [\d.]+ MB for weights, "
        r"and [\d.]+ MB for class images in .*/class-images where they are not there; [\d.]+ .B are free",
    ):
        assert re.search(f"^{line}$", text, re.M), line


def test_the_plan_counts_photos_at_their_own_size_unless_squares_come_back(ask, folder, capsys):
    def megabytes(*flags):
        ask("--dry_run", "--names=[ann]", how=" ".join(["configs/aspl.yaml", CPU, *flags]))
        (stays,) = re.findall(r"at most ([\d.]+) MB to stay", capsys.readouterr().out)
        return float(stays)

    small, squares = megabytes(), megabytes("--model.parametrisation Square")
    Image.new("RGB", (1000, 700)).save(folder / "ann" / "large.png")
    assert megabytes() == pytest.approx(small + 2.1, abs=0.11)
    assert megabytes("--model.parametrisation Square") == pytest.approx(squares, abs=0.11)


@pytest.mark.parametrize("method", ["aspl", "fsmg", "advdm", "e-aspl"])
def test_the_plan_knows_the_methods(ask, method, small_model, tmp_path, capsys):
    several = f" --model.ensemble.backbones [{small_model}]" if method.startswith("e-") else ""
    ask("--dry_run", "--names=[ann]", how=f"configs/{method}.yaml {CPU}{several}")
    text = capsys.readouterr().out
    (weights,) = map(float, re.findall(r"on the way ([\d.]+) MB for weights", text))
    assert "time: known after the first one" in text
    assert (weights > 0) == (method != "advdm")
    assert ("class images" in text) == (method != "advdm")
    assert not (tmp_path / "out").exists()


# What cannot work


@pytest.mark.parametrize(
    ("more", "how", "message"),
    [
        (["--names=[carol]"], None, "holds no folder 'carol': check --names"),
        (["--folder=nowhere"], None, "nowhere is no folder: --folder holds"),
        (["--folder={folder}/ann"], None, "holds nobody: each folder in it is a person"),
        (["--output={folder}/out"], None, "lies in --folder, among the people"),
        ([], "configs/nowhere.yaml", "there is no config file 'configs/nowhere.yaml'"),
        ([], "", "there is no config file"),
        ([], "configs/dreambooth.yaml", "the config file of a cloaking run"),
        ([], "configs/aspl.yaml --data.photos=x", "leave out --data.photos=x"),
        ([], "configs/aspl.yaml --trainer.default_root_dir x", "leave out --trainer.default_root_dir"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(failed, folder, tmp_path, more, how, message):
    filled = [flag.format(folder=folder) for flag in more]
    assert message in (failed(*filled) if how is None else failed(*filled, how=how))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["jobs", "table.md", "ann.failed", "new\nline", "b: c", "b:", os.fsdecode(b"b\xeb")])
def test_names_that_cannot_be_are_refused(failed, folder, name):
    (folder / name).mkdir()
    assert "rename that folder" in failed()


def test_a_misspelt_flag_of_the_protection_stops_at_once(ask, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        ask(how="configs/aspl.yaml --model.buget 4")
    assert stopped.value.code == 2
    assert "buget" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_terms_of_a_model_are_shown(folder, tmp_path, capsys):
    main(["people", f"--folder={folder}", f"--output={tmp_path / 'out'}", "--dry_run"])
    assert "non-commercial research" in capsys.readouterr().out.splitlines()[0]


def test_the_shipped_config_says_the_defaults_aloud(folder):
    options = parser().parse_args([f"--config={ROOT / 'configs' / 'people.yaml'}", f"--folder={folder}"])
    assert read_people(options) == People(str(folder))


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["people", "--help"])
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for name in ("folder", "output", "protection", "names", "seed", "dry_run", "launcher.workers"):
        option = re.search(rf" --{re.escape(name)}\b(.+?)\((?:type|required|default)", text)
        assert option, name
        assert len(re.sub(r"[A-Z_+,]{3,}|--\S+", "", option[1]).strip()) > 10, f"--{name} is not explained: {option[1]}"
