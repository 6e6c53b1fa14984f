"""The attacker on the command line: what `fit` trains and goes on with, what `test` measures, what both refuse."""

import csv
import json
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_modules.victim
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.files import LOCK
from antidreambooth.photos.decoding import to_float
from antidreambooth.photos.readings import square_at
from cli import main
from lightning_modules.victim import Victim
from tests.conftest import ROOT, contents, random_images, three_photos
from tests.helpers import fit_of_a_victim, make_photos, manifest, pixels, refused, start, wait_for

FOLDERS = {"dreambooth": "model", "dreambooth-lora": "lora", "textual-inversion": "textual_inversion"}
FULL, LORA, INVERSION = FOLDERS
EACH = [pytest.param(config, marks=[] if config == FULL else pytest.mark.slow) for config in FOLDERS]
FAKE = "--model.faces=tests.lightning_modules.fake_faces.FakeFaces"


@pytest.fixture
def fit(small_model, photos, tmp_path):
    """Builds the arguments of a fit on the photos."""

    def build(*more, out="out", **settings):
        return fit_of_a_victim(small_model, photos, tmp_path / out, *more, **settings)

    return build


@pytest.fixture(scope="module")
def usual(small_model, tmp_path_factory) -> Path:
    """The folder of a finished fit without any more arguments, to compare with."""
    place = tmp_path_factory.mktemp("usual")
    main(fit_of_a_victim(small_model, three_photos(place / "photos"), place / "out"))
    return place / "out"


@pytest.fixture
def fitted(usual, tmp_path) -> Path:
    """A copy of that where a test measures it."""
    return Path(shutil.copytree(usual, tmp_path / "out"))


@pytest.fixture
def test(small_model, photos, tmp_path):
    """Arguments of a test of six pictures; more can be added."""

    def build(*more, config=FULL, out="out", faces=FAKE):
        return [
            "test",
            f"--config={ROOT / 'configs' / config}.yaml",
            f"--data.reference_photos={photos}",
            f"--model.backbone={small_model}",
            "--model.generation.images=3",
            "--model.generation.batch=2",
            "--model.generation.sampling_steps=2",
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
            f"--trainer.default_root_dir={tmp_path / out}",
            faces,
            *more,
        ]

    return build


def result(folder, config=FULL):
    """What was trained."""
    found = contents(folder / FOLDERS[config])
    assert found
    return found


def weights(folder):
    return {name: content for name, content in result(folder).items() if name.endswith(".safetensors")}


def scalars(folder, name):
    return [event.value for event in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(name)]


@pytest.mark.parametrize("config", FOLDERS)
def test_every_config_parses(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={ROOT / 'configs' / config}.yaml", "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_epochs"] == 1
    assert printed["checkpoint"]["every_n_train_steps"] == 100
    assert printed["checkpoint"]["every_n_epochs"] is None


@pytest.mark.parametrize("config", EACH)
def test_every_config_trains(fit, tmp_path, small_model, config, capsys):
    main(fit("--model.training.prior.weight=0", config=config, steps=60))  # as often as a grid is due
    out = tmp_path / "out"
    assert any(name.endswith(".safetensors") for name in result(out, config))
    record = manifest(out)
    assert record["steps"] == 60
    assert record["seed"] == 0
    assert set(record["photos"]) == {"a.png", "b.jpg", "c.webp"}
    assert record["settings"]["model"]["training"]["steps"] == 60
    assert record["settings"]["model"]["training"]["train_text_encoder"] is (config == FULL)
    assert record["settings"]["model"]["backbone_sha256"] == load_backbone(str(small_model)).fingerprint()
    assert pixels(out / "samples" / "step-060.png").shape == (20, 4 * 18 + 2, 3)
    assert (out / "checkpoints" / "last.ckpt").is_file()
    assert {path.name for path in out.iterdir()} <= {
        *("samples", "checkpoints", "tensorboard", "manifest.json", "config.yaml", FOLDERS[config], LOCK)
    }
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert len(events.Scalars("victim/loss")) == 60
    assert [event.step for event in events.Images("samples")] == [60]
    assert "60/60" in capsys.readouterr().out


@pytest.mark.slow
def test_training_lowers_the_loss(fit, tmp_path):
    main(fit("--model.training.prior.weight=0", steps=60))
    losses = scalars(tmp_path / "out", "victim/loss")
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])


