"""The command line, on every shipped config: what it writes, how it stops and goes on, what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from diffusers import ModelMixin
from jsonargparse import Namespace
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextModel

import antidreambooth
from antidreambooth.attack.methods import METHODS, Settings
from antidreambooth.attack.objectives import LikelihoodRatio
from antidreambooth.attack.steps import Momentum, NormalizedL2
from antidreambooth.attack.surrogates import Offloaded
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.execution import Execution
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import usual_device
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.lora import LoRA
from antidreambooth.provenance import slug
from cli import device_of, main, parsed, show
from lightning_modules.cloaking import Cloaking
from tests.conftest import ROOT, SURROGATE, contents
from tests.helpers import denoisers, files, manifest, pixels, refused, start, wait_for

OTHERS = {  # have tests of their own
    *("dreambooth", "dreambooth-lora", "textual-inversion", "pretraining", "pretraining-flow", "people")
}
QUICK = ("aspl", "fsmg")  # a surrogate that learns, and one that does not
RESUMED = ("advdm", "aspl", "decoy", "e-aspl", "fsmg", "metacloak", "pid", "simac")  # of each kind of state one
CONFIGS = sorted({path.stem for path in (ROOT / "configs").glob("*.yaml")} - OTHERS)
OWN = {"perturbation", "memory", "passes"}  # of a checkpoint
TRAINING = DreamBooth(learning_rate=1e-3, prior=PriorPreservation(images=4))  # as `command` says by flags
RATIO = "--model.objective={class_path: LikelihoodRatio, init_args: {decoy: %s}}"
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
    assert model["init_args"]["draws"] == method.draws
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


@pytest.mark.parametrize("config", EACH)
def test_every_config_cloaks(command, config, photos, tmp_path, capsys):
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


@pytest.mark.parametrize(
    ("config", "bf16"),
    [
        pytest.param(
            config, bf16, id=f"{config}-{'bf16' if bf16 else 'fp32'}", marks=[] if config in QUICK else pytest.mark.slow
        )
        for config in CONFIGS
        for bf16 in ([False, True] if config in (*QUICK, "e-aspl", "metacloak") else [False])
    ],
)
def test_a_notebook_gets_the_same_pixels(
    command, config, bf16, small_model, small_v_model, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr("antidreambooth.api.computes_in_bf16", lambda device: bf16)  # as the command's precision
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # class images are drawn by both
    main(command(f"--trainer.precision={'bf16-mixed' if bf16 else '32-true'}", config=config, rounds=2))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    method, backbones = METHODS[config], [str(small_model), str(small_v_model)][: 1 + METHODS[config].several]
    if method.surrogate == "trained":
        backbones = [str(tmp_path / "out" / "surrogates" / slug(name) / "model") for name in backbones]
    shutil.copytree(tmp_path / "out" / "cloaked", tmp_path / "wanted")
    nobody = tmp_path / "out" / "surrogates" / f"{slug(str(small_model))}-nobody" / "model"
    training = replace(TRAINING, steps=5) if method.surrogate == "pool" else TRAINING
    settings = Settings(training=training, objective=LikelihoodRatio(str(nobody)) if config == "decoy" else None)
    images = [Image.open(path) for path in sorted(photos.iterdir())]
    first, *others = backbones
    cloaked = antidreambooth.cloak(images, first, config, ensemble=others, settings=settings, rounds=2, device="cpu")
    for picture, path in zip(cloaked, sorted((tmp_path / "wanted").iterdir()), strict=True):
        assert np.array_equal(np.asarray(picture), pixels(path)), path.name


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
    "flags",
    [["--model.step_rule=Momentum", *FALLING], ["--model.step_rule=NormalizedL2"], ["--model.draws=2"]],
    ids=["momentum", "l2", "draws"],
)
@pytest.mark.parametrize("config", ["aspl", pytest.param("advdm", marks=pytest.mark.slow)])
def test_steps_of_another_kind_are_resumed_bit_for_bit(command, config, flags, tmp_path, noted):
    main(command(*flags, config=config, rounds=3, out="whole"))
    interrupt = "--trainer.callbacks+=tests.lightning_modules.told.Told"
    told = [interrupt, f"--trainer.callbacks.number={int(signal.SIGTERM)}", "--trainer.callbacks.epoch=0"]
    with pytest.raises(SystemExit):
        main(command(*flags, *told, config=config, rounds=3, out="parts"))
    rounds = noted(Cloaking)
    main(command(*flags, "--ckpt_path=last", config=config, rounds=3, out="parts"))
    assert rounds == [1, 2]
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    main(command(config=config, rounds=3, out="plain"))
    assert files(tmp_path / "whole")["a.png"] != files(tmp_path / "plain")["a.png"]


def test_the_number_of_draws_is_recorded_and_is_not_changed_on_the_way(command, tmp_path):
    main(command("--model.draws=2"))
    assert manifest(tmp_path / "out")["settings"]["model"]["draws"] == 2
    with pytest.raises(SystemExit, match="draws: 2 then, 3 now"):
        main(command("--model.draws=3", "--ckpt_path=last", rounds=4))


def test_a_falling_step_size_knows_the_runs_end(command, tmp_path):
    """More rounds would have made other steps from the first one on."""
    main(command("--model.step_rule=Sign", "--model.step_rule.schedule=linear", rounds=2))
    with pytest.raises(SystemExit, match="rounds: 2 then, 3 now"):
        main(command("--model.step_rule=Sign", "--model.step_rule.schedule=linear", "--ckpt_path=last", rounds=3))


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


def test_memory_settings_and_those_of_a_test_may_change_on_resuming(command, tmp_path):
    """After the GPU's memory was full, say: they do not change what comes out, but for rounding."""
    main(command(rounds=1))
    memory = ["--model.micro_batch=1", "--model.surrogate.gradient_checkpointing=vae"]
    main(command(*memory, "--model.execution.decoder_rests=true", "--ckpt_path=last"))
    main(command(out="whole"))
    for name in ("a.png", "b.png", "c.webp"):
        resumed, whole = (pixels(tmp_path / out / "cloaked" / name).astype(int) for out in ("out", "whole"))
        assert np.mean(resumed != whole) < 0.05


