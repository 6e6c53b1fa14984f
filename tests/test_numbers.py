"""Numbers out of range are refused when they are given, in one line with the flag as it was typed."""

import math

import numpy as np
import pytest

from antidreambooth.attack.steps import Momentum
from antidreambooth.diffusion.defaults import Defaults, Recipe
from antidreambooth.errors import InputError, OutOfRangeError, require
from antidreambooth.evaluation.conditions import JPEG, Blur, Clean, Mix, Rescale
from callbacks import CloakedPhotos
from cli import main
from datamodules import Captioned, Protection, Subject
from lightning_modules import DeepSpeed
from tests.conftest import ROOT
from tests.helpers import refused

SEED = "from 0 to 4294967295"
PIXEL = "in 8-bit steps"
FIT = {  # config -> flag and value -> what is allowed
    "aspl": {
        "model.resolution=0": "1 or more in pixels",
        "model.resolution=-8": "1 or more in pixels",
        "model.budget=0.0": f"from 1 to 255 {PIXEL} (the paper's is about 6.4)",
        "model.budget=.nan": f"from 1 to 255 {PIXEL} (the paper's is about 6.4)",
        "model.step_size=0.0": f"above 0 and at most 255 {PIXEL}",
        "model.pgd_steps=0": "1 or more",
        "model.micro_batch=0": "1 or more",
        "model.draws=0": "1 or more",
        "model.surrogate.learning_rate=0.0": "above 0",
        "model.surrogate.learning_rate=.nan": "above 0",
        "model.surrogate.learning_rate=.inf": "above 0",
        "model.surrogate.steps=0": "1 or more",
        "model.surrogate.batch_size=0": "1 or more",
        "model.surrogate.weight_decay=-0.1": "0 or more",
        "model.surrogate.prior.weight=-1.0": "0 or more",
        "model.surrogate.prior.images=0": "1 or more",
        "seed_everything=-1": SEED,
        "seed_everything=4294967296": SEED,
        "trainer.accumulate_grad_batches=0": "1 or more",
        "trainer.gradient_clip_val=-1.0": "0 or more",
        "trainer.log_every_n_steps=-1": "0 or more",
        "trainer.num_nodes=0": "1 or more",
        "checkpoint.every_n_epochs=-1": "0 or more",
        "checkpoint.every_n_train_steps=-1": "0 or more",
        "checkpoint.save_top_k=-2": "-1 or more",
    },
    "dreambooth": {
        "model.training.learning_rate=-0.1": "above 0",
        "model.training.prior.images=0": "1 or more",
        "model.optimization.warmup_steps=-1": "0 or more",
        "model.augmentation.crop=0.0": "above 0 and at most 1",
        "model.augmentation.crop=1.5": "above 0 and at most 1",
        "model.augmentation.jpeg=0": "from 1 to 100",
        "model.augmentation.jpeg=101": "from 1 to 100",
        "model.generation.images=0": "1 or more",
        "model.generation.batch=0": "1 or more",
        "model.generation.guidance_scale=-1.0": "0 or more",
        "model.generation.sampling_steps=0": "1 or more",
        "model.generation.seed=-1": SEED,
    },
    "pretraining": {
        "model.widths=[16, 0]": "1 or more",
        "model.learning_rate=0.0": "above 0",
        "model.warmup_steps=-1": "0 or more",
        "model.steps=0": "1 or more",
        "model.batch_size=0": "1 or more",
        "model.generic=1.5": "from 0 to 1",
        "model.empty=0.75": "from 0 to 0.65",
        "model.averaging=1.0": "0 or more and below 1",
    },
}
DECAY = "{class_path: Momentum, init_args: {decay: 2.0}}"
LORA = "{class_path: LoRA, init_args: {%s: 0}}"
CROP = "{class_path: Transformed, init_args: {transforms: [{class_path: Crop, init_args: {smallest: 0.0}}]}}"
CALLBACK = "[{class_path: %s, init_args: {%s}}]"
NESTED = [  # a flag, the class and the argument that it is given, the flag's last part, what is allowed
    ("model.step_rule", DECAY, "decay", "from 0 to 1"),
    ("model.adaptation", LORA % "rank", "rank", "1 or more"),
    ("model.adaptation", LORA % "alpha", "alpha", "1 or more"),
    ("model.objective", CROP, "transforms.smallest", "above 0 and at most 1"),
    ("trainer.callbacks", CALLBACK % ("SampleGrid", "count: 0"), "count", "1 or more"),
    ("trainer.callbacks", CALLBACK % ("SampleGrid", "every_n_epochs: -1"), "every_n_epochs", "0 or more"),
    ("trainer.callbacks", CALLBACK % ("SampleGrid", "every_n_steps: -1"), "every_n_steps", "0 or more"),
    ("trainer.callbacks", CALLBACK % ("SampleGrid", "sampling_steps: 0"), "sampling_steps", "1 or more"),
    ("trainer.callbacks", CALLBACK % ("SampleGrid", "guidance_scale: -1.0"), "guidance_scale", "0 or more"),
    ("trainer.callbacks", CALLBACK % ("CloakedPhotos", "every_n_epochs: -1"), "every_n_epochs", "0 or more"),
]
COMMANDS = {
    "people --folder=examples --launcher.workers=0": "1 or more",
    "people --folder=examples --launcher.timeout_min=0": "1 or more",
    "people --folder=examples --seed=-1": SEED,
    "verdict --generation.images=0": "1 or more",
    "verdict --launcher.workers=-1": "1 or more",
    "verdict --budgets=[8.0,0.5]": f"from 1 to 255 {PIXEL}",
    "verdict --cloak_seeds=[0,-1]": SEED,
    "verdict --victim_seeds=[-1]": SEED,
}


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    monkeypatch.setattr("lightning_modules.backbone_module.load_backbone", lambda *_: pytest.fail("a model was loaded"))


