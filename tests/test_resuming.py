"""A run that is resumed from its checkpoint ends with the same bytes; what does not fit the checkpoint is named."""

import json
import signal
import time

import numpy as np
import pytest
import torch

from antidreambooth.attack.methods import METHODS
from cli import main, show
from lightning_modules.cloaking import Cloaking
from tests.helpers import files, manifest, pixels, refused, start, wait_for

QUICK = ("aspl", "fsmg")  # a surrogate that learns, and one that does not
RESUMED = ("advdm", "aspl", "decoy", "e-aspl", "fsmg", "metacloak", "pid", "simac")  # of each kind of state one
OWN = {"perturbation", "memory", "passes"}  # of a checkpoint
FALLING = ["--model.step_rule.schedule=linear", "--model.step_rule.random_start=true"]


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


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(command, tmp_path):
    main(command(rounds=1))
    checkpoint = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    assert names > OWN
    assert all(name.startswith(("backbone.unet.", "backbone.text_encoder.")) for name in names - OWN)
    assert not any(state["state"] for state in checkpoint["optimizer_states"])


@pytest.mark.parametrize(
    "config", [pytest.param(config, marks=[] if config in QUICK else pytest.mark.slow) for config in RESUMED]
)
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
    killed = start(command(rounds=12, out="killed"))
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    wait_for(checkpoint.exists, killed)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    rounds = noted(Cloaking)
    main(command("--ckpt_path=last", rounds=12, out="killed"))
    assert 0 < rounds[0] < 12
    main(command(rounds=12, out="whole"))
    assert files(tmp_path / "whole") == files(tmp_path / "killed")
