"""How far an autoencoder can be fooled: the measure, the attack, and the command on every family of base models."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import antidreambooth.evaluation.fragility as measures
import launch.fragility.command as command
from antidreambooth.attack.objectives import EncoderAway, EncoderTarget
from antidreambooth.attack.perturbation import random_noise
from antidreambooth.attack.targets import target_image
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.errors import InputError
from antidreambooth.evaluation.fragility import Compression, Fragility, compression, mean_distance
from antidreambooth.evaluation.prose import STANDS_FOR
from antidreambooth.files import write_json
from antidreambooth.photos.decoding import to_float
from cli import main
from launch.fragility.command import Settings, attacked
from tests.conftest import ROOT, random_images
from tests.families.tiny import SIDE, TINY, save
from tests.helpers import make_photos, refused

QUICK = ("sd", "flux2-klein", "sana")  # the plain form, latents that are packed, latents without a spread


def grey(value: int = 128) -> torch.Tensor:
    return torch.full((1, 3, 16, 16), value, dtype=torch.uint8)


def smooth(count: int, side: int = 16) -> torch.Tensor:
    """Pictures in the middle of the range, so that a whole budget fits on both sides."""
    return (random_images(count, side) // 2 + 64).to(torch.uint8)


def test_the_measure_is_what_it_says(backbone, monkeypatch):
    """Against the autoencoder itself, asked one picture at a time."""
    monkeypatch.setattr(measures, "lpips_available", lambda: False)
    clean, changed = smooth(3), smooth(3) + 7
    found = Fragility(backbone, clean, to_float(grey()), micro_batch=2)(changed, pulled=True)

    def latent(picture):
        return backbone.vae.encode(picture[None] / 127.5 - 1).latent_dist.mean * backbone.vae.config.scaling_factor

    with torch.no_grad():
        before, after = ([latent(one) for one in some] for some in (clean, changed))
        goal = latent(grey()[0])
        apart = sum((before[i] - before[j]).norm() for i, j in ((0, 1), (0, 2), (1, 2))) / 3
        for index in range(3):
            shift = (after[index] - before[index]).norm() / apart
            left = (after[index] - goal).norm() / (before[index] - goal).norm()
            torch.testing.assert_close(found.shift[index], shift, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.left[index], left, rtol=1e-4, atol=1e-5)
            decoded = [backbone.vae.decode(z / backbone.vae.config.scaling_factor).sample.clamp(-1, 1) for z in
                       (before[index], after[index])]  # fmt: skip
            was, now = (((one[0] + 1) * 127.5).round() for one in decoded)
            for figures, other in ((found.error, changed[index]), (found.moved, was)):
                expected = (now - other).pow(2).mean().sqrt()
                torch.testing.assert_close(figures[index], expected, rtol=1e-2, atol=1e-2)
    assert found.lpips is None


def test_no_change_leaves_everything_and_the_goal_leaves_nothing(backbone):
    clean = torch.cat([smooth(2), grey()])
    measure = Fragility(backbone, clean[:2], to_float(grey()))
    same, there = measure(clean[:2], pulled=True), measure(grey().expand(2, -1, -1, -1), pulled=True)
    assert same.shift.tolist() == [0, 0]
    assert same.left.tolist() == [1, 1]
    assert same.moved.tolist() == [0, 0]
    assert (same.error > 0).all()  # what the autoencoder loses anyway
    assert (there.left < 1e-5).all()
    assert measure(clean[:2]).left.isnan().all()  # nothing was pulled anywhere


def test_one_photo_has_no_distance_to_another(backbone):
    for clean in (smooth(1), grey().expand(2, -1, -1, -1)):
        with pytest.raises(InputError, match="give two different photos or more"):
            Fragility(backbone, clean, to_float(grey()))
    assert mean_distance(torch.tensor([[[[0.0, 0]]], [[[3.0, 4]]], [[[0.0, 0]]]])) == pytest.approx(10 / 3)


@pytest.mark.parametrize("budget", [4.0, 8.9])
def test_the_attack_is_stronger_than_noise_and_within_the_budget(backbone, budget):
    clean = smooth(3)
    measure = Fragility(backbone, clean, target_image("grey", 16))
    noisy = measure(random_noise(clean, budget, 0), pulled=True)
    settings, bar = Settings(steps=30), SimpleNamespace(update=int)
    away = attacked(backbone, clean, EncoderAway(log_variance=0.0), budget, settings, bar)
    pulled = attacked(backbone, clean, EncoderTarget("grey"), budget, settings, bar)
    for changed in (away, pulled):
        assert (changed.int() - clean.int()).abs().max() == int(budget)
    assert (measure(away).shift > 1.5 * noisy.shift).all()
    assert (measure(pulled, pulled=True).left < noisy.left - 0.01).all()


def test_the_embedded_model_keeps_a_twelfth():
    model = load_backbone("embedded", encoder_only=True)
    kept = compression(model, 128)
    assert kept == Compression(4096, 49152)
    assert str(kept) == "4096 numbers for 49152 values, 1 of 12"
    assert str(Compression(4 * 64 * 64, 3 * 512**2)).endswith("1 of 48")  # Stable Diffusion 1.5's shapes
    assert " ".join(STANDS_FOR.split()) in " ".join((ROOT / "README.md").read_text().split())


def run(model: Path, photos: Path, out: Path, *more: str) -> None:
    given = [f"--backbone={model}", f"--photos={photos}", f"--output={out}"]
    main(["fragility", *given, "--steps=10", "--budgets=[4, 8]", *more])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in TINY]
)
def test_every_family_says_what_remains(name, tmp_path, capsys, monkeypatch):
    """With the autoencoder alone, and the same the second time."""
    loaded: list[Backbone] = []
    real = command.load_backbone

    def noting(*given, **how) -> Backbone:
        loaded.append(real(*given, **how))
        return loaded[-1]

    monkeypatch.setattr(command, "load_backbone", noting)
    model, photos, out = save(name, tmp_path / "model"), make_photos(tmp_path / "photos", 2, 0), tmp_path / "out"
    run(model, photos, out)
    assert loaded[0].denoiser is None
    printed = capsys.readouterr().out
    assert "4/4" in printed  # two attacks, two budgets, ten steps each
    kept = json.loads((out / "manifest.json").read_text())["compression"]
    assert f"keeps {kept['numbers']} numbers for {3 * SIDE**2} values" in printed
    assert (out / "table.md").read_text() in printed
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [(row["photo"], row["attack"], row["budget"]) for row in rows] == [
        (photo, attack, budget)
        for attack, budget in (("none", "0"), ("away", "4"), ("away", "8"), ("grey", "4"), ("grey", "8"))
        for photo in ("0.png", "1.png")
    ]
    for row in rows:
        assert (float(row["shift"]) > 0) == (row["attack"] != "none")
        assert bool(row["left"]) == (row["attack"] == "grey")
        assert float(row["error"]) > 0
    with Image.open(out / "comparison.png") as picture:
        assert picture.size == (4 + 6 * (SIDE + 4), 16 + 4 * (SIDE + 4))  # photos, decoded, of two budgets; two attacks
    before = {file.name: file.read_bytes() for file in out.glob("*.[cmp][sdn]*") if file.suffix != ".json"}
    run(model, photos, out)
    assert len(before) == 3
    assert all((out / file).read_bytes() == data for file, data in before.items())


def test_what_cannot_work_is_one_line(tmp_path, small_model):
    photos, out = make_photos(tmp_path / "photos", 2, 0), tmp_path / "out"
    for more, messages in (
        (["--steps=15"], ["--steps is a multiple of 10: got 15"]),
        (["--steps=0"], ["--steps is 10 or more: got 0"]),
        (["--budgets=[]"], ["--budgets is empty"]),
        (["--budgets=[4, 4]"], ["--budgets has one twice"]),
        (["--budgets=[0.5]"], ["--budgets is from 1 to 255 in 8-bit steps: got 0.5"]),
        (["--photos=nowhere"], ["nowhere does not exist"]),
        (["--photos", str(photos / "0.png")], ["give two different photos or more"]),
        ([f"--output={photos}"], ["holds the photos", "--output"]),
        (["--backbone=./nowhere"], ["neither a folder"]),
        (["--resolution=7"], ["7"]),
    ):
        given = {"--backbone": small_model, "--photos": photos, "--output": out}
        kept = [f"{flag}={value}" for flag, value in given.items() if not any(word.startswith(flag) for word in more)]
        refused(["fragility", *kept, "--steps=10", *more], *messages)
        assert not (out / "manifest.json").exists()
    write_json(out / "manifest.json", {"settings": {}, "versions": {}})
    refused(
        ["fragility", *(f"{flag}={value}" for flag, value in given.items())],
        "holds the result of another run",
        "--output",
    )


def test_a_flag_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fragility", "--bugdets=[4]"])
    assert stopped.value.code == 2
    assert "bugdets: there is no such setting" in capsys.readouterr().err
