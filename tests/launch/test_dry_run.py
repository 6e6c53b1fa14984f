"""What ``fit --dry_run`` says, against what runs do; and that nothing is left of it."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import launch.dry_run
from antidreambooth.attack.parametrisation import OwnSize, Square
from antidreambooth.diffusion.class_images import class_images
from antidreambooth.photos.original import read_original, uncompressed
from cli import estimated, main
from datamodules import Protection
from launch.dry_run import Drawing, seconds_to_draw, seconds_to_write
from lightning_modules import ASPL, FSMG, Victim
from tests.conftest import contents
from tests.helpers import fit_of_a_victim, refused


@pytest.fixture
def everything(tmp_path, monkeypatch):
    """All files of a test, and those of the user's cache."""
    monkeypatch.chdir(tmp_path)
    cache = Path(os.environ["XDG_CACHE_HOME"])
    cache.mkdir(exist_ok=True)
    return lambda: (contents(tmp_path), contents(cache), sorted(cache.rglob("*")), sorted(tmp_path.rglob("*")))


@pytest.fixture
def clock(monkeypatch):
    """Time stands still but for what tests add; gives the seconds so far."""
    seconds = [0.0]
    monkeypatch.setattr(launch.dry_run, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def test_it_says_what_the_run_will_take_and_writes_nothing(command, photos, tmp_path, everything, noted, capsys):
    Image.effect_noise((50, 40), 60).save(photos / "grey.png")
    before, numbers = everything(), noted(ASPL)
    main(command("--model.surrogate.prior.images=7", "--dry_run", rounds=30))
    assert everything() == before
    assert not (tmp_path / "out").exists()
    assert numbers == [0, 1]
    text = capsys.readouterr().out
    for line in (
        "4 photos, a face found in 0 of them",
        "b.jpg: 20 x 24, no faces; comes back as b.png, 20 x 24",
        "c.webp: 20 x 24, no faces; comes back as c.webp, 20 x 24",
        "grey.png: 50 x 40, no faces; comes back as grey.png, 50 x 40",
        r"time: about \d+ s.*",
        r"memory: [\d.]+ .B of the [\d.]+ GB of this machine",
        r"disk: at most [\d.]+ MB to stay in .*/out, and on the way [\d.]+ MB for weights, and 0.0 MB for class images "
        r"in .*/class-images where they are not there; [\d.]+ GB are free",
    ):
        assert re.search(f"^{line}$", text, re.M), line
    (used,) = re.findall(r"memory: ([\d.]+) (?:M|G)B of", text)
    assert float(used) > 0


def test_it_counts_the_rounds_that_are_left(command, tmp_path, everything):
    main(command())
    before = everything()
    found = estimated(command("--ckpt_path=last", "--dry_run", rounds=12)).seconds
    assert [name for name in found if re.match(r"10 rounds of \d\.\d\d s$", name)]
    assert all(seconds >= 0 for seconds in found.values())
    assert everything() == before
    refused(command("--dry_run"), "holds a finished run")
    assert estimated(command("--dry_run", "--overwrite")).seconds
    assert everything() == before


@pytest.mark.parametrize("config", ["fsmg", "advdm", "e-fsmg", "photoguard", "decoy"])
def test_surrogates_count_and_are_not_trained(command, tmp_path, everything, noted, config, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no nobody is known there
    before, rounds, steps = everything(), noted(FSMG), noted(Victim)
    found = estimated(command("--dry_run", config=config)).seconds
    assert everything() == before
    assert rounds == [0, 1]
    models = {"fsmg": 1, "advdm": 0, "e-fsmg": 2, "photoguard": 0, "decoy": 2}[config]
    assert steps == [0, 1] * models  # the victim has two steps
    assert (found.get("training surrogates", 0) > 0) == (models > 0)


def test_a_nobody_that_is_known_is_not_trained_again(command, tmp_path, noted, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    main(command(config="decoy", rounds=1, out="first"))
    steps = noted(Victim)
    estimated(command("--dry_run", config="decoy"))
    assert steps == [0, 1]  # the person's


def test_a_victims_steps_count(small_model, photos, tmp_path, everything, noted, capsys):
    before, steps = everything(), noted(Victim)
    main(fit_of_a_victim(small_model, photos, tmp_path / "out", "--dry_run", steps=100))
    assert everything() == before
    assert steps == [*range(6)]
    text = capsys.readouterr().out
    assert "3 photos, as squares of 16 x 16" in text
    assert "time: about" in text
    weights = sum(file.stat().st_size for file in small_model.rglob("*.safetensors"))
    (stays,) = map(float, re.findall(r"at most ([\d.]+) MB to stay", text))
    assert weights / 1e6 < stays < 6 * weights / 1e6


def test_squares_are_said_to_be_squares(command, capsys):
    main(command("--dry_run", "--model.parametrisation=Square"))
    text = capsys.readouterr().out
    assert re.search("^3 photos$", text, re.M)
    assert "b.jpg: 20 x 24; comes back as b.png, 16 x 16\n" in text


def test_what_a_run_refuses_it_refuses(command, small_model, photos, tmp_path, everything):
    before = everything()
    refused(command("--dry_run", rounds=0), "--trainer.max_epochs")
    refused(command("--dry_run", "--data.photos=nowhere"), "nowhere does not exist")
    refused(command("--dry_run", f"--trainer.default_root_dir={photos}"), "lies where this run writes")
    refused(["test", *fit_of_a_victim(small_model, photos, tmp_path / "out", "--dry_run")[1:]], "--dry_run is for fit")
    assert everything() == before
    (photos / "bad.jpg").write_bytes(b"no picture at all")
    refused(command("--dry_run"), "bad.jpg cannot be decoded")
    assert not (tmp_path / "out").exists()


def test_class_images_count_by_batches_that_are_missing(backbone, clock, monkeypatch):
    drawn = []

    def sample(backbone, prompt, noise, steps):
        drawn.append(steps)
        clock[0] += 0.5 + steps + (10 if len(drawn) == 1 else 0)  # decoding, and what is done once
        return torch.zeros(0)

    monkeypatch.setattr(launch.dry_run, "sample", sample)
    assert seconds_to_draw(backbone, "a photo of person", 16, 4, steps=50) == pytest.approx(50.5)
    assert drawn == [2, 2, 4]  # Qwen-Image's sampler takes no single step
    assert seconds_to_draw(backbone, "a photo of person", 16, 4, steps=1) == pytest.approx(1.5)
    asked = {"batch": 4, "fingerprint": backbone.fingerprint()}
    class_images(backbone, "a dry photo of person", 4, 16, **asked)  # the first batch of three
    for count, batches in ((4, 0), (12, 2)):
        drawing, steps = Drawing(), backbone.defaults.sampling_steps
        assert drawing(backbone, "a dry photo of person", count, 16, **asked).shape == (4, 3, 16, 16)
        assert drawing.seconds == pytest.approx(batches * (0.5 + steps))
    folders = len([*Path(os.environ["XDG_CACHE_HOME"]).rglob("*")])
    Drawing()(backbone, "never drawn before", 4, 16, **asked)
    assert len([*Path(os.environ["XDG_CACHE_HOME"]).rglob("*")]) == folders


@pytest.mark.parametrize("kind", [OwnSize, Square])
def test_writing_counts_by_pixels(tmp_path, clock, monkeypatch, kind):
    for name, side in (("a", 20), ("b", 40), ("c", 30)):
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")

    def described(one):
        clock[0] += one.after.size

    monkeypatch.setattr(launch.dry_run, "described", described)
    data = Protection(photos=str(tmp_path), resolution=16, parametrisation=kind())
    data.setup("fit")
    sizes = (20**2 + 40**2 + 30**2) if kind is OwnSize else 3 * 16**2
    assert seconds_to_write(data, 8.0) == pytest.approx(3 * sizes)


def save(path: Path, mode: str, **options) -> Path:
    Image.effect_noise((30, 20), 60).convert("RGB").convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "mode", "exact"),
    [
        ("a.jpg", "RGB", True),
        ("a.png", "RGBA", True),
        ("a.png", "L", True),
        ("a.png", "1", True),
        ("a.png", "I;16", True),
        ("a.jpg", "CMYK", True),
        ("a.gif", "P", True),
        ("a.png", "LA", False),
        ("a.heic", "RGB", True),
        ("a.webp", "RGBA", True),
    ],
)
def test_a_header_tells_how_large_a_photo_is(tmp_path, name, mode, exact):
    path = tmp_path / name
    if mode == "I;16":
        Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(path)
    else:
        save(path, mode)
    original = read_original(path.read_bytes(), name)
    size = original.numbers.nbytes + (0 if original.alpha is None else original.alpha.nbytes)
    assert size == uncompressed(path) if exact else size < uncompressed(path)


def test_sixteen_bits_count_twice(tmp_path):
    pyvips = pytest.importorskip("pyvips")
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), np.uint16)
    image = pyvips.Image.new_from_memory(deep.data, 30, 20, 3, "ushort").copy(interpretation="rgb16")
    for name in ("a.png", "a.tif"):
        image.write_to_file(str(tmp_path / name))
        assert uncompressed(tmp_path / name) == deep.nbytes