def number_of(text):
    """As messages show it."""
    return {".nan": "nan", ".inf": "inf", "[16, 0]": "0"}.get(text, text)


@pytest.mark.parametrize(
    ("config", "given", "allowed"), [(config, *pair) for config, rows in FIT.items() for pair in rows.items()]
)
def test_a_fit_names_the_flag_and_the_range(small_model, tmp_path, config, given, allowed):
    flag, value = given.split("=")
    base = [f"--model.backbone={small_model}", f"--trainer.default_root_dir={tmp_path / 'out'}"]
    words = ["fit", f"--config={ROOT / 'configs' / config}.yaml", *base, f"--{given}"]
    refused(words, f"error: --{flag} is {allowed}: got {number_of(value)}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "value", "last", "allowed"), NESTED)
def test_an_argument_of_a_class_is_named_where_it_is_typed(small_model, flag, value, last, allowed):
    words = ["fit", f"--config={ROOT / 'configs' / 'aspl'}.yaml", f"--model.backbone={small_model}"]
    refused([*words, f"--{flag}={value}"], f"error: --{flag}.{last} is {allowed}: got ")


@pytest.mark.parametrize(("given", "allowed"), COMMANDS.items())
def test_commands_name_their_flags(given, allowed, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, _, value = given.rpartition(" --")[2].partition("=")
    refused(given.split(), f"error: --{name} is {allowed}: got {value.strip('[]').split(',')[-1]}")


def test_a_number_of_a_condition_is_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    jpeg = '{"posted": [{"class_path": "JPEG", "init_args": {"quality": 0}}]}'
    refused(["verdict", f"--conditions={jpeg}"], "error: --conditions.posted.quality is from 1 to 100: got 0")


def test_a_wrong_number_ends_a_dry_run_once_and_not_each_person(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["people", "--folder=examples", "--dry_run", "--protection=configs/aspl.yaml --model.pgd_steps 0"]
    refused(words, "error: --model.pgd_steps is 1 or more: got 0")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JPEG(101), "quality is from 1 to 100: got 101"),
        (lambda: Rescale(0.0), "factor is above 0 and at most 1: got 0.0"),
        (lambda: Blur(0.0), "sigma is above 0: got 0.0"),
        (lambda: Clean(strength=1.5), "strength is above 0 and at most 1: got 1.5"),
        (lambda: Clean(steps=0), "steps is 1 or more: got 0"),
        (lambda: Clean(guidance_scale=math.nan), "guidance_scale is 0 or more: got nan"),
        (lambda: Mix(-0.5), "share is from 0 to 1: got -0.5"),
        (lambda: Momentum(math.nan), "decay is from 0 to 1: got nan"),
        (lambda: Protection(resolution=0), "resolution is 1 or more: got 0"),
        (lambda: Subject(resolution=-4), "resolution is 1 or more: got -4"),
        (lambda: Subject(steps=0), "steps is 1 or more: got 0"),
        (lambda: Captioned(steps=-1), "steps is 1 or more: got -1"),
        (lambda: DeepSpeed(stage=0), "stage is from 1 to 3: got 0"),
        (lambda: CloakedPhotos(-1), "every_n_epochs is 0 or more: got -1"),
        (lambda: Recipe(0.0, 1, 1, True), "learning_rate is above 0: got 0.0"),
        (lambda: Recipe(0.1, 0, 1, True), "batch_size is 1 or more: got 0"),
        (lambda: Recipe(0.1, 1, 0, True), "steps is 1 or more: got 0"),
        (lambda: Defaults(prior_weight=-1.0), "prior_weight is 0 or more: got -1.0"),
        (lambda: Defaults(sampling_steps=0), "sampling_steps is 1 or more: got 0"),
        (lambda: Defaults(guidance_scale=math.inf), "guidance_scale is 0 or more: got inf"),
    ],
)
def test_whoever_is_made_in_a_program_says_the_same(make, message):
    with pytest.raises(OutOfRangeError) as raised:
        make()
    assert str(raised.value) == message


