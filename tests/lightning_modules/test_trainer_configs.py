"""Every file of configs/trainer, layered over the jobs that it is for."""

import pytest
import yaml
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from antidreambooth.errors import InputError
from cli import main
from lightning_modules import DDP, FSDP2, DeepSpeed
from lightning_modules.cloaking import Cloaking
from lightning_modules.running.strategies import check
from tests.conftest import ROOT

LAYERS = sorted((ROOT / "configs" / "trainer").glob("*.yaml"))
LAYERED = [(layer, "aspl") for layer in LAYERS] + [
    (layer, "dreambooth")
    for layer in LAYERS
    if "model:" not in layer.read_text()  # which says how ASPL attacks
]
NAMES = {"ddp", "deepspeed-2", "deepspeed-3", "fsdp", "multi-node", "slurm", "low-memory", "h100", "deterministic"}


def test_all_are_there():
    assert {layer.stem for layer in LAYERS} == NAMES


@pytest.mark.parametrize(("layer", "job"), LAYERED, ids=lambda part: getattr(part, "stem", part))
def test_every_layer_parses_over_a_job(layer, job, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={ROOT / 'configs' / f'{job}.yaml'}", f"--config={layer}", "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    wanted = yaml.safe_load(layer.read_text())["trainer"]
    assert {key: printed["trainer"][key] for key in wanted if key != "strategy"} == {
        key: value for key, value in wanted.items() if key != "strategy"
    }
    if "strategy" in wanted:
        assert (
            printed["trainer"]["strategy"]["class_path"].rpartition(".")[2]
            == (wanted["strategy"]["class_path"].rpartition(".")[2])
        )
    assert printed["model"]["class_path"].endswith({"aspl": "ASPL", "dreambooth": "Victim"}[job])


@pytest.mark.parametrize("made", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_a_strategy_that_nobody_tried_is_refused(made):
    with pytest.raises(InputError, match="is not supported: use auto"):
        check(made())


def test_deepspeed_wants_gpus(tmp_path):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=DeepSpeed(),
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(InputError, match="DeepSpeed needs GPUs"):
        trainer.strategy.setup_environment()


def test_the_others_are_let_through(tmp_path):
    for strategy in (DDPStrategy(), DDP(), DeepSpeed(stage=3), FSDP2()):
        check(strategy)
    check(Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False).strategy)


def test_low_memory_learns_a_lora_and_goes_on(command, tmp_path, noted):
    """The layer's own model part, on a model small enough to run here."""
    layer = ROOT / "configs" / "trainer" / "low-memory.yaml"
    flags = [f"--config={layer}", "--trainer.accelerator=cpu"]
    main(command(*flags, rounds=1, out="parts"))
    rounds = noted(Cloaking)
    main(command(*flags, "--ckpt_path=last", rounds=2, out="parts"))
    assert rounds == [1]
    main(command(*flags, rounds=2, out="whole"))
    parts, whole = ((tmp_path / out / "cloaked" / "a.png").read_bytes() for out in ("parts", "whole"))
    assert parts == whole
    size = (tmp_path / "whole" / "checkpoints" / "last.ckpt").stat().st_size
    main(command(rounds=1, out="full"))
    assert size < (tmp_path / "full" / "checkpoints" / "last.ckpt").stat().st_size / 2