def test_a_thread_for_each_idle_core_and_the_same_number_after_a_resume(command, tmp_path, monkeypatch, capsys):
    """Where others keep one of two cores busy a run takes one thread; what the user or a run began with stays."""

    def threads_after(*more: str, env: str | None = None) -> int:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if env is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", env)
        torch.set_num_threads(2)
        try:
            main(command("--overwrite", *more))
            return torch.get_num_threads()
        finally:
            torch.set_num_threads(1)

    monkeypatch.setattr("cli.usable_cores", lambda: [0, 1])
    monkeypatch.setattr("launch.waiting.usable_cores", lambda: [0, 1])
    monkeypatch.setattr("cli.others", lambda before, after: 0.2)
    assert threads_after() == 2
    assert "threads" not in capsys.readouterr().out
    monkeypatch.setattr("cli.others", lambda before, after: 0.9)
    assert threads_after(env="2") == 2
    assert threads_after("--trainer.max_epochs=3", "--ckpt_path=last") == 2  # what it began with
    show.cache_clear()
    assert threads_after() == 1
    assert "threads 1: other programs keep about 1 of 2 cores busy" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["threads"] == 1
    monkeypatch.setattr("cli.others", lambda before, after: 0.0)
    assert threads_after("--trainer.max_epochs=3", "--ckpt_path=last") == 1


@pytest.mark.parametrize(("config", "models"), [("aspl", 1), ("e-aspl", 2), ("advdm", 1)])
def test_each_base_model_is_hashed_once(command, config, models, monkeypatch):
    hashed, whole = [], Backbone.fingerprint

    def noting(self):
        hashed.append(self)
        return whole(self)

    monkeypatch.setattr(Backbone, "fingerprint", noting)
    main(command(config=config, rounds=1))
    assert len(hashed) == models