@pytest.mark.parametrize("text", ['{"sampling_steps": 0}', '{"prior_weight": NaN}', '{"guidance_scale": null}'])
def test_a_base_models_own_numbers_are_named_with_their_file(tmp_path, text):
    (tmp_path / "antidreambooth.json").write_text(text)
    with pytest.raises(InputError, match=rf"antidreambooth\.json cannot be used: {text[2:8]}.*; its keys"):
        Defaults.read(tmp_path, Defaults())


@pytest.mark.parametrize(
    ("config", "flag", "message"),
    [
        ("aspl", "--trainer.max_epochs=-1", "--trainer.max_epochs is the number of rounds, 1 or more: got -1"),
        ("aspl", "--trainer.limit_train_batches=0", "leave nothing to do"),
        (
            "dreambooth",
            "--trainer.max_epochs=0",
            "--trainer.max_epochs is 1, as one epoch is the whole training: got 0",
        ),
        ("dreambooth", "--trainer.max_epochs=2", "got 2; its length is --model.training.steps"),
        ("dreambooth", "--trainer.max_epochs=-1", "got -1; its length is --model.training.steps"),
        ("pretraining", "--trainer.max_epochs=2", "got 2; its length is --model.steps"),
        ("dreambooth", "--trainer.max_steps=0", "leave nothing to do"),
        ("dreambooth", "--trainer.limit_train_batches=0", "leave nothing to do"),
        ("dreambooth", "--model.optimization.schedule=none", "optimization.schedule is one of constant, "),
        ("dreambooth", "--model.generation.prompts=[]", "generation.prompts is empty"),
        ("aspl", "--trainer.callbacks=[{class_path: SampleGrid, init_args: {prompts: []}}]", "prompts are empty"),
    ],
)
def test_what_leaves_nothing_or_twice_as_much_to_do_is_refused(photos, small_model, tmp_path, config, flag, message):
    words = ["fit", f"--config={ROOT / 'configs' / config}.yaml", f"--model.backbone={small_model}", flag]
    words += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path / 'out'}"]
    if config == "pretraining":
        np.save(photos / "pictures.npy", np.zeros((1, 16, 16, 3), np.uint8))
        (photos / "captions.json").write_text('["a photo of a person"]')
        words.append(f"--data.folder={photos}")
    else:
        words.append(f"--data.photos={photos}")
    refused(words, message)


def test_a_test_of_no_batch_is_refused(photos, small_model, tmp_path):
    words = ["test", f"--config={ROOT / 'configs' / 'dreambooth'}.yaml", f"--model.backbone={small_model}"]
    words += [f"--trainer.default_root_dir={tmp_path}", f"--data.reference_photos={photos}"]
    refused([*words, "--trainer.accelerator=cpu", "--trainer.limit_test_batches=0"], "leave nothing to do")


def test_an_empty_list_of_people_is_nobody(monkeypatch):
    monkeypatch.chdir(ROOT)
    refused(["people", "--folder=examples", "--names=[]"], "--names is empty")
    refused(["verdict", "--people_folder=examples", "--people_names=[]"], "--people_names is empty")


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-1, {"least": 0}, "x is 0 or more: got -1"),
        (2, {"most": 1}, "x is at most 1: got 2"),
        (0, {"above": 0, "below": 1}, "x is above 0 and below 1: got 0"),
        (1, {"above": 0, "below": 1}, "x is above 0 and below 1: got 1"),
        (math.nan, {}, "x is a finite number: got nan"),
        (-math.inf, {"most": 1, "unit": "in m"}, "x is at most 1 in m: got -inf"),
        (5, {"least": 1, "most": 3}, "x is from 1 to 3: got 5"),
    ],
)
def test_every_kind_of_range_is_said_in_words(value, bounds, message):
    with pytest.raises(OutOfRangeError) as raised:
        require("x", value, **bounds)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("value", "bounds"),
    [(None, {"least": 1}), (0, {"least": 0}), (1, {"above": 0, "most": 1}), (0.999, {"least": 0, "below": 1}), (5, {})],
)
def test_what_is_within_passes(value, bounds):
    require("x", value, **bounds)


def test_right_numbers_are_taken(small_model, capsys):
    words = ["fit", f"--config={ROOT / 'configs' / 'aspl'}.yaml", f"--model.backbone={small_model}"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--seed_everything=true", "--trainer.gradient_clip_val=0", "--print_config"])
    assert stopped.value.code == 0
    assert "gradient_clip_val" in capsys.readouterr().out
