"""Every family of base models through every method, victim and measure of the command line, one round each.

Two families are in the quick tests, with all there is. Of the others the slow tests hold what differs between families
most; ``pytest -m thorough`` runs the rest of the table.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import antidreambooth
from antidreambooth.attack.cost import counted
from antidreambooth.attack.methods import METHODS, Settings
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.errors import InputError
from antidreambooth.evaluation.conditions import Clean, Scene
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from cli import main
from launch.verdict.cell import make_cloak, run_cell
from launch.verdict.command import parser, read_experiment
from lightning_modules.cloaking import Cloaking
from tests.conftest import ROOT, random_images
from tests.families.tiny import SIDE, TINY, save
from tests.helpers import denoisers, files, manifest, pixels, refused

MODELS = [name for name in TINY if name not in ("sd-v", "flux-schnell")]  # one of each family
QUICK = ("flux", "sdxl")
OFTEN = ("t-fsmg", "e-aspl", "advdm")  # methods that the slow tests hold of all families
STEPS, PHASE, PHOTOS = 2, 1, 2  # of PGD, of a surrogate's phase, and how many photos there are
CPU = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
PRIOR = "prior.images=2"
SURROGATE = f"configs/dreambooth.yaml --model.training.steps 1 --model.training.{PRIOR.replace('=', ' ')}"
TRAINING = DreamBooth(steps=PHASE, prior=PriorPreservation(images=2))  # the same, in a notebook
UNCLEANED = ("flux2-klein", "sana", "lumina2")  # of which diffusers has no image-to-image pipeline
VICTIMS = ("dreambooth", "dreambooth-lora")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a tiny model, which is made when it is first asked for."""
    known: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in known:
            known[name] = save(name, tmp_path_factory.mktemp(name) / "model")
        return known[name]

    return folder


def often(name: str, *also: Any, when: bool = True) -> Any:
    """A family, and what else a test is about, with the mark that says when it is run.

    Args:
        name: of the family.
        also: other parameters.
        when: whether the slow tests hold it.
    """
    marks = [] if name in QUICK else [pytest.mark.slow] if when else [pytest.mark.slow, pytest.mark.thorough]
    return pytest.param(name, *also, marks=marks)


every = pytest.mark.parametrize("name", [often(name) for name in MODELS])
seldom = pytest.mark.parametrize("name", [often(name, when=False) for name in MODELS])


@pytest.fixture
def model(name, folder_of) -> Path:
    return folder_of(name)


@pytest.fixture
def other(name, folder_of) -> Path:
    """A model of another family, for an ensemble."""
    return folder_of(MODELS[(MODELS.index(name) + 1) % len(MODELS)])


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):
        Image.fromarray(rng.integers(0, 256, (48, 40, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def cloaking(photos, tmp_path) -> Callable[..., list[str]]:
    """The arguments of a cloaking run of short rounds; more can be added."""

    def build(
        method: str, model: Path, *more: str, others: Sequence[Path] = (), rounds: int = 1, out: str = "out"
    ) -> list[str]:
        learning = [f"--model.surrogate.steps={PHASE}", f"--model.surrogate.{PRIOR}"]
        pool = [*learning, "--model.members=1", "--model.surrogate.batch_size=1"]
        kinds = {"alternating": learning, "pool": pool, "trained": [f"--model.surrogate={SURROGATE}"]}
        return [
            "fit",
            f"--config={ROOT / 'configs' / method}.yaml",
            f"--data.photos={photos}",
            f"--model.backbone={model}",
            f"--model.pgd_steps={STEPS}",
            *kinds.get(METHODS[method].surrogate, []),
            *([f"--model.ensemble.backbones=[{','.join(map(str, others))}]"] if others else []),
            *CPU,
            f"--trainer.max_epochs={rounds}",
            f"--trainer.default_root_dir={tmp_path / out}",
            "--checkpoint.every_n_epochs=1",
            *more,
        ]

    return build


@pytest.fixture
def command(cloaking, model, other) -> Callable[..., list[str]]:
    """The same for the family in turn, and with another one where a method wants several."""

    def build(method: str, *more: str, **options: Any) -> list[str]:
        return cloaking(method, model, *more, others=[other] if METHODS[method].several else [], **options)

    return build


def passes(method: str) -> dict[str, int]:
    """Images through all denoisers and all encoders in a round."""
    chosen = METHODS[method]
    models, attacked = (2 if chosen.several else 1), STEPS * PHOTOS
    learning = chosen.surrogate == "alternating"
    phases = {"alternating": 2, "pool": 1}.get(chosen.surrogate, 0)  # a step of each has a photo and a class image
    learned = phases * PHASE * 2
    encoded = 2 if method == "pid" else 1  # the clean photos, too
    return {
        "denoiser": models * (denoisers(chosen) * attacked + learned),
        "encoder": models * (encoded * attacked + PHOTOS * learning),
    }


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=pytest.mark.slow)  # trains two models first
        if (name, method) == ("sdxl", "decoy")
        else often(name, method, when=method in OFTEN)
        for name in MODELS
        for method in METHODS
    ],
)
def test_a_method_cloaks(command, name, method, tmp_path):
    spread = []
    if (name, method) == ("sana", "pid"):
        refused(command(method), "the autoencoder of Sana gives them none: set log_variance to 0")
        spread = ["--model.objective=EncoderAway", "--model.objective.log_variance=0"]
    main(command(method, *spread))
    record = manifest(tmp_path / "out")
    assert record["complete"]
    assert len(record["photos"]) == PHOTOS
    for photo in record["photos"]:
        assert pixels(tmp_path / "out" / photo["cloaked"]).shape == (48, 40, 3)
        assert 0 < photo["largest_difference"] <= 8
    assert record["passes"] == passes(method)