@pytest.mark.parametrize("config", EACH)
def test_twice_gives_the_same_files_and_another_seed_does_not(fit, tmp_path, config):
    main(fit(config=config, out="one"))
    main(fit(config=config, out="two"))
    main(fit("--seed_everything=1", config=config, out="three"))
    assert result(tmp_path / "one", config) == result(tmp_path / "two", config)
    assert result(tmp_path / "one", config) != result(tmp_path / "three", config)
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()


@pytest.mark.parametrize("config", EACH)
def test_what_is_published_is_what_was_trained(fit, small_model, tmp_path, config):
    """Weights that should change have changed, and no others."""
    main(fit(config=config))
    if config == FULL:
        untouched = load_backbone(str(small_model))
        trained = load_backbone(str(tmp_path / "out" / "model"))
        for part in ("unet", "text_encoder", "vae"):
            same = [
                torch.equal(a, b)
                for a, b in zip(getattr(trained, part).parameters(), getattr(untouched, part).parameters(), strict=True)
            ]
            assert all(same) if part == "vae" else sum(same) < 0.2 * len(same)
    else:
        main(fit(config=config, steps=4, out="longer"))
        assert result(tmp_path / "out", config) != result(tmp_path / "longer", config)


@pytest.fixture
def interrupted(monkeypatch):
    """Runs a command that a crash ends in the middle."""

    def run(arguments, step):
        whole = Victim.training_step

        def crash(self, batch, batch_idx):
            if batch_idx == step:
                raise RuntimeError("the machine is gone")
            return whole(self, batch, batch_idx)

        with monkeypatch.context() as patched:
            patched.setattr(Victim, "training_step", crash)
            with pytest.raises(RuntimeError, match="gone"):
                main(arguments)

    return run


@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", FOLDERS)
def test_going_on_equals_not_stopping(fit, tmp_path, interrupted, config, step):
    settings = ["--model.optimization.schedule=cosine", "--model.augmentation.flip=true"]
    main(fit(*settings, config=config, steps=6, out="whole"))
    interrupted(fit(*settings, config=config, steps=6, out="parts"), step)
    assert not (tmp_path / "parts" / FOLDERS[config]).exists()
    main(fit(*settings, "--ckpt_path=last", config=config, steps=6, out="parts"))
    assert result(tmp_path / "whole", config) == result(tmp_path / "parts", config)
    assert manifest(tmp_path / "parts")["steps"] == 6


def test_each_step_is_done_once(fit, tmp_path, interrupted, noted):
    interrupted(fit(steps=6), 3)
    steps = noted(Victim)
    main(fit("--ckpt_path=last", steps=6))
    assert steps == [2, 3, 4, 5]


def test_going_on_after_the_end_changes_nothing(fit, tmp_path, noted):
    main(fit(steps=4))
    before, steps = weights(tmp_path / "out"), noted(Victim)
    main(fit("--ckpt_path=last", steps=4))
    assert steps == []
    assert weights(tmp_path / "out") == before


@pytest.mark.slow
def test_killed_then_gone_on_is_bit_identical(fit, tmp_path, noted):
    killed = start(fit(steps=60, out="killed"))
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    wait_for(checkpoint.exists, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert 2 <= torch.load(checkpoint, weights_only=True)["global_step"] < 60
    steps = noted(Victim)
    main(fit("--ckpt_path=last", steps=60, out="killed"))
    assert 2 <= steps[0] < 60
    main(fit(steps=60, out="whole"))
    assert result(tmp_path / "whole") == result(tmp_path / "killed")


@pytest.mark.parametrize("config", FOLDERS)
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(fit, tmp_path, config):
    main(fit(config=config, steps=2))
    names = set(torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    kind = {FULL: "", LORA: ".lora_", INVERSION: "token_embedding.parametrizations"}[config]
    assert names
    assert all(kind in name and name.startswith(("backbone.unet.", "backbone.text_encoder.")) for name in names)
    if config == INVERSION:
        assert len(names) == 1


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--model.training.learning_rate=1e-3", "training.learning_rate: 0.01 then, 0.001 now"),
        ("--model.training.batch_size=1", "training.batch_size: 2 then, 1 now"),
        ("--model.augmentation.flip=true", "augmentation.flip"),
        ("--model.optimization.schedule=linear", "optimization.schedule"),
        ("--seed_everything=3", "seed: 0 then, 3 now"),
        ("--model.adaptation=LoRA", "adaptation.class: Full then, LoRA now"),
    ],
)
def test_other_settings_than_the_checkpoints_are_named(fit, tmp_path, flag, named):
    main(fit(steps=2))
    before = result(tmp_path / "out")
    refused(fit("--ckpt_path=last", flag, steps=2), named)
    assert result(tmp_path / "out") == before