@pytest.mark.slow
def test_the_ranks_that_a_run_started_end_with_it(command):
    """Else they would wait for the first one, and live on."""
    stops = "--trainer.callbacks+=tests.lightning_modules.rank_stops.RankStops"
    process = start(command("--trainer.devices=2", "--trainer.strategy=ddp", stops))
    output, _ = process.communicate(timeout=120)  # ends only once nobody holds the other end of the pipe
    assert process.returncode == 1
    assert "error: the first rank cannot go on" in output


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


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(command, tmp_path):
    main(command(rounds=1))
    checkpoint = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    assert names > OWN
    assert all(name.startswith(("backbone.unet.", "backbone.text_encoder.")) for name in names - OWN)
    assert not any(state["state"] for state in checkpoint["optimizer_states"])


@pytest.mark.parametrize("config", [case for case in EACH if {*RESUMED} & {*case.values}])
def test_going_on_equals_not_stopping(command, config, tmp_path, noted):
    # A falling step size knows the run's end, so that one of fewer rounds is no part of it.
    falls = METHODS[config].step_rule().schedule != "constant"
    flags = ["--model.step_rule=Momentum", "--model.step_rule.schedule=constant"] if falls else []
    main(command(*flags, config=config, rounds=3, out="whole"))
    main(command(*flags, config=config, rounds=1, out="parts"))
    rounds = noted(Cloaking)
    main(command(*flags, "--ckpt_path=last", config=config, rounds=3, out="parts"))
    assert rounds == [1, 2]
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


@pytest.mark.slow
def test_bf16_goes_on_bit_for_bit_too(command, tmp_path, noted):
    mixed = "--trainer.precision=bf16-mixed"
    main(command(mixed, rounds=3, out="whole"))
    main(command(mixed, rounds=1, out="parts"))
    rounds = noted(Cloaking)
    main(command(mixed, "--ckpt_path=last", rounds=3, out="parts"))
    assert rounds == [1, 2]
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


@pytest.mark.parametrize("made_by", [1, None, 99])
def test_a_checkpoint_of_another_version_is_refused_in_one_line(command, tmp_path, made_by):
    """The first version's had no number; class paths in checkpoints have moved since."""
    main(command(rounds=1))
    before, path = files(tmp_path / "out"), tmp_path / "out" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint.pop("format")
    torch.save(checkpoint | ({} if made_by is None else {"format": made_by}), path)
    refused(command("--ckpt_path=last", rounds=2), f"the checkpoint has format {made_by or 1}", "start anew")
    assert files(tmp_path / "out") == before


def test_other_settings_than_the_checkpoints_are_named(command, photos, tmp_path):
    main(command())
    before = files(tmp_path / "out")
    (photos / "a.png").write_bytes((photos / "c.webp").read_bytes())
    with pytest.raises(SystemExit, match=r"budget: 8\.0 then, 4\.0 now.*photos\.a\.png"):
        main(command("--ckpt_path=last", "--model.budget=4"))
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--seed_everything=3", "seed: 0 then, 3 now"),
        ("--trainer.precision=bf16-mixed", "precision: 32-true then, bf16-mixed now"),
        ("--model.surrogate.prior.weight=0", r"surrogate\.prior\.weight: 1\.0 then, 0\.0 now"),
        ("--model.backbone=embedded", r"model\.backbone: .* then, embedded now"),
    ],
)
def test_any_other_setting_is_named(command, tmp_path, flag, named):
    main(command(rounds=1))
    with pytest.raises(SystemExit, match=named):
        main(command("--ckpt_path=last", flag))


