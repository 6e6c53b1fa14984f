"""Models that a method attacks without teaching them: trained by the run before, or untouched; and a decoy."""

import json
import shutil

import numpy as np
import pytest
from diffusers import ModelMixin
from PIL import Image
from transformers import CLIPTextModel

from antidreambooth.provenance import slug
from cli import main
from tests.conftest import ROOT, SURROGATE, contents
from tests.helpers import files, manifest, refused

RATIO = "--model.objective={class_path: LikelihoodRatio, init_args: {decoy: %s}}"


def test_a_surrogate_is_trained_once_and_on_the_clean_photos(command, photos, tmp_path):
    clean = tmp_path / "clean"
    clean.mkdir()
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(clean / "other.png")
    run = command(f"--data.clean_photos={clean}", config="fsmg")
    main(run)
    (surrogate,) = (tmp_path / "out" / "surrogates").iterdir()
    assert list(json.loads((surrogate / "manifest.json").read_text())["photos"]) == ["other.png"]
    weights = surrogate / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before, first = weights.stat().st_mtime_ns, files(tmp_path / "out")
    main([*run, "--overwrite"])
    assert weights.stat().st_mtime_ns == before
    assert files(tmp_path / "out") == first
    main(command("--overwrite", config="fsmg"))
    assert list(json.loads((surrogate / "manifest.json").read_text())["photos"]) == ["a.png", "b.jpg", "c.webp"]


def test_a_nobody_is_drawn_and_learned_beside_the_person(command, small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    main(command(config="decoy", rounds=1))
    out, person = tmp_path / "out", slug(str(small_model))
    nobody, pictures = (out / "surrogates" / f"{person}-{what}" for what in ("nobody", "nobody-pictures"))
    assert {path.name for path in (out / "surrogates").iterdir()} == {person, nobody.name, pictures.name}
    assert len({path.read_bytes() for path in pictures.iterdir()}) == 4
    assert list(manifest(nobody)["photos"]) == sorted(path.name for path in pictures.iterdir())
    places = [out / "surrogates" / person, nobody]
    weights = [place / "model" / "unet" / "diffusion_pytorch_model.safetensors" for place in places]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    first, times = files(out), [path.stat().st_mtime_ns for path in weights]
    main(command("--overwrite", RATIO % (nobody / "model"), config="decoy", rounds=1))  # the same one, by name
    assert files(out)["a.png"] == first["a.png"]
    assert manifest(out)["settings"]["model"]["objective"]["decoy"] == str(nobody / "model")
    main(command("--overwrite", config="decoy", rounds=1))
    assert files(out) == first
    assert [path.stat().st_mtime_ns for path in weights] == times  # both were reused


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The nobodies that are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "antidreambooth" / "nobodies"
    return lambda: {path for path in folder.iterdir() if path.is_dir()}


def test_a_nobody_is_kept_for_the_next_person(command, small_model, tmp_path, kept):
    someone = tmp_path / "someone"
    someone.mkdir()
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(someone / "other.png")

    def cloaked(out, *flags):
        main(command(*flags, config="decoy", rounds=1, out=out))
        folder = tmp_path / out / "surrogates" / f"{slug(str(small_model))}-nobody"
        return contents(tmp_path / out / "cloaked"), json.loads((folder / "surrogate.json").read_text())["passes"]

    _, spent = cloaked("first")
    (nobody,) = kept()
    next_person, spent_again = cloaked("second", f"--data.photos={someone}")
    assert (spent, spent_again) == ({"denoiser": 2 * 2 * 2}, {})
    assert kept() == {nobody}
    shutil.rmtree(nobody)
    assert cloaked("third", f"--data.photos={someone}") == (next_person, spent)  # as if it had been trained for them


def test_another_nobody_is_not_taken_for_it(command, tmp_path, kept):
    own = tmp_path / "victim.yaml"
    for changes in ("", "# as it is called, but another one\n"):
        own.write_text((ROOT / "configs" / "dreambooth.yaml").read_text() + changes)
        surrogate = SURROGATE.replace("configs/dreambooth.yaml", str(own))
        main(command(f"--model.surrogate={surrogate}", config="decoy", rounds=1, out=f"own{len(changes)}"))
    main(command("--seed_everything=1", config="decoy", rounds=1, out="seed"))
    main(command("--model.resolution=32", config="decoy", rounds=1, out="resolution"))
    assert len(kept()) == 4


def test_base_is_the_runs_own_base_model_asked_for_its_class_prompt(command, small_model, tmp_path):
    main(command(RATIO % "base", config="decoy"))
    by_word = contents(tmp_path / "out" / "cloaked")
    assert manifest(tmp_path / "out")["settings"]["model"]["objective"]["decoy"] == "base"
    assert [path.name for path in (tmp_path / "out" / "surrogates").iterdir()] == [slug(str(small_model))]
    base = f"{small_model}, prompt: a photo of person"
    main(command("--overwrite", RATIO % base, config="decoy"))
    assert contents(tmp_path / "out" / "cloaked") == by_word
    main(command("--overwrite", RATIO % str(small_model), config="decoy"))  # the same model, by another prompt
    assert contents(tmp_path / "out" / "cloaked") != by_word


def test_a_surrogate_that_learns_is_compared_with_the_base_model_as_it_was(command, tmp_path):
    main(command(RATIO % "base", config="aspl"))
    record = manifest(tmp_path / "out")
    assert record["complete"]
    assert all(photo["largest_difference"] > 0 for photo in record["photos"])
    assert record["passes"]["denoiser"] == 2 * (2 * 6 * 3 + 6 * 2)  # rounds, models, steps, photos; learning


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ("aspl", ["--model.objective=LikelihoodRatio"], "needs a model that was taught a nobody"),
        ("advdm", ["--model.objective=LikelihoodRatio"], "run configs/decoy.yaml"),
        ("e-fsmg", ["--model.objective=LikelihoodRatio"], "is of one base model: leave out --model.ensemble"),
        ("e-fsmg", [RATIO % "base"], "is of one base model: leave out --model.ensemble"),
        ("advdm", [RATIO % "base"], "compares the base model with itself: attack a model that was trained on"),
        ("aspl", ["--model.objective=EncoderTarget"], "asks the encoder alone, which no surrogate changes"),
        ("advdm", ["--model.objective=EncoderAway"], "random_start true"),
        ("photoguard", ["--trainer.callbacks+=SampleGrid"], "leave it out of --trainer.callbacks"),
    ],
)
def test_objectives_that_do_not_fit_are_refused_before_anything_is_trained(command, config, flags, message, tmp_path):
    refused(command(*flags, config=config), message)
    assert not (tmp_path / "out" / "surrogates").exists()


