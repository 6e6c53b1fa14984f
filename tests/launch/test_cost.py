"""What runs are said to take, against what they took."""

import pytest
import yaml

from antidreambooth.diffusion.source import Source
from antidreambooth.photos.original import read_original
from cli import main, parsed
from launch.cost import (
    Footprint,
    Kind,
    Photos,
    disk_line,
    duration,
    footprint_of_cloak,
    footprint_of_victim,
    photos_in,
    time_line,
)
from tests.conftest import ROOT

CPU = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
PICTURE = 3 * 16**2  # bytes


def settings_of(config, model, *flags):
    return parsed(["fit", f"--config={ROOT / 'configs' / config}.yaml", f"--model.backbone={model}", *flags])


def weights_in(*folders):
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("form", ["OwnSize", "Square"])
def test_a_cloak_leaves_as_many_pictures_as_were_counted(photos, small_model, tmp_path, form):
    config = yaml.safe_load((ROOT / "configs" / "aspl.yaml").read_text())
    config["trainer"]["callbacks"] = [
        {"class_path": "CloakedPhotos", "init_args": {"every_n_epochs": 2}},
        {"class_path": "SampleGrid", "init_args": {"every_n_epochs": 3, "count": 2, "sampling_steps": 1}},
    ]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    root = tmp_path / "run"
    words = [
        "fit",
        f"--config={tmp_path / 'mine.yaml'}",
        *CPU,
        "--trainer.max_epochs=6",
        f"--model.backbone={small_model}",
        "--model.pgd_steps=1",
        "--model.surrogate.steps=1",
        "--model.surrogate.prior.weight=0",
        f"--data.photos={photos}",
        f"--trainer.default_root_dir={root}",
        "--checkpoint.every_n_epochs=6",
        *([] if form == "OwnSize" else ["--model.parametrisation=Square"]),  # the former is what is usual
    ]
    counted = footprint_of_cloak(parsed(words), parsed)
    assert not root.exists()
    main(words)
    cloaked, progress = len(list(root.glob("cloaked/*"))), len(list(root.glob("progress/*/*.png")))
    samples = 2 * len(list(root.glob("samples/*.png")))
    assert (cloaked, progress, samples) == (3, 9, 4)
    known = photos_in(photos, counted.own_size)
    sizes = [read_original(path.read_bytes(), path.name).numbers.nbytes for path in root.glob("cloaked/*")]
    assert counted.photo * known.number + known.size == 3 * 3 * PICTURE + sum(sizes) + 2 * progress * PICTURE
    assert sum(sizes) == (3 * 3 * 20 * 24 if form == "OwnSize" else 3 * PICTURE)
    assert counted.run == 2 * samples * PICTURE
    (checkpoint,) = root.glob("checkpoints/*.ckpt")
    assert counted.weights / 2 == pytest.approx(checkpoint.stat().st_size, abs=100_000)
    assert counted.weights > 200_000
    assert counted.class_images == {}


def test_a_victim_leaves_as_many_pictures_and_weights_as_were_counted(photos, small_model, tmp_path):
    root = tmp_path / "run"
    words = [
        f"--config={ROOT / 'configs' / 'dreambooth.yaml'}",
        *CPU,
        f"--model.backbone={small_model}",
        "--model.training.steps=1",
        "--model.training.prior.weight=0",
        "--model.generation.images=3",
        "--model.generation.sampling_steps=1",
        "--model.faces=tests.launch.fake_verdict_faces.FakeFaces",
        f"--trainer.default_root_dir={root}",
        '--trainer.callbacks=[{"class_path": "TrainedModel"}, {"class_path": "Likeness"}]',
        "--checkpoint.every_n_train_steps=0",
    ]
    test = ["test", *words, f"--data.reference_photos={photos}"]
    counted, kept = footprint_of_victim(parsed(test)), footprint_of_victim(parsed(test), keep_models=True)
    main(["fit", *words, f"--data.photos={photos}"])
    assert counted.weights == pytest.approx(weights_in(root / "model"), rel=0.1)
    assert kept == Footprint(counted.photo, counted.run + counted.weights, 0, {})
    main(test)
    assert len(list(root.glob("images/*.png"))) == 2 * 3
    assert counted[:2] == (PICTURE, 3 * 2 * 3 * PICTURE)
    assert footprint_of_victim(parsed(test), trained=False) == Footprint(0, counted.run, 0, {})