@pytest.mark.slow
def test_killed_in_a_round_then_gone_on_is_bit_identical(command, tmp_path, noted):
    killed = start(command(rounds=40, out="killed"))
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    wait_for(checkpoint.exists, killed)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    rounds = noted(Cloaking)
    main(command("--ckpt_path=last", rounds=40, out="killed"))
    assert 0 < rounds[0] < 40
    main(command(rounds=40, out="whole"))
    assert files(tmp_path / "whole") == files(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e-aspl", "advdm"])  # ASPL's: see test_strategies.py
def test_two_ranks_hold_the_same_perturbation_and_weights(command, tmp_path, name):
    strategy = "ddp_find_unused_parameters_true" if name == "e-aspl" else "ddp"
    callback = "--trainer.callbacks+=tests.lightning_modules.rank_hashes.RankHashes"
    process = start(command("--trainer.devices=2", f"--trainer.strategy={strategy}", callback, config=name))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    first, second = ((tmp_path / "out" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert manifest(tmp_path / "out")["settings"]["ranks"] == 2
    main(command(config=name, out="alone"))
    cloaked = [files(tmp_path / out)["a.png"] for out in ("out", "alone")]
    assert cloaked[0] != cloaked[1]  # the second rank's gradient counts


@pytest.mark.slow
def test_ranks_send_gradients_and_losses_and_nothing_else(command, small_model, photos, tmp_path):
    """With Lightning's own bar, too, which is there where a config names no other, on the first rank alone."""
    hashes = "{class_path: tests.lightning_modules.rank_hashes.RankHashes}"
    callbacks = f"--trainer.callbacks=[{hashes}, {{class_path: benchmarks.watch.Watch}}]"
    watch = f"--trainer.callbacks.file={tmp_path / 'seen.json'}"
    process = start(command("--trainer.devices=2", '--trainer.strategy={"class_path": "DDP"}', callbacks, watch))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    first, second = ((tmp_path / "out" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    backbone = load_backbone(str(small_model))
    Full().apply(backbone, Full().surrogate_settings(DreamBooth(), backbone.defaults), seed=0)
    weights = sum(parameter.numel() for parameter in backbone.learned())
    seen = json.loads((tmp_path / "seen.json").read_text())["collectives"]
    grids = 3 * 3 * 24 * 20  # three photos so small that their grids have their own pixels
    assert seen["all_reduce"]["bytes"] == 4 * (6 * weights + 6 * grids + 6)
    assert "barrier" not in seen


@pytest.mark.slow
def test_an_ensemble_under_plain_ddp_is_refused(command):
    arguments = command("--trainer.devices=2", "--trainer.strategy=ddp", config="e-aspl")
    process = start(arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "--trainer.strategy ddp_find_unused_parameters_true" in output
    assert "Traceback" not in output


def test_a_surrogate_is_trained_once_and_on_the_clean_photos(command, photos, tmp_path):
    clean = tmp_path / "clean"
    clean.mkdir()
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(clean / "other.png")
    run = command(f"--data.clean_photos={clean}", config="fsmg")
    main(run)
    (surrogate,) = (tmp_path / "out" / "surrogates").iterdir()
    assert list(json.loads((surrogate / "manifest.json").read_text())["photos"]) == ["other.png"]
    weights = surrogate / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before, first = weights.stat().st_mtime_ns, files(tmp_path / "out")
    main([*run, "--overwrite"])
    assert weights.stat().st_mtime_ns == before
    assert files(tmp_path / "out") == first
    main(command("--overwrite", config="fsmg"))
    assert list(json.loads((surrogate / "manifest.json").read_text())["photos"]) == ["a.png", "b.jpg", "c.webp"]


def test_a_nobody_is_drawn_and_learned_beside_the_person(command, small_model, tmp_path):
    main(command(config="decoy", rounds=1))
    out, person = tmp_path / "out", slug(str(small_model))
    nobody, pictures = (out / "surrogates" / f"{person}-{what}" for what in ("nobody", "nobody-pictures"))
    assert {path.name for path in (out / "surrogates").iterdir()} == {person, nobody.name, pictures.name}
    assert len({path.read_bytes() for path in pictures.iterdir()}) == 4
    assert list(manifest(nobody)["photos"]) == sorted(path.name for path in pictures.iterdir())
    places = [out / "surrogates" / person, nobody]
    weights = [place / "model" / "unet" / "diffusion_pytorch_model.safetensors" for place in places]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    first, times = files(out), [path.stat().st_mtime_ns for path in weights]
    main(command("--overwrite", RATIO % (nobody / "model"), config="decoy", rounds=1))  # the same one, by name
    assert files(out)["a.png"] == first["a.png"]
    assert manifest(out)["settings"]["model"]["objective"]["decoy"] == str(nobody / "model")
    main(command("--overwrite", config="decoy", rounds=1))
    assert files(out) == first
    assert [path.stat().st_mtime_ns for path in weights] == times  # both were reused


def test_base_is_the_runs_own_base_model_asked_for_its_class_prompt(command, small_model, tmp_path):
    main(command(config="ours"))
    by_word = contents(tmp_path / "out" / "cloaked")
    assert manifest(tmp_path / "out")["settings"]["model"]["objective"]["decoy"] == "base"
    assert [path.name for path in (tmp_path / "out" / "surrogates").iterdir()] == [slug(str(small_model))]
    base = f"{small_model}, prompt: a photo of person"
    main(command("--overwrite", RATIO % base, config="ours"))
    assert contents(tmp_path / "out" / "cloaked") == by_word
    main(command("--overwrite", RATIO % str(small_model), config="ours"))  # the same model, by another prompt
    assert contents(tmp_path / "out" / "cloaked") != by_word


def test_a_surrogate_that_learns_is_compared_with_the_base_model_as_it_was(command, tmp_path):
    main(command(RATIO % "base", config="aspl"))
    record = manifest(tmp_path / "out")
    assert record["complete"]
    assert all(photo["largest_difference"] > 0 for photo in record["photos"])
    assert record["passes"]["denoiser"] == 2 * (2 * 6 * 3 + 6 * 2)  # rounds, models, steps, photos; learning


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ("aspl", ["--model.objective=LikelihoodRatio"], "needs a model that was taught a nobody"),
        ("advdm", ["--model.objective=LikelihoodRatio"], "run configs/decoy.yaml"),
        ("e-fsmg", ["--model.objective=LikelihoodRatio"], "is of one base model: leave out --model.ensemble"),
        ("e-fsmg", [RATIO % "base"], "is of one base model: leave out --model.ensemble"),
        ("advdm", [RATIO % "base"], "compares the base model with itself: attack a model that was trained on"),
        ("aspl", ["--model.objective=EncoderTarget"], "asks the encoder alone, which no surrogate changes"),
        ("advdm", ["--model.objective=EncoderAway"], "random_start true"),
        ("photoguard", ["--trainer.callbacks+=SampleGrid"], "leave it out of --trainer.callbacks"),
    ],
)
def test_objectives_that_do_not_fit_are_refused_before_anything_is_trained(command, config, flags, message, tmp_path):
    refused(command(*flags, config=config), message)
    assert not (tmp_path / "out" / "surrogates").exists()


@pytest.mark.parametrize("config", ["photoguard", "pid"])
def test_a_method_on_the_encoder_loads_nothing_else(command, config, tmp_path, monkeypatch):
    loaded, whole = [], ModelMixin.from_pretrained.__func__

    def noting(kind, *arguments, **options):
        loaded.append(kind.__name__)
        return whole(kind, *arguments, **options)

    monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(noting))
    monkeypatch.setattr(CLIPTextModel, "from_pretrained", lambda *_, **__: pytest.fail("a text encoder was loaded"))
    main(command(config=config, rounds=1))
    assert loaded == ["AutoencoderKL"]
    record = manifest(tmp_path / "out")
    again = 2 if config == "pid" else 1  # each step also encodes the clean photos, as it sees another part of them
    assert record["passes"] == {"denoiser": 0, "encoder": 10 * 3 * again}
    assert record["settings"]["model"]["prompts"] == []


def test_the_fixed_surrogate_is_what_is_attacked(command, tmp_path):
    main(command(config="fsmg", out="trained"))
    main(command(config="advdm", out="untouched"))
    assert files(tmp_path / "trained")["a.png"] != files(tmp_path / "untouched")["a.png"]
    models = [manifest(tmp_path / out)["settings"]["model"] for out in ("trained", "untouched")]
    assert models[0]["backbone_sha256"] != models[1]["backbone_sha256"]
    assert [model["prompts"] for model in models] == [["a photo of sks person"], ["a photo of person"]]


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        ("outputs/nowhere.yaml", "no config file of a victim"),
        ("", "no config file of a victim"),
        ("configs/dreambooth-lora.yaml --model.training.steps 1 --model.training.prior.weight 0", "no whole model"),
    ],
)
def test_surrogates_that_cannot_be_are_refused(command, surrogate, message):
    arguments = command(f"--model.surrogate={surrogate}", config="fsmg")
    refused(arguments, message)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.budget=0", "--model.budget is from 1 to 255 in 8-bit steps"),
        ("--model.ensemble.backbones=[outputs/nowhere/model]", "'outputs/nowhere/model' is neither a folder"),
        ("--model.objective={class_path: Targeted, init_args: {target: nowhere}}", "'nowhere' is no picture"),
    ],
)
def test_nothing_is_trained_before_the_settings_are_known_to_be_right(command, tmp_path, flag, message):
    refused(command(flag, config="fsmg"), message)
    assert not (tmp_path / "out" / "surrogates").exists()


