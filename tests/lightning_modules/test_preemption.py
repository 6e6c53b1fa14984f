"""A run that is told to go: it ends with the round, can go on bit for bit, and is requeued by exactly one."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cli import main
from lightning_modules.cloaking import Cloaking
from lightning_modules.running.preemption import SIGNALS, Preemption, requeue
from tests.conftest import ROOT
from tests.helpers import files, manifest, start, wait_for

TOLD = 128 + signal.SIGTERM  # exit code


def tell(process, number, pid=None):
    """Sends a signal; the process has to end by it."""
    os.kill(pid or process.pid, number)
    left(process)


def left(process):
    """The process ends, and says why."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == TOLD, output
    assert "Traceback" not in output
    assert "go on with --ckpt_path last" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS[:2], ids=lambda number: number.name)
def test_a_run_that_was_told_to_go_goes_on_bit_for_bit(command, tmp_path, number, noted):
    """The signal comes in the middle of a round, while the weights are borrowed."""
    seldom = "--checkpoint.every_n_epochs=1000"
    told = ["--trainer.callbacks+=tests.lightning_modules.told.Told", f"--trainer.callbacks.number={int(number)}"]
    left(start(command(seldom, *told, "--trainer.callbacks.epoch=2", rounds=6, out="told")))
    assert manifest(tmp_path / "told")["complete"] is False
    assert manifest(tmp_path / "told")["rounds"] == 3
    rounds = noted(Cloaking)
    main(command(seldom, "--ckpt_path=last", rounds=6, out="told"))
    assert rounds == [3, 4, 5]
    main(command(seldom, rounds=6, out="whole"))
    assert files(tmp_path / "told") == files(tmp_path / "whole")


@pytest.mark.slow
def test_any_rank_may_be_told(command, tmp_path):
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--checkpoint.every_n_epochs=1000"]
    process = start(command(*ranks, rounds=10_000))
    wait_for((tmp_path / "out" / "progress" / "round-010" / "c.png").exists, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = next(pid for pid in children if "LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_text())
    tell(process, signal.SIGUSR1, int(second))
    assert (tmp_path / "out" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
def test_a_victim_ends_with_its_step(small_model, photos, tmp_path):
    words = [
        "fit",
        f"--config={ROOT / 'configs' / 'dreambooth.yaml'}",
        f"--model.backbone={small_model}",
        f"--data.photos={photos}",
        "--model.training.prior.images=4",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--model.training.steps=10000",
        "--checkpoint.every_n_train_steps=100",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.callbacks+=tests.lightning_modules.told.Told",
        f"--trainer.callbacks.number={int(signal.SIGTERM)}",
        "--trainer.callbacks.epoch=0",
        "--trainer.callbacks.step=150",
    ]
    left(start(words))
    steps = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps > 100
    assert steps % 100
    assert steps == 151  # that in which the signal came, and no more
    assert not (tmp_path / "manifest.json").exists()


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    preemption = Preemption()
    preemption.arm()
    during = [signal.getsignal(number) for number in SIGNALS]
    preemption.disarm()
    assert all(own != other for own, other in zip(during, before, strict=True))
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_it_ends_if_asked_and_only_then(tmp_path):
    """Even where there is no checkpoint to write."""
    preemption = Preemption()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    preemption.leave_if_asked(trainer)
    preemption.received = True
    with pytest.raises(SIGTERMException) as left:
        preemption.leave_if_asked(trainer)
    assert left.value.code == TOLD


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({"SLURM_JOB_ID": "7"}, "requeue 7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "requeue 7_2"),
        ({"SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "slurm"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive"}, None),
        ({}, None),
    ],
)
def test_exactly_one_requeues(monkeypatch, tmp_path, environment, asked):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_NAME"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    requeue()
    found = (tmp_path / "asked").read_text().strip() if (tmp_path / "asked").exists() else None
    assert found == asked