def test_what_is_trained_decides_what_weights_are_written(small_model):
    cloak = lambda config, *flags: footprint_of_cloak(settings_of(config, small_model, *flags), parsed)  # noqa: E731
    networks = weights_in(small_model / "unet", small_model / "text_encoder")
    whole = networks + weights_in(small_model / "vae")
    inside = "{class_path: Weighted, init_args: {terms: [{objective: LikelihoodRatio, weight: 2.0}]}}"
    ensemble = f"--model.ensemble.backbones=[{small_model}]"
    for config, flags, weights in (
        ("aspl", [], 2 * networks),
        ("aspl", ["--model.adaptation=Full"], 2 * networks),
        ("aspl", ["--model.adaptation=LoRA"], 0),
        ("e-aspl", [ensemble], 4 * networks),
        ("fsmg", [], whole),
        ("e-fsmg", [ensemble], 2 * whole),
        ("advdm", [], 0),
        ("pid", [], 0),
        ("decoy", [], 2 * whole),
        ("decoy", ["--model.objective.decoy=base"], whole),
        ("ours", [], 2 * whole),
        ("decoy", ["--model.objective=LikelihoodRatio", f"--model.objective.decoy={small_model}"], whole),
        ("fsmg", [f"--model.objective={inside}"], 2 * whole),
    ):
        assert cloak(config, *flags).weights == pytest.approx(weights, rel=0.1), config
    settings = settings_of("fsmg", small_model)
    kept, gone = footprint_of_cloak(settings, parsed, keep_models=True), footprint_of_cloak(settings, parsed)
    assert kept.run - gone.run == gone.weights
    assert kept.weights == 0
    for config, whole_model in (("dreambooth", True), ("dreambooth-lora", False), ("textual-inversion", False)):
        assert (footprint_of_victim(settings_of(config, small_model)).weights > 0) == whole_model, config


def test_class_images_are_those_of_the_prior(small_model):
    asked = ["--model.surrogate.prior.images=7", "--model.surrogate.prior.class_prompt=a photo of a dog"]
    of = lambda config, *flags: footprint_of_cloak(settings_of(config, small_model, *flags), parsed)  # noqa: E731
    assert of("aspl", *asked).class_images == {(Source(str(small_model)), "a photo of a dog", 16): 7 * PICTURE}
    assert of("aspl", "--model.surrogate.prior.weight=0").class_images == {}
    assert of("advdm").class_images == {}
    victim = "--model.surrogate=configs/dreambooth.yaml --model.training.prior.images 5"
    assert of("fsmg", victim).class_images == {(Source(str(small_model)), "a photo of person", 16): 5 * PICTURE}


def test_the_disk_line_adds_up(tmp_path):
    m = Source("m")
    one = Footprint(1_000_000, 500_000, 3_000_000, {(m, "p", 8): 1_000_000}, own_size=True)
    two = "its command line is wrong"
    other = Footprint(0, 500_000, 4_000_000, {(m, "p", 8): 2_000_000, (m, "q", 8): 1_000_000})
    cloaks = [Kind("a cloak x", [Photos(4, 100_000), Photos(4, 200_000), Photos(2, 300_000)], [], one)]
    cells = [
        Kind("a victim y", [Photos(4, 900_000)], [], other),
        Kind("a victim z", [Photos(4)], [], two),
        Kind("a victim done", [], [1.0], ""),
    ]
    line = disk_line(tmp_path / "later", [cloaks, cells], 2)
    # Ten photos, at their own size, too, and three runs of the first kind, a run of the second; weights of two at a
    # time; no image twice.
    start = f"disk: at most 12.6 MB to stay in {tmp_path / 'later'}, and on the way 8.0 MB for weights, and 3.0 MB for"
    assert line.startswith(start)
    assert line.endswith(" are free; without a victim z (its command line is wrong)")


@pytest.mark.parametrize(
    ("phases", "workers", "expected"),
    [
        ([[("a person", 3, [])]], 2, "known after the first one"),
        ([[("a person", 3, [10.0, 20.0, 900.0])]], 1, "about 60 s, from the median of those that are finished "),
        ([[("a person", 1, [20.0])]], 8, "about 20 s"),  # one run is not shared out
        ([[("a", 2, [10.0])], [("b", 4, [60.0])]], 2, "about 2 min"),  # one phase after the other: 10 s and 120 s
        ([[("a", 1, [10.0]), ("b", 3, [])]], 4, "(a 10 s); more for b: known after the first one"),
        ([[("a", 0, [10.0]), ("b", 3, [])]], 4, "known after the first one"),  # nothing like what is left
    ],
)
def test_the_time_is_that_of_finished_runs(phases, workers, expected):
    made = [[Kind(name, [Photos(4)] * left, seconds, "unknown") for name, left, seconds in kinds] for kinds in phases]
    line = time_line(made, workers)
    assert line.startswith("time: ")
    assert expected in line


def test_durations_are_readable():
    assert [duration(s) for s in (0.4, 59, 119.4, 120, 7199, 7200, 360_000)] == [
        "0 s",
        "59 s",
        "119 s",
        "2 min",
        "120 min",
        "2.0 h",
        "100.0 h",
    ]
