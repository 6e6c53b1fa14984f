"""``cloak()``: what it takes, what it refuses in one line, and that nothing of the caller's changes the pixels."""

import inspect
import json
import shutil
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from antidreambooth import cloak
from antidreambooth.attack.methods import Settings
from antidreambooth.attack.objectives import LikelihoodRatio
from antidreambooth.diffusion.source import EMBEDDED, Source
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.photos.decoding import square
from antidreambooth.provenance import MANIFEST, person_in
from cli import main
from tests.test_cli import TRAINING

SMALL = Settings(training=TRAINING)  # of a surrogate that learns a little
FEW: dict[str, Any] = {"method": "advdm", "rounds": 2}


@pytest.fixture
def given(photos) -> list[Path]:
    """Files of three photos."""
    return sorted(photos.iterdir())


@pytest.fixture
def run(small_model):
    """A call of a few small rounds; gives the pixels."""

    unchecked: Any = inspect.unwrap(cloak)  # the tests check types before the function itself can say what is wrong

    def call(images, **options):
        cloaked = unchecked(images, **{"backbone": small_model, **FEW, "device": "cpu", **options})
        return [np.asarray(image) for image in cloaked]

    return call


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_paths_images_and_arrays_are_the_same_photos(run, given):
    opened = [Image.open(path) for path in given]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    expected = run(given)
    for images in (
        [str(path) for path in given],
        opened,
        tuple(arrays),
        (path for path in given),
        [given[0], opened[1], arrays[2]],
        np.stack(arrays),
    ):
        assert same(run(images), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", r"images are a list: put the one photo into brackets, images=\[photo\]"),
        (Path("photo.jpg"), "images are a list"),
        (Image.new("RGB", (8, 8)), "images are a list"),
        (np.zeros((8, 8, 3), np.uint8), "images are a list"),
        (None, "images are a list of photos, each of them a path, a Pillow image, or an array"),
        (3, "images are a list of photos"),
        (b"\x89PNG", "images are a list"),
        (np.zeros((8, 8), np.uint8), "images are a list"),
        ([], "images are empty"),
        (np.zeros((0, 8, 8, 3), np.uint8), "images are empty"),
        ([None], r"images\[0\] is None: give a path"),
        ([Image.new("RGB", (8, 8)), 7], r"images\[1\] is 7"),
        ([np.zeros((8, 8, 3))], r"images\[0\] is an array of float64 with shape \(8, 8, 3\)"),
        ([np.zeros((8, 8, 4), np.uint8)], r"images\[0\] is an array of uint8 with shape \(8, 8, 4\)"),
        ([np.zeros((3, 8, 8), np.uint8)], r"images\[0\] is an array"),
        ([np.zeros((0, 8, 3), np.uint8)], r"images\[0\] has no pixels: it is 8 by 0"),
        ([torch.zeros(3, 8, 8)], r"images\[0\] is of class Tensor: give a path"),
        (torch.zeros(3, 8, 8), r"images\[0\] is of class Tensor: give a path"),
        ([Image.new("RGB", (8, 8)), "nowhere/a.jpg"], r"images\[1\]: a.jpg cannot be read: No such file"),
        (["~no such user/a.jpg"], r"images\[0\]: a.jpg cannot be read: No such file"),
        (["."], r"images\[0\]: \. is a folder: give its photos, such as \*sorted\(Path\('\.'\)"),
        ([__file__], r"images\[0\]: .*test_api.py cannot be decoded: it is no image"),
        ([Image.new("F", (8, 8))], r"images\[0\] has floating-point pixels"),
    ],
)
def test_what_is_no_list_of_photos_is_told_in_one_line(run, images, message):
    with pytest.raises(InputError, match=f"^{message}") as raised:
        run(images)
    assert "\n" not in str(raised.value)


def opened(path: Path) -> Image.Image:
    image = Image.open(path)
    image.close()
    return image


def loaded(path: Path) -> Image.Image:
    image = Image.open(path)
    image.load()
    image.close()
    return image


