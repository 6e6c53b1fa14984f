"""The command line, on every shipped config: what it writes, how it is stopped, what it refuses and explains."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import Namespace
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import antidreambooth
from antidreambooth.attack.methods import METHODS, Settings
from antidreambooth.attack.objectives import LikelihoodRatio
from antidreambooth.attack.steps import Momentum, NormalizedL2
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.execution import Execution
from antidreambooth.diffusion.precision import usual_device
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.lora import LoRA
from antidreambooth.provenance import slug
from cli import device_of, main, parsed, show
from tests.conftest import ROOT
from tests.helpers import denoisers, files, manifest, pixels, refused, start, wait_for

OTHERS = {  # have tests of their own
    *("dreambooth", "dreambooth-lora", "textual-inversion", "pretraining", "pretraining-flow", "people")
}
QUICK = ("aspl", "fsmg")  # a surrogate that learns, and one that does not
CONFIGS = sorted({path.stem for path in (ROOT / "configs").glob("*.yaml")} - OTHERS)
IN_BF16 = ("e-aspl", "metacloak")  # are compared with a notebook in bf16, too
TRAINING = DreamBooth(learning_rate=1e-3, prior=PriorPreservation(images=4))  # as `command` says by flags
EACH = [pytest.param(config, marks=[] if config in QUICK else pytest.mark.slow) for config in CONFIGS]


def test_every_method_has_its_config():
    assert set(CONFIGS) == set(METHODS)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_parses(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={ROOT / 'configs' / config}.yaml", "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seed_everything"] == 0
    method, model = METHODS[config], printed["model"]
    assert printed["trainer"]["max_epochs"] == method.rounds
    assert model["init_args"]["pgd_steps"] == method.pgd_steps
    assert model["init_args"]["draws"] == 1
    assert model["class_path"].endswith({"alternating": "ASPL", "pool": "MetaCloak"}.get(method.surrogate, "FSMG"))
    adaptation = model["init_args"].get("adaptation") or {"class_path": "Full"}
    assert adaptation["class_path"].endswith(type(method.adaptation()).__name__)
    assert (method.surrogate in ("untouched", "none")) == (model["init_args"]["surrogate"] is None)
    assert method.several == bool(model["init_args"]["ensemble"]["backbones"])
    objective = model["init_args"]["objective"] or {"class_path": "Denoising"}
    assert objective["class_path"].endswith(type(method.objective()).__name__)
    if isinstance(ratio := method.objective(), LikelihoodRatio):
        assert objective["init_args"]["decoy"] == ratio.decoy
    rule, wanted = model["init_args"]["step_rule"] or {"class_path": "Sign", "init_args": {}}, method.step_rule()
    assert rule["class_path"].endswith(type(wanted).__name__)
    assert all(value == getattr(wanted, name) for name, value in rule["init_args"].items())


@pytest.fixture
def notebook(small_model, small_v_model, photos, tmp_path):
    """Asks a notebook for the pixels that a run has written."""

    def compare(config: str, rounds: int) -> None:
        method, backbones = METHODS[config], [str(small_model), str(small_v_model)][: 1 + METHODS[config].several]
        surrogates = tmp_path / "out" / "surrogates"
        if method.surrogate == "trained":
            backbones = [str(surrogates / slug(name) / "model") for name in backbones]
        nobody = LikelihoodRatio(str(surrogates / f"{slug(str(small_model))}-nobody" / "model"))
        training = replace(TRAINING, steps=5) if method.surrogate == "pool" else TRAINING
        settings = Settings(training=training, objective=nobody if config in ("decoy", "ours") else None)
        images, (first, *others) = [Image.open(path) for path in sorted(photos.iterdir())], backbones
        cloaked = antidreambooth.cloak(
            images, first, config, ensemble=others, settings=settings, rounds=rounds, device="cpu"
        )
        for picture, path in zip(cloaked, sorted((tmp_path / "out" / "cloaked").iterdir()), strict=True):
            assert np.array_equal(np.asarray(picture), pixels(path)), path.name

    return compare


@pytest.mark.parametrize("config", EACH)
def test_every_config_cloaks(command, notebook, config, tmp_path, capsys):
    learning = METHODS[config].surrogate == "alternating"
    rounds = 25 if config in QUICK else 3  # a grid of samples is drawn every 25 rounds
    main(command(config=config, rounds=rounds))
    out = tmp_path / "out"
    record = manifest(out)
    assert record["complete"] is True
    assert record["seed"] == 0
    assert record["settings"]["model"]["budget"] == 8
    assert [photo["source"] for photo in record["photos"]] == ["a.png", "b.jpg", "c.webp"]
    for photo in record["photos"]:
        assert pixels(out / photo["cloaked"]).shape == (24, 20, 3)
        assert 0 < photo["largest_difference"] <= 8
    assert pixels(out / "comparison.png").shape[1] > 3 * 16
    assert (out / "checkpoints" / "last.ckpt").is_file()
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    scalars = {"surrogate/clean_loss", "surrogate/cloaked_loss", "pgd/objective", "perturbation/largest"}
    assert scalars <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("pgd/objective")] == list(range(1, rounds + 1))
    trained = 5 * 2 * 2 if METHODS[config].surrogate == "pool" else 0  # images in all, once
    assert (max(event.value for event in events.Scalars("surrogate/clean_loss")) > 0) == (learning or trained > 0)
    if learning and rounds == 25:
        assert (out / "samples" / "round-025.png").is_file()
        assert "samples" in events.Tags()["images"]
    assert f"{rounds}/{rounds}" in capsys.readouterr().out  # the bar counts rounds
    models = 2 if METHODS[config].several else 1
    steps = denoisers(METHODS[config]) * METHODS[config].pgd_steps * 3  # images a round, of each model
    steps += 6 * 2 if learning else 0
    assert record["passes"]["denoiser"] == rounds * models * steps + trained
    if config not in QUICK:  # which have a test of their own
        notebook(config, rounds)


@pytest.mark.parametrize("config", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in IN_BF16)])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_notebook_gets_the_same_pixels(command, notebook, config, bf16, tmp_path, monkeypatch):
    monkeypatch.setattr("antidreambooth.api.computes_in_bf16", lambda device: bf16)  # as the command's precision
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # class images are drawn by both
    main(command(f"--trainer.precision={'bf16-mixed' if bf16 else '32-true'}", config=config, rounds=2))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    notebook(config, 2)


LORA = ["--model.adaptation=LoRA", "--model.adaptation.rank=2"]
L2 = ["--model.step_rule=NormalizedL2"]
FALLING = ["--model.step_rule.schedule=linear", "--model.step_rule.random_start=true"]


@pytest.mark.parametrize(
    ("config", "flags", "settings"),
    [
        ("aspl", LORA, {"adaptation": LoRA(rank=2)}),
        ("aspl", ["--model.micro_batch=1"], {"micro_batch": 1}),
        ("aspl", ["--model.draws=2"], {"draws": 2}),
        (
            "aspl",
            ["--model.surrogate.gradient_checkpointing=true", "--model.surrogate.instance_prompt=a photo of t@t man"],
            {"training": replace(TRAINING, gradient_checkpointing=True, instance_prompt="a photo of t@t man")},
        ),
        ("e-aspl", ["--model.ensemble.offload=true"], {"offload": True}),
        (
            "aspl",
            ["--model.execution.decoder_rests=true"],
            {"execution": Execution(decoder_rests=True)},
        ),
        ("advdm", ["--model.prompt=a photo of an old man"], {"prompt": "a photo of an old man"}),
        ("advdm", [*L2, "--model.pgd_steps=3"], {"step_rule": NormalizedL2(), "pgd_steps": 3}),
        (
            "aspl",
            ["--model.step_rule=Momentum", "--model.step_rule.decay=0.9", *FALLING],
            {"step_rule": Momentum(0.9, schedule="linear", random_start=True)},
        ),
    ],
    ids=["lora", "micro-batch", "draws", "checkpointing-prompt", "offload", "execution", "prompt", "l2", "momentum"],
)
def test_a_notebook_sets_what_the_command_line_sets(
    command, config, flags, settings, small_model, small_v_model, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr("antidreambooth.api.computes_in_bf16", lambda device: False)  # as the command's precision
    main(command(*flags, config=config))
    backbones = [str(small_model), str(small_v_model)][: 1 + METHODS[config].several]
    images = [Image.open(path) for path in sorted(photos.iterdir())]
    plain, cloaked = (
        antidreambooth.cloak(
            images, backbones[0], config, ensemble=backbones[1:], settings=chosen, rounds=2, device="cpu"
        )
        for chosen in (Settings(training=TRAINING), Settings(**{"training": TRAINING, **settings}))
    )
    written = [pixels(path) for path in sorted((tmp_path / "out" / "cloaked").iterdir())]
    for picture, wanted in zip(cloaked, written, strict=True):
        assert np.array_equal(np.asarray(picture), wanted)
    if not {"micro_batch", "offload", "execution"} & {*settings}:  # these change memory, and rounding at most
        assert any(not np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(plain, cloaked, strict=True))


@pytest.mark.parametrize(
    ("able", "accelerator", "precision"),
    [(False, "cpu", "32-true"), (True, "cpu", "bf16-mixed"), (False, "auto", "32-true")],
)
def test_the_precision_is_what_the_device_that_runs_can(
    command, tmp_path, monkeypatch, capsys, able, accelerator, precision
):
    asked: list[torch.device] = []

    def computes_in_bf16(device):
        asked.append(device)
        return able

    monkeypatch.setattr("cli.computes_in_bf16", computes_in_bf16)
    show.cache_clear()
    words = [word for word in command(rounds=1) if not word.startswith(("--trainer.precision", "--trainer.accel"))]
    main([*words, f"--trainer.accelerator={accelerator}"])
    assert asked == [usual_device() if accelerator == "auto" else torch.device("cpu")]
    assert manifest(tmp_path / "out")["settings"]["precision"] == precision
    assert f"precision {precision}: {asked[0]} {'computes' if able else 'does not compute'} in bfloat16" in (
        capsys.readouterr().out.splitlines()
    )


@pytest.mark.parametrize(
    ("accelerator", "devices", "there", "expected"),
    [
        ("auto", "auto", "cuda", "cuda"),
        ("gpu", 1, "cuda", "cuda"),
        ("cuda", [2, 3], "cuda", "cuda:2"),
        ("cpu", 2, "cuda", "cpu"),
        ("auto", "auto", "mps", "mps"),
        ("gpu", 1, "mps", "mps"),
        ("auto", "auto", "cpu", "cpu"),
    ],
)
def test_the_device_is_the_trainers_not_the_machines(monkeypatch, accelerator, devices, there, expected):
    monkeypatch.setattr("cli.usual_device", lambda: torch.device(there))
    assert device_of(Namespace(accelerator=accelerator, devices=devices)) == torch.device(expected)


def test_other_systems_have_fewer_signals_and_no_affinity():
    """Windows knows neither SIGUSR1 nor SIGUSR2, and macOS, too, does not say which cores a process may use."""
    code = (
        "import os, signal\n"
        "del signal.SIGUSR1, signal.SIGUSR2, os.sched_getaffinity\n"
        "import cli\n"
        "from launch.waiting import usable_cores\n"
        "from lightning_modules.running.preemption import SIGNALS\n"
        "assert SIGNALS == [signal.SIGTERM] and len(usable_cores()) == os.cpu_count()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_parsing_gives_all_settings_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs" / "aspl.yaml"
    settings = parsed(["fit", f"--config={config}", "--model.budget=4", "--seed_everything=3", "--ckpt_path=last"])
    model = settings.model.init_args
    assert (model.budget, model.pgd_steps, model.surrogate.prior.images) == (4.0, 6, 200)
    assert (settings.trainer.max_epochs, settings.seed_everything, settings.ckpt_path) == (50, 3, "last")
    assert [entry.class_path for entry in settings.trainer.callbacks][1] == "callbacks.CloakedPhotos"
    assert "PL_GLOBAL_SEED" not in os.environ
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as stopped:
        parsed(["fit", f"--config={config}", "--model.buget=4"])
    assert stopped.value.code == 2
    assert "buget" in capsys.readouterr().err


def test_photos_so_far(command, tmp_path):
    config = tmp_path / "often.yaml"
    often = {"class_path": "CloakedPhotos", "init_args": {"every_n_epochs": 1}}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [often]}}))
    main(command(f"--config={config}", "--model.parametrisation=Square"))
    first, second = (tmp_path / "out" / "progress" / f"round-00{n}" / "a.png" for n in (1, 2))
    assert first.read_bytes() != second.read_bytes()
    assert second.read_bytes() == (tmp_path / "out" / "cloaked" / "a.png").read_bytes()


def test_twice_gives_the_same_files_and_another_seed_does_not(command, tmp_path):
    main(command(out="one"))
    main(command(out="two"))
    main(command("--seed_everything=1", out="three"))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert files(tmp_path / "one")["a.png"] != files(tmp_path / "three")["a.png"]


def test_clean_photos_are_the_reference(command, photos, tmp_path):
    clean = tmp_path / "clean"
    clean.mkdir()
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(clean / "other.png")
    main(command(out="self"))
    main(command(f"--data.clean_photos={clean}", out="other"))
    assert files(tmp_path / "self")["a.png"] != files(tmp_path / "other")["a.png"]
    assert list(manifest(tmp_path / "other")["settings"]["clean_photos"]) == ["other.png"]


def test_the_resolution_is_the_models_unless_given(command, tmp_path):
    main(command("--model.resolution=32", "--model.parametrisation=Square", rounds=1))
    assert pixels(tmp_path / "out" / "cloaked" / "a.png").shape == (32, 32, 3)


@pytest.mark.slow
def test_ctrl_c_writes_what_there_is(command, tmp_path):
    process = start(command(rounds=10_000))
    wait_for((tmp_path / "out" / "checkpoints" / "last.ckpt").exists, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in output
    record = manifest(tmp_path / "out")
    assert record["complete"] is False
    assert 0 < record["rounds"] < 10_000
    assert all((tmp_path / "out" / photo["cloaked"]).is_file() for photo in record["photos"])


@pytest.mark.parametrize("content", [b"", b"no picture at all", None], ids=["empty", "text", "truncated"])
def test_a_bad_photo_is_named_before_a_model_is_loaded(command, photos, monkeypatch, content):
    if content is None:
        content = (photos / "b.jpg").read_bytes()[:-200]
    (photos / "bad.jpg").write_bytes(content)
    monkeypatch.setattr("lightning_modules.backbone_module.load_backbone", lambda *_: pytest.fail("a model was loaded"))
    refused(command(), "bad.jpg")


@pytest.mark.parametrize(("name", "fix"), [("nowhere", "does not exist"), ("empty", "holds no photo")])
def test_a_bad_folder_is_named(command, tmp_path, name, fix):
    (tmp_path / "empty").mkdir()
    refused(command(f"--data.photos={tmp_path / name}"), fix)
    refused(command(f"--data.clean_photos={tmp_path / name}"), fix)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--trainer.precision=bf16-true", "keeps fp32 weights"),
        ("--trainer.devices=0", "'0'"),
        ("--trainer.strategy=no_such", "--trainer.strategy is auto (one device), ddp"),
        ("--model.budget=0", "8-bit steps"),
        ("--model.backbone=./nowhere", "neither a folder"),
    ],
)
def test_impossible_settings_end_in_one_line(command, flag, message):
    refused(command(flag), message)


def test_a_misspelt_flag_stops_at_once(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command("--model.buget=4"))
    assert stopped.value.code == 2
    assert "buget" in capsys.readouterr().err


def test_another_persons_results_are_not_mixed_in(command, photos, tmp_path):
    main(command(rounds=1))
    (photos / "a.png").rename(photos / "z.png")
    refused(command(rounds=1), "holds a finished run (1 round) of other photos")


def test_a_folder_that_cannot_be_written_is_found_first(command, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file where the folder should be")
    monkeypatch.setattr("lightning_modules.backbone_module.load_backbone", lambda *_: pytest.fail("a model was loaded"))
    refused(command(), str(tmp_path / "out"), "cannot be written: File exists")


def test_a_full_disk_is_found_first(command, tmp_path, monkeypatch):
    main(command())
    before = files(tmp_path / "out")
    monkeypatch.setattr("callbacks.disk_space.shutil.disk_usage", lambda _: FullDisk)
    refused(command("--model.budget=4", "--overwrite"), "has 0 MiB free")
    assert files(tmp_path / "out") == before


class FullDisk:
    """A disk with nothing left."""

    free = 0


def test_a_disk_that_fills_up_loses_nothing(command, tmp_path, monkeypatch):
    main(command())
    before, checkpoint = files(tmp_path / "out"), tmp_path / "out" / "checkpoints" / "last.ckpt"
    saved = checkpoint.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_modules.running.atomic_checkpoint.os.fsync", full)
    refused(command("--model.budget=4", "--checkpoint.every_n_epochs=1", "--overwrite"), "No space left")
    assert files(tmp_path / "out") == before
    assert checkpoint.read_bytes() == saved
    assert not list(checkpoint.parent.glob(".*"))


def test_a_models_terms_come_first_and_once(command, small_model, tmp_path, capsys):
    folder = shutil.copytree(small_model, tmp_path / "model")
    replace(Defaults(), notice="for research only").write(folder)
    show.cache_clear()  # other tests of this process have shown them
    main(command(f"--model.backbone={folder}", rounds=1))
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "for research only"
    assert printed.count("for research only") == 1
    main(command(f"--model.backbone={folder}", rounds=1, out="again"))
    assert "for research only" not in capsys.readouterr().out


def test_a_class_in_the_working_directory_is_found(tmp_path):
    """Wherever cli.py is; in a process of its own, as pytest adds folders to the path itself."""
    lines = ["from antidreambooth.attack.objectives import Denoising", "class Mine(Denoising):", "    pass"]
    (tmp_path / "own_objective.py").write_text("\n".join(lines))
    flags = ["--model=ASPL", "--data=Protection", "--model.objective=own_objective.Mine", "--print_config"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "fit", *flags], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["init_args"]["objective"]["class_path"] == "own_objective.Mine"


def test_flags_explain_themselves(capsys):
    for arguments in (["fit", "--model.help", "ASPL"], ["fit", "--data.help", "Protection"]):
        with pytest.raises(SystemExit):
            main(arguments)
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "largest change of any pixel",
        "PGD steps in a round",
        "of AdamW",
        "names the person",
        "single file",
    ):
        assert words in text


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=["alone", "help", "h"])
def test_the_command_alone_shows_each_command_with_an_example(words, capsys):
    show.cache_clear()
    main(words)
    shown = capsys.readouterr().out
    for name in ("fit", "test", "people", "verdict", "fragility"):
        assert f"      python cli.py {name} -" in shown
    assert len(shown.splitlines()) < 25


@pytest.mark.parametrize("name", ["fit", "test", "people", "verdict", "fragility"])
def test_a_commands_help_starts_with_examples(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    head = capsys.readouterr().out.splitlines()[:12]
    assert head[0].startswith(f"usage: python cli.py {name} ")
    examples = [line for line in head if line.startswith(f"  python cli.py {name} ")]
    assert examples
    for example in examples:  # every file that is named is there
        for config in re.findall(r"configs/[\w/-]+\.yaml", example):
            assert (ROOT / config).is_file(), config


def test_a_command_that_is_not_there_is_named():
    refused(["fitt"], "'fitt': choose fit, test, people, verdict, fragility")