@pytest.mark.parametrize(
    ("name", "victim"),
    [often(name, victim, when=victim.endswith("lora")) for name in MODELS for victim in VICTIMS],
)
def test_a_victim_is_trained_and_draws(model, victim, photos, tmp_path):
    root = tmp_path / "out"
    words = [
        f"--config={ROOT / 'configs' / victim}.yaml",
        f"--model.backbone={model}",
        f"--model.training.{PRIOR}",
        f"--trainer.default_root_dir={root}",
        *CPU,
    ]
    grids = ["--trainer.callbacks=SampleGrid", "--trainer.callbacks.every_n_steps=1", "--trainer.callbacks.count=1"]
    main(["fit", *words, f"--data.photos={photos}", *grids, "--trainer.callbacks+=TrainedModel"])
    assert len({pixels(root / "samples" / f"step-{step:03d}.png").tobytes() for step in (1, 2)}) == 2  # it learns
    main(
        [
            "test",
            *words,
            f"--data.reference_photos={photos}",
            "--model.faces=tests.lightning_modules.fake_faces.FakeFaces",
            "--model.generation.images=2",
        ]
    )
    drawn = [pixels(path) for path in sorted((root / "images").iterdir())]
    assert len(drawn) == 4
    assert {picture.shape for picture in drawn} == {(SIDE, SIDE, 3)}
    assert json.loads((root / "measures.json").read_text())