def out_of_its_block(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image


def of_a_closed_file(path: Path) -> Image.Image:
    with path.open("rb") as file:
        return Image.open(file)


@pytest.mark.parametrize("closed", [opened, loaded, out_of_its_block, of_a_closed_file])
def test_a_closed_image_is_told(run, given, closed):
    for path in given:
        if path.suffix == ".webp" and closed in (out_of_its_block, of_a_closed_file):
            continue  # Pillow keeps its bytes
        with pytest.raises(InputError, match=r"^images\[0\] is closed: give it before it is closed, or give its path$"):
            run([closed(path)])


def test_photos_are_not_held_at_their_own_size(run, tmp_path, monkeypatch):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    seen: list[weakref.ref[Image.Image]] = []
    alive: list[int] = []

    def watched(image: Image.Image, side: int) -> Any:
        alive.append(sum(one() is not None for one in seen))
        seen.append(weakref.ref(image))
        return square(image, side)

    monkeypatch.setattr("antidreambooth.photos.whole.square", watched)
    run([tmp_path / "a.png"] * 4)
    assert alive == [0, 0, 0, 0]


def test_numbers_of_numpy_and_devices_of_torch_are_taken(run, given):
    plain = run(given, budget=8, seed=3, rounds=1, resolution=16, device="cpu")
    kinds = {"budget": np.float32(8), "seed": np.int64(3), "rounds": np.uint8(1), "resolution": np.int32(16)}
    assert same(run(given, **kinds, device=torch.device("cpu:0")), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clean_images": []}, "clean_images are empty"),
        ({"clean_images": "a.jpg"}, "clean_images are a list"),
        ({"seed": -1}, "seed is from 0 to"),
        ({"seed": 2**70}, "seed is from 0 to"),
        ({"seed": 1.5}, "seed is a whole number: got 1.5"),
        ({"rounds": 0}, "rounds is 1 or more: got 0"),
        ({"rounds": -1}, "rounds is 1 or more: got -1"),
        ({"rounds": 2.5}, "rounds is a whole number: got 2.5"),
        ({"rounds": "3"}, "rounds is a whole number: got '3'"),
        ({"budget": "8"}, "budget is a number of 8-bit steps: got '8'"),
        ({"budget": None}, "budget is a number of 8-bit steps: got None"),
        ({"budget": float("nan")}, "budget is from 1 to 255 in 8-bit steps"),
        ({"budget": 300}, "budget is from 1 to 255"),
        ({"resolution": "16"}, "resolution is a whole number"),
        ({"method": ["aspl"]}, r"there is no method \['aspl'\]: choose one of"),
        ({"settings": {"budget": 8}}, r"settings are Settings\(\.\.\.\) of .*: got of class dict"),
        ({"progress": None}, r"progress wraps a loop, as tqdm.auto.tqdm does: got None"),
        ({"ensemble": None}, "ensemble is a list of base models: got None"),
        ({"ensemble": 3}, "ensemble is a list of base models: got 3"),
        ({"device": "cpu:1"}, "there is no device 'cpu:1' here: choose cpu"),
        ({"device": "meta"}, "there is no device 'meta' here: choose cpu"),
        ({"device": "gpu"}, "there is no device 'gpu' here: choose .*cpu"),
        ({"device": "xyz"}, "there is no device 'xyz' here"),
        ({"device": "cuda:99"}, "there is no device 'cuda:99' here"),
        ({"method": "ASPL"}, "there is no method 'ASPL': choose one of"),
        ({"method": "e-aspl"}, "give ensemble"),
        ({"ensemble": ["embedded"]}, "advdm attacks one model"),
        ({"ensemble": "embedded"}, "advdm attacks one model"),
        ({"ensemble": [None]}, "a backbone is 'embedded', a folder, a hub id"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line_before_a_model_is_loaded(run, given, monkeypatch, options, message):
    monkeypatch.setattr("antidreambooth.api.load_backbone", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=message) as raised:
        run(given, **options)
    assert "\n" not in str(raised.value)


def test_a_plain_name_a_path_and_a_source_are_the_same_model(given, small_model):
    options = {**FEW, "device": "cpu"}
    first, *others = (
        [np.asarray(image) for image in cloak(given, name, **options)]
        for name in (str(small_model), small_model, Source(str(small_model)))
    )
    assert all(same(first, other) for other in others)


def test_a_method_that_attacks_a_trained_model_refuses_one_that_knows_nobody(given, run, caplog):
    with pytest.raises(InputError, match="the embedded one knows nobody: give backbone the model/ of"):
        cloak(given, "embedded", "fsmg", rounds=1)
    with pytest.raises(InputError, match="the embedded one knows nobody"):
        run(given, backbone=str(EMBEDDED), method="fsmg")
    run(given, method="fsmg")
    assert "nothing says that" in caplog.text


def described_by(folder: Path, model: Path, manifest: str) -> Path:
    """A copy of a model with a manifest beside it."""
    shutil.copytree(model, folder / "model")
    (folder / MANIFEST).write_text(manifest)
    return folder / "model"


def manifest_of(kind: str, training: dict[str, Any]) -> str:
    return json.dumps({"settings": {"model": {"class": kind, "training": training}}, "versions": {}})


def test_a_trained_model_is_asked_for_the_person_that_its_manifest_names(given, run, small_model, tmp_path, caplog):
    person = "a photo of t@t person"
    model = described_by(tmp_path / "a", small_model, manifest_of("Victim", {"instance_prompt": person}))
    found = run(given, backbone=model, method="fsmg")
    wanted, other = (
        run(given, backbone=model, method="fsmg", settings=Settings(prompt=prompt))
        for prompt in (person, "a photo of sks person")
    )
    assert same(found, wanted)
    assert not same(found, other)  # the settings' prompt is what was asked for
    assert "nothing says that" not in caplog.text


def test_a_model_that_was_trained_on_nobody_is_refused(given, run, small_model, tmp_path):
    model = described_by(tmp_path / "a", small_model, manifest_of("Pretraining", {"steps": 4}))
    with pytest.raises(
        InputError, match=r"trained on the person, and the model .* was trained on nobody in particular"
    ):
        run(given, backbone=model, method="fsmg")
    assert len(run(given, backbone=model, method="advdm")) == 3


@pytest.mark.parametrize("manifest", ["", "[]", '{"name": "of a web page"}'])
def test_a_manifest_of_another_program_says_nothing(given, run, small_model, tmp_path, caplog, manifest):
    run(given, backbone=described_by(tmp_path / "a", small_model, manifest), method="fsmg")
    assert "nothing says that" in caplog.text


def test_a_manifest_speaks_of_no_other_folder(tmp_path):
    (tmp_path / MANIFEST).write_text(manifest_of("Victim", {"instance_prompt": "a photo of t@t person"}))
    assert person_in(tmp_path / "model") == "a photo of t@t person"
    assert person_in(tmp_path / "base") is None
    (tmp_path / MANIFEST).write_text('{"settings": [], "versions": {}}')
    with pytest.raises(InputError, match="was trained on nobody in particular"):
        person_in(tmp_path / "model")


def test_a_ratio_finds_the_base_model_that_the_manifest_names(given, run, small_model, small_v_model, tmp_path):
    chosen = {"backbone": str(small_v_model), "frozen_weights": "fp32", "revision": None}
    training = {"instance_prompt": "a photo of t@t person"}
    manifest = json.dumps({"settings": {"model": {**chosen, "training": training}}, "versions": {}})
    model = described_by(tmp_path / "a", small_model, manifest)
    ratio = partial(run, given, backbone=model, method="decoy")
    found = ratio(settings=Settings(objective=LikelihoodRatio("base")))
    against = {base: LikelihoodRatio(str(base), "a photo of person") for base in (small_v_model, small_model)}
    named = {base: ratio(settings=Settings(objective=objective)) for base, objective in against.items()}
    assert same(found, named[small_v_model])
    assert not same(found, named[small_model])


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("", r"nothing says from which base model .* was trained: name it"),
        (manifest_of("Victim", {"instance_prompt": "a photo of t@t person"}), r"nothing says from which base model"),
    ],
)
def test_a_ratio_wants_its_base_model_by_name_where_nothing_names_it(
    given, run, small_model, tmp_path, manifest, message
):
    model = described_by(tmp_path / "a", small_model, manifest)
    with pytest.raises(InputError, match=message):
        run(given, backbone=model, method="decoy", settings=Settings(objective=LikelihoodRatio("base")))


def test_a_ratio_against_the_base_model_is_of_one(given, run, small_model, small_v_model):
    training = DreamBooth(learning_rate=1e-3, steps=1, prior=PriorPreservation(weight=0.0))
    settings = Settings(training=training, objective=LikelihoodRatio("base"))
    with pytest.raises(InputError, match="compares with one base model: leave out ensemble"):
        run(given, method="e-aspl", ensemble=[small_v_model], settings=settings)
    with pytest.raises(InputError, match="compares the base model with itself"):
        run(given, method="advdm", settings=settings)
    plain = run(given, method="aspl", settings=Settings(training=training))
    assert not same(run(given, method="aspl", settings=settings), plain)


def test_a_victims_model_is_known_by_its_manifest(given, small_model, photos, tmp_path, caplog):
    words = ["fit", "--config=configs/dreambooth.yaml", f"--model.backbone={small_model}", f"--data.photos={photos}"]
    words += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--model.training.prior.weight=0"]
    main([*words, "--model.training.steps=1", f"--trainer.default_root_dir={tmp_path / 'victim'}"])
    cloak(given, tmp_path / "victim" / "model", "fsmg", rounds=1, device="cpu")
    assert "nothing says that" not in caplog.text


@pytest.mark.filterwarnings("ignore:skipped, as no photos")
def test_cloaked_files_are_not_cloaked_again_unless_asked(command, run, tmp_path):
    main(command())
    cloaked = sorted((tmp_path / "out" / "cloaked").iterdir())
    with pytest.raises(InputError, match=r"a.png is no original: .* cloak it once more with again=True"):
        run(cloaked)
    with pytest.raises(InputError, match=r"a.png is no original"):
        run([Image.new("RGB", (20, 20), "red")], clean_images=cloaked)
    assert len(run(cloaked, again=True)) == 3


# Nothing of the caller's changes the pixels


class Dtype(AbstractContextManager[None]):
    """Another default dtype, as some notebooks set."""

    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


class Deterministic(AbstractContextManager[None]):
    """As people set who want the same result twice."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": Dtype,
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": Deterministic,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("method", ["aspl", "advdm"])
def test_the_callers_state_changes_nothing(run, given, state, method, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # class images are drawn anew
    settings = {"method": method, "settings": SMALL}
    expected = run(given, **settings)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    before = torch.get_rng_state()
    with STATES[state]():
        found = run(given, **settings)
        if state == "float64":
            assert torch.get_default_dtype() == torch.float64
        if state == "meta":
            assert torch.empty(1).device.type == "meta"
        assert torch.is_inference_mode_enabled() == (state == "inference_mode")
        assert torch.is_grad_enabled() == (state not in ("no_grad", "inference_mode"))
        assert torch.is_autocast_enabled("cpu") == (state == "autocast")
    assert same(found, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_threads_get_the_pixels_of_one_after_the_other(run, given):
    settings = [{"method": "aspl", "settings": SMALL, "seed": seed} for seed in (0, 1)]
    expected = [run(given, **each) for each in settings]
    found: dict[int, list[np.ndarray]] = {}

    def work(number: int) -> None:
        with torch.no_grad() if number else nullcontext():
            found[number] = run(given, **settings[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[number], expected[number]) for number in (0, 1))
    assert not same(*expected)
