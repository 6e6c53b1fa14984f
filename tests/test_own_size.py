"""Photos come back at their own size: the whole way through the command line, with photos of several shapes."""

from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

import antidreambooth
from antidreambooth.attack.basis import Gaussian
from antidreambooth.attack.methods import Settings
from antidreambooth.attack.parametrisation import OwnSize, Square
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from callbacks.comparison import comparison
from cli import main
from lightning_modules import ASPL
from tests.conftest import contents
from tests.helpers import files, manifest, pixels, refused, start

SIZES = {"a.png": (90, 60), "b.png": (40, 64), "c.png": (10, 12), "d.png": (64, 64)}  # width, height


@pytest.fixture
def photos(tmp_path):
    """Smooth photos of several shapes, one of them smaller than the model's square of 16 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        Image.fromarray(rng.integers(30, 226, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC).save(
            folder / name
        )
    return folder


def changes(photos, cloaked):
    """By name, how each value has changed."""
    return {name: pixels(cloaked / name).astype(int) - pixels(photos / name) for name in SIZES}


@pytest.mark.parametrize(
    "config", ["aspl", *(pytest.param(c, marks=pytest.mark.slow) for c in ("fsmg", "e-aspl", "t-aspl"))]
)
def test_each_photo_comes_back_at_its_own_size_within_the_budget(command, photos, tmp_path, config):
    main(command("--model.budget=6.5", config=config))
    out = tmp_path / "out"
    found = changes(photos, out / "cloaked")
    for entry in manifest(out)["photos"]:
        change = found[entry["source"]]
        assert tuple(entry["size"]) == SIZES[entry["source"]] == change.shape[1::-1]
        assert 0 < entry["largest_difference"] == abs(change).max() <= 6
    assert manifest(out)["settings"]["model"]["parametrisation"]["class"] == "OwnSize"
    assert pixels(out / "comparison.png").ndim == 3


def test_the_same_command_gives_the_same_files_and_a_resumed_run_too(command, tmp_path, noted):
    main(command(rounds=3, out="whole"))
    main(command(rounds=3, out="again"))
    assert contents(tmp_path / "whole" / "cloaked") == contents(tmp_path / "again" / "cloaked")
    main(command(rounds=2))
    numbers = noted(ASPL)
    main(command("--ckpt_path=last", rounds=3))
    assert numbers == [2]
    first, second = (files(tmp_path / out) for out in ("whole", "out"))
    assert {name: first[name] for name in SIZES} == {name: second[name] for name in SIZES}


def test_a_program_gets_the_same_pixels(command, small_model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("antidreambooth.api.computes_in_bf16", lambda device: False)  # as the command's precision
    main(command())
    training = DreamBooth(learning_rate=1e-3, prior=PriorPreservation(images=4))
    given = [photos / "a.png", Image.open(photos / "b.png"), np.asarray(Image.open(photos / "c.png")), photos / "d.png"]
    options: dict[str, Any] = {"backbone": str(small_model), "rounds": 2, "device": "cpu"}
    cloaked = antidreambooth.cloak(given, settings=Settings(training=training), **options)
    for name, picture in zip(SIZES, cloaked, strict=True):
        assert np.array_equal(np.asarray(picture), pixels(tmp_path / "out" / "cloaked" / name)), name
    squares = antidreambooth.cloak(given, settings=Settings(training=training, parametrisation=Square()), **options)
    assert [picture.size for picture in squares] == [(16, 16)] * 4


def test_the_squares_of_before_are_a_setting(command, photos, tmp_path):
    main(command("--model.parametrisation=Square"))
    assert {picture.shape for picture in map(pixels, (tmp_path / "out" / "cloaked").iterdir())} == {(16, 16, 3)}


def test_views_and_grid_are_settings_that_change_the_result_and_are_refused_on_resuming(command, tmp_path):
    views = ["--model.parametrisation=OwnSize", "--model.parametrisation.views.close=0"]
    main(command())
    main(command(*views, out="whole views"))
    assert files(tmp_path / "out")["a.png"] != files(tmp_path / "whole views")["a.png"]
    refused(
        command(*views, "--ckpt_path=last", rounds=3),
        "the checkpoint was made with other settings",
        "close",
    )


def test_a_shaped_budget_and_a_basis_resume_and_are_said_in_the_manifest(command, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("antidreambooth.api.computes_in_bf16", lambda device: False)  # as the command's precision
    basis = ["--model.parametrisation=OwnSize", "--model.parametrisation.basis=Gaussian"]
    flags = ["--model.shape=visible", "--model.budget=6", *basis, "--model.parametrisation.basis.sigma=2"]
    gains: list[int] = []

    def noting(originals: list[Any], cloaked: list[Any], budget: int) -> Any:
        gains.append(budget)
        return comparison(originals, cloaked, budget)

    monkeypatch.setattr("callbacks.cloaked_photos.comparison", noting)
    main(command(*flags, rounds=2, out="whole"))
    main(command(*flags, rounds=1))
    main(command(*flags, "--ckpt_path=last", rounds=2))
    first, second = (files(tmp_path / out) for out in ("whole", "out"))
    assert {name: first[name] for name in SIZES} == {name: second[name] for name in SIZES}
    said = manifest(tmp_path / "out")
    assert (said["settings"]["model"]["budget"], said["settings"]["model"]["shape"]) == (6.0, "visible")
    assert said["settings"]["model"]["parametrisation"]["basis"] == {"class": "Gaussian", "sigma": 2.0}
    for entry in said["photos"]:
        assert 0 < entry["largest_difference"] <= entry["budgets"]["largest"] <= 24
        assert 0 < entry["budgets"]["mean"] < 24
    assert gains[-1] == max(entry["budgets"]["largest"] for entry in said["photos"])  # no difference is clipped
    options: dict[str, Any] = {"backbone": said["settings"]["model"]["backbone"], "rounds": 2, "device": "cpu"}
    training = DreamBooth(learning_rate=1e-3, prior=PriorPreservation(images=4))
    form = OwnSize(basis=Gaussian(2.0))
    how = Settings(training=training, parametrisation=form)
    cloaked = antidreambooth.cloak(
        [photos / name for name in SIZES], budget=6.0, shape="visible", settings=how, **options
    )
    for name, picture in zip(SIZES, cloaked, strict=True):
        assert np.array_equal(np.asarray(picture), pixels(tmp_path / "out" / "cloaked" / name)), name


@pytest.mark.slow
def test_two_ranks_hold_the_same_grids(command, photos, tmp_path):
    callback = "--trainer.callbacks+=tests.lightning_modules.rank_hashes.RankHashes"
    process = start(command("--trainer.devices=2", "--trainer.strategy=ddp", callback))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    first, second = ((tmp_path / "out" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    for change in changes(photos, tmp_path / "out" / "cloaked").values():
        assert 0 < abs(change).max() <= 8


def test_a_photo_that_changes_under_way_is_not_delivered(command, photos, tmp_path):
    arguments = command("--trainer.callbacks+=tests.changing_photo.ChangingPhoto")
    refused(arguments, "a.png has changed since the run began", "start anew")
    assert not (tmp_path / "out" / "cloaked").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_phones_photo_comes_back_upright_with_its_profile_and_without_its_place(command, photos, tmp_path, caplog):
    for path in photos.iterdir():
        path.unlink()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Model] = "Phone 9"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSMapDatum] = "WGS-84"
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rng = np.random.default_rng(1)
    stored = Image.fromarray(rng.integers(60, 196, (5, 7, 3), np.uint8)).resize((70, 50), Image.Resampling.BICUBIC)
    stored.save(photos / "IMG_1.JPG", quality=95, exif=exif, icc_profile=srgb)
    transparent = rng.integers(0, 256, (40, 40, 4), np.uint8)
    transparent[:20, ..., 3] = 0
    Image.fromarray(transparent).save(photos / "clear.png")
    grey = Image.fromarray(rng.integers(60, 196, (6, 6), np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
    grey.save(photos / "grey.tif")
    main(command())
    out = tmp_path / "out" / "cloaked"
    assert {path.name for path in out.iterdir()} == {"IMG_1.png", "clear.png", "grey.tif"}
    with Image.open(out / "IMG_1.png") as image, Image.open(photos / "IMG_1.JPG") as before:
        assert image.size == (50, 70)
        assert image.info["icc_profile"] == before.info["icc_profile"]
        assert image.getexif()[ExifTags.Base.Model] == "Phone 9"
        assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        assert not image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
        upright = np.asarray(before.transpose(Image.Transpose.ROTATE_270)).astype(int)
        assert 0 < abs(np.asarray(image).astype(int) - upright).max() <= 8
    change = pixels(out / "clear.png").astype(int) - transparent
    assert not change[:20].any()
    assert not change[..., 3].any()
    assert change[20:].any()
    with Image.open(out / "grey.tif") as image:
        assert image.mode == "L"
        assert 0 < abs(np.asarray(image).astype(int) - np.asarray(grey)).max() <= 8
    removed = {entry["source"]: entry.get("removed") for entry in manifest(tmp_path / "out")["photos"]}
    assert "the location" in removed["IMG_1.JPG"]
    (line,) = (record.getMessage() for record in caplog.records if "not in the cloaked files" in record.getMessage())
    assert line.startswith("not in the cloaked files: the location")
    assert removed["grey.tif"] is None


def test_outside_the_region_not_one_bit_changes(command, photos, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, (width, height) in SIZES.items():
        allowed = np.zeros((height, width), np.uint8)
        allowed[: height // 2, width // 3 :] = 255
        Image.fromarray(allowed).save(masks / name)
    main(command(f"--data.region.mask={masks}"))
    for name, change in changes(photos, tmp_path / "out" / "cloaked").items():
        white = pixels(masks / name) > 0
        assert not change[~white].any()
        assert 0 < abs(change[white]).max() <= 8
    assert manifest(tmp_path / "out")["settings"]["region"]["mask"] == str(masks)