def test_a_surrogates_own_flags_stay_its_own(command, tmp_path):
    """Its seed is not the attack's, and its prompt is what the attack expects."""
    own = f"{SURROGATE} --seed_everything 5 --model.training.instance_prompt 'a photo of t@t person'"
    arguments = command(f"--model.surrogate={own}", config="fsmg")
    main(arguments)
    first, record = files(tmp_path / "out"), manifest(tmp_path / "out")
    assert record["seed"] == 0
    assert record["settings"]["model"]["prompts"] == ["a photo of t@t person"]
    (surrogate,) = (tmp_path / "out" / "surrogates").iterdir()
    assert json.loads((surrogate / "manifest.json").read_text())["seed"] == 5
    assert json.loads((surrogate / "surrogate.json").read_text())["passes"] == {"denoiser": 2 * 2 * 2}
    main([*arguments, "--overwrite"])
    assert files(tmp_path / "out") == first


@pytest.mark.slow
def test_another_precision_or_resolution_wants_another_surrogate(command, tmp_path):
    """The one that is there is refused where the attack has been interrupted before its first checkpoint."""
    main(command(config="fsmg", rounds=1))
    shutil.rmtree(tmp_path / "out" / "cloaked")
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    (tmp_path / "out" / "manifest.json").unlink()
    for flag in ("--trainer.precision=bf16-mixed", "--model.resolution=32"):
        with pytest.raises(SystemExit, match=r"surrogates.* was made with other settings"):
            main(command(flag, config="fsmg", rounds=1))


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--model.ensemble.offload", "--model.execution.recorded"])
def test_offloading_and_recording_are_for_one_process(command, flag):
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"]
    arguments = command(*ranks, f"{flag}=true", config="e-aspl")
    process = start(arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"leave out {flag}" in output


def test_offloading_changes_nothing(command, tmp_path, monkeypatch):
    made, offloaded = Offloaded.__init__, []

    def noting(self, surrogate, device):
        offloaded.append(surrogate)
        made(self, surrogate, device)

    monkeypatch.setattr(Offloaded, "__init__", noting)
    main(command(config="e-aspl", out="together"))
    assert len(offloaded) == 0
    main(command("--model.ensemble.offload=true", config="e-aspl", out="apart"))
    assert len(offloaded) == 2
    assert files(tmp_path / "together")["a.png"] == files(tmp_path / "apart")["a.png"]


def test_a_surrogate_is_not_trained_by_several_processes(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(command(config="fsmg"), "run this command with one process first")


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