@pytest.mark.parametrize("config", ["photoguard", "pid"])
def test_a_method_on_the_encoder_loads_nothing_else(command, config, tmp_path, monkeypatch):
    loaded, whole = [], ModelMixin.from_pretrained.__func__

    def noting(kind, *arguments, **options):
        loaded.append(kind.__name__)
        return whole(kind, *arguments, **options)

    monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(noting))
    monkeypatch.setattr(CLIPTextModel, "from_pretrained", lambda *_, **__: pytest.fail("a text encoder was loaded"))
    main(command(config=config, rounds=1))
    assert loaded == ["AutoencoderKL"]
    record = manifest(tmp_path / "out")
    again = 2 if config == "pid" else 1  # each step also encodes the clean photos, as it sees another part of them
    assert record["passes"] == {"denoiser": 0, "encoder": 10 * 3 * again}
    assert record["settings"]["model"]["prompts"] == []


def test_the_fixed_surrogate_is_what_is_attacked(command, tmp_path):
    main(command(config="fsmg", out="trained"))
    main(command(config="advdm", out="untouched"))
    assert files(tmp_path / "trained")["a.png"] != files(tmp_path / "untouched")["a.png"]
    models = [manifest(tmp_path / out)["settings"]["model"] for out in ("trained", "untouched")]
    assert models[0]["backbone_sha256"] != models[1]["backbone_sha256"]
    assert [model["prompts"] for model in models] == [["a photo of sks person"], ["a photo of person"]]


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        ("outputs/nowhere.yaml", "no config file of a victim"),
        ("", "no config file of a victim"),
        ("configs/dreambooth-lora.yaml --model.training.steps 1 --model.training.prior.weight 0", "no whole model"),
    ],
)
def test_surrogates_that_cannot_be_are_refused(command, surrogate, message):
    arguments = command(f"--model.surrogate={surrogate}", config="fsmg")
    refused(arguments, message)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.budget=0", "--model.budget is from 1 to 255 in 8-bit steps"),
        ("--model.ensemble.backbones=[outputs/nowhere/model]", "'outputs/nowhere/model' is neither a folder"),
        ("--model.objective={class_path: Targeted, init_args: {target: nowhere}}", "'nowhere' is no picture"),
    ],
)
def test_nothing_is_trained_before_the_settings_are_known_to_be_right(command, tmp_path, flag, message):
    refused(command(flag, config="fsmg"), message)
    assert not (tmp_path / "out" / "surrogates").exists()


def test_a_surrogates_own_flags_stay_its_own(command, tmp_path):
    """Its seed is not the attack's, and its prompt is what the attack expects."""
    own = f"{SURROGATE} --seed_everything 5 --model.training.instance_prompt 'a photo of t@t person'"
    arguments = command(f"--model.surrogate={own}", config="fsmg")
    main(arguments)
    first, record = files(tmp_path / "out"), manifest(tmp_path / "out")
    assert record["seed"] == 0
    assert record["settings"]["model"]["prompts"] == ["a photo of t@t person"]
    (surrogate,) = (tmp_path / "out" / "surrogates").iterdir()
    assert json.loads((surrogate / "manifest.json").read_text())["seed"] == 5
    assert json.loads((surrogate / "surrogate.json").read_text())["passes"] == {"denoiser": 2 * 2 * 2}
    main([*arguments, "--overwrite"])
    assert files(tmp_path / "out") == first


@pytest.mark.slow
def test_another_precision_or_resolution_wants_another_surrogate(command, tmp_path):
    """The one that is there is refused where the attack has been interrupted before its first checkpoint."""
    main(command(config="fsmg", rounds=1))
    shutil.rmtree(tmp_path / "out" / "cloaked")
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    (tmp_path / "out" / "manifest.json").unlink()
    for flag in ("--trainer.precision=bf16-mixed", "--model.resolution=32"):
        with pytest.raises(SystemExit, match=r"surrogates.* was made with other settings"):
            main(command(flag, config="fsmg", rounds=1))


def test_a_surrogate_is_not_trained_by_several_processes(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(command(config="fsmg"), "run this command with one process first")
