"""Runs of several processes that one command line starts, and of several base models in one."""

import json

import pytest
from lightning import Trainer

from antidreambooth.attack.surrogates import Offloaded
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.finetuning.full import Full
from cli import main
from tests.helpers import files, manifest, refused, start


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


@pytest.mark.parametrize("flag", ["--model.ensemble.offload", "--model.execution.recorded"])
def test_offloading_and_recording_are_for_one_process(command, flag, monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 2)
    refused(command(f"{flag}=true", config="e-aspl"), f"leave out {flag}")


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