def test_other_photos_than_the_checkpoints_are_named(fit, photos):
    main(fit(steps=2))
    (photos / "a.png").write_bytes((photos / "c.webp").read_bytes())
    refused(fit("--ckpt_path=last", steps=2), "photos.a.png")


@pytest.mark.slow
@pytest.mark.parametrize("config", [FULL, LORA])
def test_two_ranks_hold_the_same_weights(fit, tmp_path, config):
    ranks = [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.callbacks+=tests.lightning_modules.rank_weights.RankWeights",
    ]
    process = start(fit(*ranks, config=config, steps=2))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    first, second = ((tmp_path / "out" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    main(
        fit(
            "--trainer.callbacks+=tests.lightning_modules.rank_weights.RankWeights", config=config, steps=2, out="alone"
        )
    )
    assert (tmp_path / "alone" / "rank-0.txt").read_text() != first  # the second rank's gradient counts
    assert result(tmp_path / "out", config) != result(tmp_path / "alone", config)


@pytest.mark.parametrize(
    "flag",
    [
        "--model.augmentation.flip=true",
        "--model.augmentation.crop=0.5",
        "--model.augmentation.jpeg=30",
        "--model.training.prior.weight=0",
        "--model.training.train_text_encoder=false",
        "--model.training.batch_size=1",
        "--model.training.weight_decay=0.5",
        "--model.optimization.schedule=linear",
        "--trainer.gradient_clip_val=1e-4",
    ],
)
def test_every_flag_counts(fit, usual, tmp_path, flag):
    main(fit(flag, out="other"))
    assert result(usual) != result(tmp_path / "other")


def test_the_usual_fit_is_that_of_the_other_tests(fit, usual, tmp_path):
    """What differs from it differs by its flag, not by its photos or its place."""
    main(fit())
    assert result(tmp_path / "out") == result(usual)


def test_gradient_checkpointing_changes_nothing(fit, tmp_path, monkeypatch):
    step, on = Victim.training_step, []

    def watched(self, batch, batch_idx):
        on.append(self.backbone.unet.is_gradient_checkpointing)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Victim, "training_step", watched)
    main(fit())
    main(fit("--model.training.gradient_checkpointing=true", out="other"))
    assert on == [False] * 3 + [True] * 3
    assert result(tmp_path / "out") == result(tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        (["schedule=constant"], [1, 1, 1, 1]),
        (["schedule=linear"], [1, 3 / 4, 2 / 4, 1 / 4]),
        (["schedule=linear", "warmup_steps=2"], [0, 1 / 2, 1, 1 / 2]),
        (["schedule=constant_with_warmup", "warmup_steps=2"], [0, 1 / 2, 1, 1]),
    ],
)
def test_the_learning_rate_follows_its_schedule(fit, monkeypatch, settings, factors):
    rates, step = [], Victim.training_step

    def watched(self, batch, batch_idx):
        rates.append(self.optimizers().param_groups[0]["lr"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Victim, "training_step", watched)
    main(fit(*(f"--model.optimization.{setting}" for setting in settings), steps=4))
    assert rates == pytest.approx([0.01 * factor for factor in factors])


def test_fewer_photos_than_a_batch_come_again_in_it(fit, photos, tmp_path):
    (photos / "b.jpg").unlink()
    (photos / "c.webp").unlink()
    main(fit("--model.training.batch_size=4", steps=2))
    assert manifest(tmp_path / "out")["steps"] == 2
    for name in ("b.png", "c.png", "d.png"):
        shutil.copy(photos / "a.png", photos / name)
    main(fit("--model.training.batch_size=4", steps=2, out="copies"))
    losses = [scalars(tmp_path / out, "victim/loss") for out in ("out", "copies")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # a batch of another size rounds differently


@pytest.mark.parametrize(
    ("flags", "config", "message"),
    [
        (["--model.optimization.eight_bit=true"], FULL, "eight_bit"),
        (["--model.training.train_text_encoder=true"], INVERSION, "train_text_encoder"),
        (["--model.adaptation=Untrained"], FULL, "nothing to train"),
        (["--trainer.precision=bf16-true"], FULL, "keeps fp32 weights"),
        (["--model.backbone=./nowhere"], FULL, "neither a folder"),
        (["--data.photos=./nowhere"], FULL, "does not exist"),
        (["--model.adaptation=LoRA", "--model.adaptation.targets=[to_x]"], FULL, "no layers to_x"),
    ],
)
def test_impossible_settings_end_in_one_line(fit, flags, config, message):
    refused(fit(*flags, config=config), message)


def rows(folder):
    with (folder / "per_image.csv").open() as file:
        return list(csv.DictReader(file))


def outcome(folder):
    paths = [folder / name for name in ("per_image.csv", "measures.json", "grid.png")]
    return {path.name: path.read_bytes() for path in [*paths, *sorted((folder / "images").iterdir())]}


@pytest.mark.parametrize("config", FOLDERS)
def test_every_config_is_measured(fit, test, tmp_path, config):
    main(fit(config=config))
    main(test(config=config))
    out = tmp_path / "out"
    found = rows(out)
    assert Counter(row["prompt"] for row in found) == {
        "a photo of sks person": 3,
        "a dslr portrait of sks person": 3,
    }
    assert [row["index"] for row in found] == ["0", "1", "2"] * 2
    for row in found:
        assert pixels(out / row["file"]).shape == (16, 16, 3)
    assert len(list((out / "images").iterdir())) == 6
    assert len({path.read_bytes() for path in (out / "images").iterdir()}) == 6
    assert pixels(out / "grid.png").shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    means = json.loads((out / "measures.json").read_text())
    assert means["fdfr"] == 0
    for name in ("ism", "joint_ism", "distance"):
        assert means[name] == pytest.approx(np.mean([float(row[name]) for row in found]), rel=1e-5)
    before = outcome(out)
    main(test("--overwrite", config=config))
    assert outcome(out) == before


def test_measures_are_those_of_the_pictures_on_the_disk(fitted, test, photos, tmp_path):
    main(test())

    def colours(picture):
        return picture.reshape(-1, 3).astype(float).mean(0) - 128

    clean = [
        np.asarray(Image.open(p).convert("RGB").resize((16, 16), 1, (0, 2, 20, 22))) for p in sorted(photos.iterdir())
    ]
    reference = np.mean([colours(picture) for picture in clean], axis=0)
    for row in rows(tmp_path / "out"):
        found = colours(pixels(tmp_path / "out" / row["file"]))
        cosine = found @ reference / np.linalg.norm(found) / np.linalg.norm(reference)
        assert float(row["ism"]) == pytest.approx(cosine, abs=1e-3)
        assert row["face"] == "1.0"


def test_pictures_do_not_depend_on_the_batch(fitted, test, tmp_path, monkeypatch):
    found, sizes, drawn = {}, [], lightning_modules.victim.sample

    def sizing(backbone, prompt, noise, *how):
        sizes.append(len(noise))
        return drawn(backbone, prompt, noise, *how)

    monkeypatch.setattr(lightning_modules.victim, "sample", sizing)
    for batch in (1, 3):
        main(test(f"--model.generation.batch={batch}", "--overwrite"))
        found[batch] = [pixels(tmp_path / "out" / row["file"]).astype(int) for row in rows(tmp_path / "out")]
    assert sizes == [1] * 6 + [3] * 2
    assert np.abs(np.array(found[1]) - np.array(found[3])).max() <= 1


def test_pictures_of_an_earlier_test_are_gone(fitted, test, tmp_path):
    main(test())
    main(test("--model.generation.images=1", "--overwrite"))
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


def test_a_trained_model_draws_other_pictures_than_the_base_model(fitted, test, tmp_path):
    main(test())
    main(test("--model.adaptation=Untrained", out="untrained"))
    assert not (tmp_path / "untrained" / "manifest.json").exists()
    assert outcome(tmp_path / "untrained")["0-000.png"] != outcome(tmp_path / "out")["0-000.png"]


def test_a_picture_without_a_face_is_an_empty_cell(test, tmp_path):
    main(test("--model.adaptation=Untrained"))
    brightness = [pixels(tmp_path / "out" / row["file"]).mean() for row in rows(tmp_path / "out")]
    threshold = int(np.median(brightness)) + 1
    bright = tmp_path / "bright"
    bright.mkdir()
    Image.fromarray(np.full((16, 16, 3), (255, 250, 245), np.uint8)).save(bright / "a.png")
    darkest = [f"--model.faces.darkest={threshold}", f"--data.reference_photos={bright}"]
    main(test("--model.adaptation=Untrained", *darkest, "--overwrite"))
    found = rows(tmp_path / "out")
    assert {row["face"] for row in found} == {"0.0", "1.0"}
    for row in found:
        assert (row["ism"] == "") == (row["distance"] == "") == (row["face"] == "0.0")
        assert row["joint_ism"] != ""
    means = json.loads((tmp_path / "out" / "measures.json").read_text())
    assert means["fdfr"] == pytest.approx(np.mean([row["face"] == "0.0" for row in found]))


@pytest.mark.parametrize("config", FOLDERS)
def test_a_test_before_a_fit_says_so(test, tmp_path, config):
    refused(test(config=config), f"{tmp_path / 'out' / FOLDERS[config]} holds no result of this victim")


def test_references_are_asked_for(fit, test):
    arguments = [argument for argument in test() if not argument.startswith("--data.reference_photos")]
    refused(arguments, "--data.reference_photos FOLDER")


def test_references_without_a_face_are_named(test):
    arguments = test("--model.adaptation=Untrained", "--model.faces.darkest=256")
    refused(arguments, "no face is found in a.png, b.jpg, c.webp")


def test_several_folders_of_references(test, photos, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(more / "dark.png")
    both = f"--data.reference_photos=[{photos},{more}]"
    main(test("--model.adaptation=Untrained"))
    one = outcome(tmp_path / "out")
    main(test("--model.adaptation=Untrained", both, "--overwrite"))
    assert outcome(tmp_path / "out")["per_image.csv"] != one["per_image.csv"]


def test_a_prompt_that_names_nobody_is_warned_of(test):
    with pytest.warns(UserWarning, match="a photo of a person"):
        main(test("--model.adaptation=Untrained", "--model.generation.prompts=[a photo of a person]"))


def test_a_folder_that_cannot_be_written_is_found_first(fit, test, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file where the folder should be")
    monkeypatch.setattr("lightning_modules.backbone_module.load_backbone", lambda *_: pytest.fail("a model was loaded"))
    for arguments in (fit(), test()):
        refused(arguments, str(tmp_path / "out"), "cannot be written: File exists")


def test_a_full_disk_is_found_first(fit, tmp_path, monkeypatch):
    class Full:
        free = 0

    monkeypatch.setattr("callbacks.disk_space.shutil.disk_usage", lambda _: Full)
    refused(fit(), "has 0 MiB free")
    assert not (tmp_path / "out" / "model").exists()


def test_a_single_photo_can_be_trained_on(fit, usual, photos, tmp_path):
    main(fit(f"--data.photos={photos / 'a.png'}", out="one"))
    assert list(manifest(tmp_path / "one")["photos"]) == ["a.png"]
    assert result(tmp_path / "one") != result(usual)


def test_the_usual_reading_leaves_no_trace(fit, usual, tmp_path):
    """So that checkpoints from before there were readings are resumed."""
    main(fit("--data.reading.crop=centre", "--data.reading.kernel=lanczos"))
    assert "reading" not in manifest(usual)
    assert result(tmp_path / "out") == result(usual)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (usual / "manifest.json").read_bytes()


@pytest.mark.parametrize("crop", ["centre", "random", "face"])
@pytest.mark.filterwarnings("ignore:no face is found")
def test_photos_are_read_as_a_trainer_does(fit, usual, tmp_path, crop):
    flags = [f"--data.reading.crop={crop}", "--data.reading.kernel=area", "--data.reading.profile=false"]
    main(fit(*flags))
    assert result(tmp_path / "out") != result(usual)
    given = {"crop": crop, "kernel": "area", "upright": True, "profile": False}
    assert manifest(tmp_path / "out")["reading"] == {"class": "Reading", **given}


def test_a_reading_says_where_it_finds_no_face(fit):
    with pytest.warns(UserWarning, match="no face") as said:
        main(fit("--data.reading.crop=face"))
    no_face = [str(one.message) for one in said if "no face" in str(one.message)]
    assert no_face == [
        f"no face is found in {name}: its centred square is taken" for name in ("a.png", "b.jpg", "c.webp")
    ]


def test_of_squares_nothing_is_cut_and_they_are_encoded_once(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(lightning_modules.victim, "square_at", lambda *_: pytest.fail("a square was cut"))
    squares = f"--data.photos={make_photos(tmp_path / 'squares', 3, 0)}"
    main(fit(squares, "--data.reading.crop=random", out="one"))
    main(fit(squares, out="two"))
    assert result(tmp_path / "one") == result(tmp_path / "two")


def test_random_crops_are_drawn_anew_in_each_step(fit, tmp_path, monkeypatch):
    """Each of 16 pixels, from 16 x 19; and again the same ones."""
    places = []

    def noted(pixels, place):
        assert pixels.shape == (3, 19, 16)
        places.append(place)
        return square_at(pixels, place)

    monkeypatch.setattr(lightning_modules.victim, "square_at", noted)
    for out in ("one", "two"):
        main(fit("--data.reading.crop=random", "--model.training.batch_size=2", out=out, steps=4))
    assert places[:8] == places[8:]
    assert len(set(places)) == 8
    assert all(0 <= place < 1 for place in places)
    assert result(tmp_path / "one") == result(tmp_path / "two")


def test_random_crops_are_resumed_bit_for_bit(fit, tmp_path):
    flags = ["--data.reading.crop=random", "--model.augmentation.flip=true"]
    main(fit(*flags, out="whole", steps=4))
    main(fit(*flags, "--trainer.max_steps=2", steps=4))
    main(fit(*flags, "--ckpt_path=last", steps=4))
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    main(fit(flags[0], out="not mirrored", steps=4))
    assert result(tmp_path / "not mirrored") != result(tmp_path / "whole")


def test_another_reading_is_not_resumed(fit):
    main(fit("--trainer.max_steps=2"))
    refused(fit("--data.reading.kernel=area", "--ckpt_path=last"), "reading", "other settings")


def test_an_unknown_crop_is_refused(fit, capsys):
    with pytest.raises(SystemExit):
        main(fit("--data.reading.crop=middle"))
    assert "--data.reading.crop middle: choose one of 'centre', 'random', 'face'" in capsys.readouterr().err


def test_flags_explain_themselves(capsys):
    for arguments in (["fit", "--model.help", "Victim"], ["fit", "--data.help", "Subject"]):
        with pytest.raises(SystemExit):
            main(arguments)
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "what is trained: Full, CrossAttention, LoRA or TextualInversion",
        "of AdamW",
        "mirrored",
        "clean photos",
        "warm-up",
        "OpenCV",
    ):
        assert words in text


@pytest.mark.parametrize("blurred", [False, True])
def test_references_are_compared_with_as_the_backbone_asks(backbone, small_model, blurred):
    victim = Victim(backbone=str(small_model))
    backbone.defaults = replace(backbone.defaults, blurred_references=blurred)
    victim.backbone = backbone
    (photo,) = random_images(1)
    seen = victim._as_drawn(photo)
    levels = (backbone.reconstruct(to_float(photo[None]))[0] + 1) * 127.5
    torch.testing.assert_close(seen, levels.round().to(torch.uint8) if blurred else photo, rtol=0, atol=0)
    assert torch.equal(seen, photo) is not blurred