@pytest.mark.parametrize("method", ["aspl", "e-aspl"])
@seldom
def test_a_notebook_gets_the_same_pixels(command, method, model, other, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("antidreambooth.api.computes_in_bf16", lambda device: False)  # as the command's precision
    main(command(method))
    cloaked = antidreambooth.cloak(
        sorted(photos.iterdir()),
        str(model),
        method,
        ensemble=[str(other)] if METHODS[method].several else [],
        settings=Settings(pgd_steps=STEPS, training=TRAINING),
        rounds=1,
        device="cpu",
    )
    for picture, path in zip(cloaked, sorted((tmp_path / "out" / "cloaked").iterdir()), strict=True):
        assert np.array_equal(np.asarray(picture), pixels(path)), path.name


@every
def test_photos_are_cleaned_or_refused_by_name(name, model):
    photos, backbone = random_images(2, SIDE), load_backbone(str(model))
    scene = Scene(lambda: backbone, photos)
    if name in UNCLEANED:
        with pytest.raises(InputError, match="diffusers has no image-to-image pipeline of") as raised:
            Clean()(photos, scene)
        assert "\n" not in str(raised.value)
        return

    def cleaned(strength: float, guidance: float, passes: int) -> Tensor:
        with counted([backbone]) as found:
            result = Clean(strength, steps=4, guidance_scale=guidance)(photos, scene)
        assert found.denoiser == len(photos) * passes
        return result

    both = 1 if name == "flux" else 2  # guidance is a number that it is told
    plain = cleaned(0.5, 1.0, passes=2)
    assert plain.shape == photos.shape
    assert torch.equal(plain, cleaned(0.5, 1.0, passes=2))
    for other in (photos, cleaned(1.0, 1.0, passes=4), cleaned(0.5, 4.0, passes=2 * both)):
        assert not torch.equal(plain, other)


@pytest.mark.parametrize("kind", UNCLEANED)
def test_cleaning_is_refused_before_anybody_is_cloaked(kind, folder_of, photos, tmp_path):
    refused(
        [
            "verdict",
            f"--people={json.dumps({'ann': {'photos': str(photos), 'clean_photos': str(photos)}})}",
            f"--backbone={folder_of(kind)}",
            f"--folder={tmp_path}",
            "--name=one",
            '--conditions={"cleaned": [{"class_path": "Clean"}]}',
        ],
        "diffusers has no image-to-image pipeline of",
        "leave out the condition Clean",
    )
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("distilled", [True, False])
def test_of_a_distilled_model_it_is_said_that_its_base_is_better(cloaking, folder_of, distilled, caplog):
    model = folder_of("flux-schnell" if distilled else "flux")
    main(cloaking("advdm", model))
    lines = [record.getMessage() for record in caplog.records if record.name == "antidreambooth"]
    assert sum("is distilled" in line and str(model) in line for line in lines) == distilled


@pytest.mark.parametrize("kind", ["flux", "qwen-image", "sana"])
def test_what_is_computed_again_to_save_memory_counts_once(cloaking, kind, folder_of, tmp_path):
    main(cloaking("advdm", folder_of(kind), "--model.gradient_checkpointing=true"))
    assert manifest(tmp_path / "out")["passes"] == passes("advdm")


@seldom
def test_a_run_that_is_stopped_goes_on_bit_for_bit(command, tmp_path, noted):
    main(command("aspl", rounds=2, out="whole"))
    told = ["--trainer.callbacks+=tests.lightning_modules.told.Told", "--trainer.callbacks.epoch=0"]
    with pytest.raises(SystemExit):
        main(command("aspl", *told, f"--trainer.callbacks.number={int(signal.SIGTERM)}", rounds=2, out="parts"))
    rounds = noted(Cloaking)
    main(command("aspl", "--ckpt_path=last", rounds=2, out="parts"))
    assert rounds == [1]
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


@every
def test_a_dry_run_says_what_it_takes(command, tmp_path, capsys):
    main(command("aspl", "--dry_run"))
    said = capsys.readouterr().out
    assert "time: about" in said
    assert not (tmp_path / "out").exists()


@seldom
def test_a_verdict_of_one_cell(model, photos, tmp_path):
    short = " ".join(flag.replace("=", " ") for flag in CPU)
    faces = "--model.faces tests.launch.fake_verdict_faces.FakeFaces"
    experiment = {
        "people": {"ann": {"photos": str(photos), "clean_photos": str(photos)}},
        "protections": {"advdm": f"configs/advdm.yaml --trainer.max_epochs 1 {short}"},
        "victims": {"lora": f"configs/dreambooth-lora.yaml {short} --model.training.prior.images 2 {faces}"},
    }
    words = [f"--{name}={json.dumps(value)}" for name, value in experiment.items()]
    words += [f"--backbone={model}", f"--folder={tmp_path}", "--name=one", "--generation.images=1"]
    tasks = read_experiment(parser().parse_args(words)).resolve()
    for cloak in tasks.cloaks:
        make_cloak(cloak, main)
    for cell in tasks.cells:
        run_cell(cell, main)
    main(["verdict", *words])  # all is done: it writes the tables, and starts no process for a cell
    table = (tmp_path / "one" / "table.md").read_text()
    assert "advdm" in table
    assert "lora" in table
