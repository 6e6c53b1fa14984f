"""Base models of every make: which are meant, which are refused and why, and that nothing is lost on the way in."""

import json
import logging
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from antidreambooth import cloak
from antidreambooth.attack.methods import Settings
from antidreambooth.attack.parametrisation import Square
from antidreambooth.diffusion import layout
from antidreambooth.diffusion.families.stable_diffusion import StableDiffusion
from antidreambooth.diffusion.integrity import not_finite
from antidreambooth.diffusion.layout import resolution_of
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.sampling import noise_of, sample
from antidreambooth.diffusion.source import Source, locate
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.provenance import describe
from cli import main
from launch.verdict.cell import Person, make_cloak
from launch.verdict.experiment import Experiment
from tests.conftest import ROOT, random_images
from tests.helpers import make_photos, manifest, refused

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
NETWORKS = StableDiffusion.networks
parts = pytest.mark.parametrize("part", list(NETWORKS))


@pytest.fixture
def model(small_model, tmp_path):
    """A copy that may be broken."""
    return shutil.copytree(small_model, tmp_path / "models" / "base")


@pytest.fixture
def reports():
    """What diffusers and transformers say beside our line."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield said
    for logger in loggers:
        logger.removeHandler(handler)


def weights(model, part, variant=None):
    return model / part / f"{STEMS[part]}{f'.{variant}' if variant else ''}.safetensors"


def rewrite(model, part, change):
    file = weights(model, part)
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit(model, part, **values):
    file = (
        model
        / part
        / {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(part, "config.json")
    )
    known = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in known.items() if value != "absent"}))


def said(model, *words, source=None):
    """The one line that a base model is refused with; it names the model and holds all of these words."""
    with pytest.raises(InputError) as raised:
        load_backbone(source or str(model))
    line = str(raised.value)
    assert "\n" not in line
    for word in (str(model), *words):
        assert word in line, line
    return line


def pillows(count=1):
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in random_images(count)]


# --- weights: every one there, none left over, of the right shape, finite ---


def first(state):
    return min(name for name, values in state.items() if values.ndim > 1)


DAMAGED = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != first(s)}, "lacks "),
    "left over": (lambda s: {**s, "zzz.weight": torch.ones(3)}, "no place for: zzz.weight"),
    "of another shape": (lambda s: {k: v[:-1].clone() if k == first(s) else v for k, v in s.items()}, "json says"),
    "not a number": (
        lambda s: {k: v * float("nan") if k == first(s) else v for k, v in s.items()},
        "no finite numbers",
    ),
    "infinite in fp16": (lambda s: {k: (v / 0 if k == first(s) else v).half() for k, v in s.items()}, "no finite"),
}


@parts
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_weights_are_refused_by_name(model, part, kind, reports):
    change, words = DAMAGED[kind]
    name = "zzz.weight" if kind == "left over" else first(load_file(weights(model, part)))
    rewrite(model, part, change)
    reports.clear()
    said(model, part, name.removeprefix("text_model."), words)
    assert reports == []


@parts
def test_zeros_alone_are_no_weights(model, part):
    """A file whose contents never reached the disk."""
    rewrite(model, part, lambda state: {name: values * 0 for name, values in state.items()})
    said(model, part, "nothing but zeros")


@pytest.mark.parametrize("more", [1, -1])
def test_a_text_encoder_of_another_depth_is_refused(model, more):
    """It was filled with random numbers, or lost a layer."""
    depth = json.loads((model / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
    edit(model, "text_encoder", num_hidden_layers=depth + more)
    said(model, "text_encoder", "lacks encoder.layers.1" if more > 0 else "no place for: encoder.layers.0")


@pytest.mark.parametrize(
    "names",
    [
        ["text_model.embeddings.position_ids"],
        ["embeddings.position_ids"],
        [
            "logit_scale",
            "text_projection.weight",
            "visual_projection.weight",
            "vision_model.encoder.layers.0.mlp.fc1.bias",
        ],
    ],
    ids=["old", "old, without prefix", "a whole CLIP"],
)
def test_what_a_text_encoder_does_not_need_may_be_left_over(model, small_model, names):
    rewrite(model, "text_encoder", lambda state: {**state, **{name: torch.ones(2) for name in names}})
    assert load_backbone(str(model)).fingerprint() == load_backbone(str(small_model)).fingerprint()


def test_a_whole_clips_config_is_read(model, small_model):
    """Its text encoder's config is a part of it."""
    file = model / "text_encoder" / "config.json"
    file.write_text(json.dumps({"model_type": "clip", "text_config": json.loads(file.read_text())}))
    assert load_backbone(str(model)).fingerprint() == load_backbone(str(small_model)).fingerprint()


def test_nothing_is_computed_on_a_damaged_model(command, model, tmp_path, monkeypatch):
    rewrite(model, "text_encoder", DAMAGED["missing"][0])
    monkeypatch.setattr("lightning_modules.backbone_module.class_images", lambda *_, **__: pytest.fail("were drawn"))
    refused(command(f"--model.backbone={model}"), str(model), "text_encoder", "lacks")
    with pytest.raises(InputError, match="text_encoder/ lacks"):
        cloak(pillows(), backbone=str(model), rounds=1)
    assert not (tmp_path / "out" / "cloaked").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_numbers_are_finite_and_infinities_that_cancel_out_are_not(dtype):
    largest = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    assert not_finite([("large", largest), ("whole numbers", torch.arange(3)), ("none", largest[:0])]) == []
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not_finite([("a", torch.tensor([1.0, value, -value], dtype=dtype))]) == ["a"]


# --- components that do not fit, told from the small files ---

MISFITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "widths": ("text_encoder", {"hidden_size": 24}, "unet/ for texts of width 16 and a text_encoder/ of width 24"),
    "one level's width": ("unet", {"cross_attention_dim": [16, 24]}, "width [16, 24]"),
    "no width": ("unet", {"cross_attention_dim": None}, "width None"),
    "inpainting": ("unet", {"in_channels": 9}, "takes 9 channels, its vae/ gives 4"),
    "learned variance": ("unet", {"out_channels": 8}, "takes 4 channels and gives 8"),
    "latents": ("vae", {"latent_channels": 16}, "takes 4 channels, its vae/ gives 16"),
    "XL": ("unet", {"addition_embed_type": "text_time"}, "asks for addition_embed_type"),
    "classes": ("unet", {"num_class_embeds": 10}, "asks for num_class_embeds"),
    "video": ("unet", {"_class_name": "UNetMotionModel"}, "UNetMotionModel, not UNet2DConditionModel"),
    "tiny vae": ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny, not AutoencoderKL"),
    "another text encoder": ("text_encoder", {"model_type": "roberta"}, "roberta, not clip_text_model"),
    "quantized": ("text_encoder", {"quantization_config": {"load_in_8bit": True}}, "quantized weights (text_encoder/"),
    "grey pictures": ("vae", {"in_channels": 1}, "1 and 3 channels; pictures have 3"),
    "no levels": ("vae", {"block_out_channels": None}, "block_out_channels in vae/config.json"),
    "levels of words": ("unet", {"block_out_channels": ["a"]}, "block_out_channels in unet/config.json"),
    "moved latents": ("vae", {"shift_factor": 0.06}, "moves latents (shift_factor)"),
    "scale NaN": ("vae", {"scaling_factor": float("nan")}, "scaling_factor in vae/config.json"),
    "scale 0": ("vae", {"scaling_factor": 0}, "scaling_factor in vae/config.json"),
    "sample": ("scheduler", {"prediction_type": "sample"}, "predicts sample; epsilon and v_prediction work"),
    "flow": ("scheduler", {"beta_schedule": "absent"}, "no beta_schedule"),
    "unknown schedule": ("scheduler", {"beta_schedule": "nope"}, "nope"),
    "noise NaN": ("scheduler", {"beta_end": float("nan")}, "cannot be used: scheduler_config.json"),
    "noise in words": ("scheduler", {"beta_end": "a"}, "cannot be computed: scheduler_config.json"),
    "short schedule": ("scheduler", {"trained_betas": [0.1, 0.2]}, "1000 steps (num_train_timesteps)"),
    "no steps": ("scheduler", {"num_train_timesteps": 0}, "0 steps (num_train_timesteps)"),
    "few steps": (
        "scheduler",
        {"num_train_timesteps": 10},
        "10 steps (num_train_timesteps), and pictures are drawn in 50",
    ),
    "long prompts": ("tokenizer", {"model_max_length": 77}, "length 77 (model_max_length), a text_encoder/ of 3 to 24"),
    "endless prompts": ("tokenizer", {"model_max_length": "absent"}, "length None"),
    "no prompts": ("tokenizer", {"model_max_length": 2}, "length 2"),
    "not said": ("unet", {"sample_size": "absent"}, "sample_size None): give --model.resolution"),
    "no square": ("unet", {"sample_size": [8, 16]}, "sample_size [8, 16]): give --model.resolution"),
    "no size": ("unet", {"sample_size": 0}, "sample_size 0): give --model.resolution"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_told_before_weights_are_read(model, kind, monkeypatch, reports):
    part, values, words = MISFITS[kind]
    edit(model, part, **values)
    for one in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer, DDPMScheduler):
        monkeypatch.setattr(one, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(InputError) as raised:
        resolution_of(str(model))
    assert str(model) in str(raised.value)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert reports == []
    if "sample_size" not in values:
        said(model, words)


@pytest.mark.parametrize("text", ["{broken", "[1]", "", "<html>404</html>", b"\xff\xfe"])
@pytest.mark.parametrize("file", ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"])
def test_a_config_that_is_none_is_named(model, file, text):
    (model / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    line = said(model, file.partition("/")[0])
    assert line.endswith(f"with {file.partition('/')[2]}{'' if 'scheduler' in file else ' and safetensors weights'}")


def test_a_tokenizer_with_more_words_than_the_text_encoder_knows_is_refused(model, monkeypatch):
    known = json.loads((model / "text_encoder" / "config.json").read_text())["vocab_size"]
    edit(model, "text_encoder", vocab_size=known - 1)
    monkeypatch.setattr(CLIPTextModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    said(model, f"a tokenizer of {known} tokens and a text_encoder that knows {known - 1}")


def test_a_text_encoder_may_know_more_words_than_the_tokenizer(model):
    """Some are filled up to a multiple of 64."""

    def filled_up(state):
        return {k: torch.cat([v, v[:5]]) if "token_embedding" in k else v for k, v in state.items()}

    rewrite(model, "text_encoder", filled_up)
    known = json.loads((model / "text_encoder" / "config.json").read_text())["vocab_size"]
    edit(model, "text_encoder", vocab_size=known + 5)
    assert load_backbone(str(model)).embed(["a photo"])[0].isfinite().all()


@pytest.mark.parametrize(
    ("first", "more"),
    [("{model}", []), ("{small}", ["--model.ensemble.backbones=[{model}]"])],
    ids=["alone", "ensemble"],
)
def test_a_misfit_ends_the_command_line_before_anything_is_loaded(
    command, small_model, model, monkeypatch, tmp_path, first, more
):
    edit(model, "text_encoder", hidden_size=24)
    monkeypatch.setattr("lightning_modules.backbone_module.load_backbone", lambda *_: pytest.fail("a model was loaded"))
    filled = [word.format(model=model, small=small_model) for word in (f"--model.backbone={first}", *more)]
    refused(command(*filled), str(model), "they do not fit")
    assert not (tmp_path / "out").exists()


def test_a_misfit_ends_people_and_verdicts_at_once(model, photos, tmp_path):
    edit(model, "text_encoder", hidden_size=24)
    how = f"{ROOT / 'configs' / 'advdm.yaml'} --model.backbone {model}"
    folder, out = photos.parent, tmp_path / "none"
    (tmp_path / "everybody").mkdir()
    photos.rename(tmp_path / "everybody" / "ann")
    refused(["people", f"--folder={folder / 'everybody'}", f"--output={out}", f"--protection={how}"], "do not fit")
    ann = folder / "everybody" / "ann"
    refused(
        [
            "verdict",
            f"--backbone={model}",
            f"--people={{a: {{photos: {ann}, clean_photos: {ann}}}}}",
            f"--folder={out}",
        ],
        "they do not fit",
    )
    assert not out.exists()


# --- the size of images ---


@pytest.mark.parametrize("size", [8, [8, 8]])
def test_the_forms_of_a_size_are_read(model, size):
    edit(model, "unet", sample_size=size)
    assert resolution_of(str(model)) == 16
    backbone = load_backbone(str(model))
    assert sample(backbone, "a photo", noise_of(backbone, 16, range(1), seed=0), steps=2).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("size", ["absent", None, [8, 16]])
def test_a_model_that_does_not_say_its_size_works_at_a_given_one(command, model, small_model, size, tmp_path):
    edit(model, "unet", sample_size=size)
    refused(command(f"--model.backbone={model}"), "give --model.resolution")
    main(command(f"--model.backbone={model}", "--model.resolution=16", rounds=1))  # draws class images, too
    assert manifest(tmp_path / "out")["settings"]["model"]["resolution"] == 16
    with pytest.raises(InputError, match=r"cloak\(..., resolution=...\)"):
        cloak(pillows(), backbone=str(model), method="advdm", rounds=1)
    (picture,) = cloak(pillows(), backbone=str(model), method="advdm", rounds=1, resolution=16)
    (same,) = cloak(pillows(), backbone=str(small_model), method="advdm", rounds=1)
    assert picture.tobytes() == same.tobytes()


@pytest.mark.parametrize(("wanted", "ways"), [(2, "4"), (0, "4"), (-8, "4"), (3, "4"), (15, "14 or 16")])
def test_a_size_that_the_model_cannot_take_is_refused(small_model, wanted, ways):
    with pytest.raises(
        InputError, match=rf"resolution is 4 or more and a multiple of 2 .*, such as {ways}: got {wanted}$"
    ):
        resolution_of(str(small_model), wanted)


@pytest.mark.parametrize("wanted", [4, 6, 14, 16, 22])
def test_any_other_size_works(small_model, wanted):
    few = DreamBooth(prior=PriorPreservation(images=4))
    squares = Settings(training=few, parametrisation=Square())
    (picture,) = cloak(pillows(), str(small_model), "aspl", settings=squares, rounds=1, resolution=wanted)
    assert picture.size == (wanted, wanted)


def test_the_flag_is_named(command):
    refused(command("--model.resolution=15"), "--model.resolution is 4 or more and a multiple of 2")


def test_all_of_an_ensemble_take_the_size(model, small_model):
    """16 pixels are a multiple of what the first one needs, and not of what the second one needs."""
    deep = ("DownEncoderBlock2D",) * 6, ("UpDecoderBlock2D",) * 6
    AutoencoderKL(
        down_block_types=deep[0], up_block_types=deep[1], block_out_channels=(8,) * 6, norm_num_groups=4
    ).save_pretrained(model / "vae")
    with pytest.raises(InputError, match=f"resolution is 64 or more and a multiple of 32 .*{model}"):
        cloak(pillows(), backbone=str(small_model), method="e-aspl", ensemble=[str(model)], rounds=1)


# --- which model is meant; a dead network notes whoever is asked ---


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "it's & here.safetensors"])
def test_a_single_file_says_how_to_convert_it(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"a model")
    with pytest.raises(InputError, match="is a pickle" if file.suffix == ".ckpt" else "single file") as raised:
        load_backbone(str(file))
    command = str(raised.value).partition("`")[2].partition("`")[0]
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    fake = """
import sys
class StableDiffusionPipeline:
    def __init__(self, read): self.read = read
    from_single_file = classmethod(lambda cls, file: cls(file))
    def save_pretrained(self, folder): print([self.read, folder])
sys.modules["diffusers"] = sys.modules[__name__]
"""
    started = [sys.executable, "-c", fake + code]
    printed = subprocess.run(started, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str([str(file), str(file.with_suffix(""))])
    assert callable(StableDiffusionPipeline.from_single_file)  # as diffusers still has it
    assert str(raised.value).endswith(f"--model.backbone {shlex.quote(str(file.with_suffix('')))}")


@pytest.mark.parametrize("name", ["models/x.safetensors", "models/x.ckpt", "models/x.bin", "models/x"])
def test_a_file_is_never_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / name).write_bytes(b"a model")
    with pytest.raises(InputError, match=f"the backbone {name} is a (single file|file|pickle)"):
        locate(Source(name))


def test_a_typo_below_a_folder_that_exists_says_what_is_there(model, monkeypatch):
    monkeypatch.chdir(model.parent.parent)
    for name in ("plain", "vpred", ".cache"):
        (model.parent / name).mkdir()
    with pytest.raises(InputError, match=r"'models/plian' is neither a folder \(.*models holds plain and others\)"):
        load_backbone("models/plian")
    with pytest.raises(InputError, match=r"'models/zzz' is neither a folder \(.*models holds base, plain, vpred\)"):
        load_backbone("models/zzz")
    with pytest.raises(InputError, match=r"'models/base/unet/config\.json/x' is neither a folder nor a hub id"):
        load_backbone("models/base/unet/config.json/x")


@pytest.mark.parametrize(
    "name", ["nowhere/x.safetensors", "nowhere/x.ckpt", "./a/b", "a/b/c", "ab", "https://h.co/a/b"]
)
def test_what_has_not_the_form_of_a_hub_id_is_not_looked_up(name):
    with pytest.raises(InputError, match=r"is neither a folder.* nor a hub id"):
        load_backbone(name)


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300])
def test_a_name_that_no_file_can_have_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"cannot be looked for: File name too long|is neither a folder"):
        load_backbone(name)


@pytest.mark.parametrize("name", [None, 3, ["embedded"]])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(InputError, match="a backbone is 'embedded', a folder, a hub id or a Source of one, got"):
        Source.of(name)


def test_a_path_and_one_alone_are_names(small_model, small_v_model):
    assert Source.of(small_model) == Source(str(small_model))
    assert locate(Source("owner/name")) == "owner/name"
    assert Source.several(small_v_model) == Source.several([str(small_v_model)]) == [Source(str(small_v_model))]
    quick = Settings(training=DreamBooth(learning_rate=1e-3, steps=1, prior=PriorPreservation(weight=0.0)))
    pictures = [
        cloak(pillows(), small_model, "e-aspl", ensemble=others, settings=quick, rounds=1)[0].tobytes()
        for others in (small_v_model, [Source(str(small_v_model))])
    ]
    assert pictures[0] == pictures[1]


# --- variants ---


def only(model, part, *variants):
    """Renames a component's weights to those of variants, each with other values."""
    state = load_file(weights(model, part))
    weights(model, part).unlink()
    for number, variant in enumerate(variants):
        changed = {name: values + number for name, values in state.items()}
        save_file(changed, weights(model, part, variant), metadata={"format": "pt"})


@pytest.mark.parametrize("changed", [[part] for part in NETWORKS] + [list(NETWORKS)], ids="-".join)
def test_the_only_variant_is_read_without_asking(model, small_model, changed):
    for part in changed:
        only(model, part, "fp16")
    expected = load_backbone(str(small_model)).fingerprint()
    assert load_backbone(str(model)).fingerprint() == expected
    if changed == list(NETWORKS):
        assert load_backbone(Source(str(model), variant="fp16")).fingerprint() == expected


def test_plain_weights_come_before_variants(model, small_model):
    for part in NETWORKS:
        shutil.copy(weights(model, part), weights(model, part, "fp16"))
        rewrite(model, part, lambda state: {name: values + 1 for name, values in state.items()})
    plain, chosen = load_backbone(str(model)), load_backbone(Source(str(model), variant="fp16"))
    assert chosen.fingerprint() == load_backbone(str(small_model)).fingerprint() != plain.fingerprint()


@parts
def test_several_variants_and_no_plain_weights_are_named(model, part):
    for one in NETWORKS:
        only(model, one, "fp16", "non_ema") if one == part else only(model, one, "fp16")
    said(model, f"{part}/ holds several variants", "--model.variant (fp16, non_ema)", "Source(name, variant=...)")
    load_backbone(Source(str(model), variant="fp16"))
    with pytest.raises(InputError, match=r"holds no weights of this variant, but fp16"):
        load_backbone(Source(str(model), variant="bf16"))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_are_read(model, small_model, variant):
    backbone = load_backbone(str(small_model))
    for part in NETWORKS:
        shutil.rmtree(model / part)
        getattr(backbone, part).save_pretrained(model / part, variant=variant, max_shard_size="5KB")
        assert len([*(model / part).glob("*-of-*")]) > 1
    assert load_backbone(str(model)).fingerprint() == backbone.fingerprint()


@parts
def test_weights_that_are_no_safetensors_are_named(model, part):
    weights(model, part).unlink()
    said(model, f"{part}/ holds no safetensors weights")
    (model / part / "pickled.bin").write_bytes(b"")
    said(model, "pickled.bin is a pickle")


@pytest.fixture
def twofold(model):
    """Weights in two variants; those of ``good`` are the small model's."""
    for part in NETWORKS:
        only(model, part, "good", "other")
    return model


def test_a_variant_can_be_named_wherever_a_base_model_can(
    command, twofold, small_model, small_v_model, photos, tmp_path
):
    """The command line, an ensemble, Python; the result is that of the model with plain weights."""
    named = f"{{name: {twofold}, variant: good}}"
    sha = load_backbone(str(small_model)).fingerprint()
    refused(command(f"--model.backbone={twofold}", rounds=1), "--model.variant (good, other)")
    main(command(f"--model.backbone={twofold}", "--model.variant=good", rounds=1, out="one"))
    assert manifest(tmp_path / "one")["settings"]["model"]["backbone_sha256"] == sha
    refused(command(f"--model.ensemble.backbones=[{twofold}]", config="e-aspl", rounds=1), "(good, other)")
    main(command(f"--model.ensemble.backbones=[{named}]", config="e-aspl", rounds=1, out="two"))
    record = manifest(tmp_path / "two")["settings"]["model"]
    assert record["ensemble_sha256"] == [sha]
    assert record["ensemble"]["backbones"] == [describe(Source(str(twofold), variant="good", frozen_weights="fp32"))]
    source = Source(str(twofold), variant="good")
    for method, ensemble in (("advdm", ()), ("e-aspl", [source])):
        found, expected = (
            cloak(pillows(), one, method, ensemble=others, rounds=1)[0].tobytes()
            for one, others in ((source, ensemble), (str(small_model), [str(small_model)] if ensemble else ()))
        )
        assert found == expected


CPU = "--trainer.max_epochs 1 --model.pgd_steps 1 --trainer.accelerator cpu --trainer.precision 32-true"


def test_a_verdicts_runs_get_the_variant_unless_they_name_another_model(twofold, small_model, photos, tmp_path):
    how = f"{ROOT / 'configs' / 'advdm.yaml'} {CPU}"
    victim = f"{ROOT / 'configs' / 'dreambooth.yaml'}"
    experiment = Experiment(
        folder=str(tmp_path / "verdicts"),
        people={"a": Person(str(photos), str(photos))},
        protections={"this": how, "other": f"{how} --model.backbone {small_model}"},
        victims={"this": victim, "other": f"{victim} --model.backbone={small_model}"},
        backbone=str(twofold),
        variant="good",
    )
    tasks = experiment.resolve()
    for cloaked in tasks.cloaks:
        make_cloak(cloaked, main)
        record = manifest(cloaked.record.parent)["settings"]["model"]
        assert record["backbone_sha256"] == load_backbone(str(small_model)).fingerprint()
        assert record["variant"] == ("good" if cloaked.protection == "this" else None)
    for cell in tasks.cells:
        assert ("--model.variant=good" in cell.training) == (cell.victim != "other"), cell.victim
    assert {**tasks.cloaks[0].settings, "variant": "good"} == tasks.cloaks[0].settings
    with pytest.raises(InputError, match=r"--model\.variant \(good, other\)"):
        replace(experiment, variant=None).resolve()


def test_people_get_the_variant_with_their_protection(twofold, tmp_path, capsys):
    make_photos(tmp_path / "everybody" / "ann", 1, 0)
    words = ["people", f"--folder={tmp_path / 'everybody'}", f"--output={tmp_path / 'people'}", "--dry_run"]
    how = f"--protection={ROOT / 'configs' / 'advdm.yaml'} --model.backbone {twofold}"
    main([*words, f"{how} --model.variant good"])
    assert "1 to do" in capsys.readouterr().out
    refused([*words, how], "--model.variant (good, other)")


def test_fsmg_trains_a_surrogate_of_the_variant(command, twofold, small_model, tmp_path):
    more = f"--model.ensemble.backbones=[{{name: {twofold}, variant: good}}, {small_model}]"
    main(command(f"--model.backbone={twofold}", "--model.variant=other", more, config="e-fsmg", rounds=1))
    surrogates = tmp_path / "out" / "surrogates"
    records = [json.loads((folder / "surrogate.json").read_text()) for folder in surrogates.iterdir()]
    trained = {tuple(record["settings"]["model"].items()) for record in records}
    base, size = ("backbone", str(twofold)), ("resolution", 16)
    assert trained == {  # of a plain name in an ensemble what older runs recorded, too
        (base, size, ("revision", None), ("variant", "other")),
        (base, size, ("variant", "good")),
        (("backbone", str(small_model)), size),
    }
    shas = {
        manifest(folder)["settings"]["model"].get("variant"): manifest(folder)["settings"]["model"]["backbone_sha256"]
        for folder in surrogates.iterdir()
    }
    assert shas["good"] == shas[None] == load_backbone(str(small_model)).fingerprint() != shas["other"]


def test_a_plain_name_is_recorded_as_it_was(small_model, photos):
    """Finished runs are recognised by what is recorded."""
    assert Source("x").given == {"backbone": "x"}
    assert Source("x", "main", "fp16").given == {"backbone": "x", "revision": "main", "variant": "fp16"}
    assert str(Source("x")) == "x"
    experiment = Experiment(people={"a": Person(str(photos), str(photos))}, backbone=str(small_model))
    settings = experiment.resolve().cloaks[0].settings
    assert [*settings] == ["backbone", "protection", "budget", "seed", "photos", "clean_photos"]


# --- the hub ---


@pytest.fixture
def hub(small_model, monkeypatch):
    """The small model as owner/model; gives what the libraries are asked for, part by part."""
    asked: dict[str, tuple[str | None, str | None]] = {}

    def small_file(name, file, revision=None):
        assert name == "owner/model"
        asked[file] = (revision, None)
        return str(small_model / file)

    def there(kind):
        read = kind.from_pretrained

        def from_pretrained(name, subfolder, revision=None, variant=None, **how):
            assert (name, how.pop("local_files_only")) == ("owner/model", False)
            asked[subfolder] = (revision, variant)
            return read(small_model, subfolder=subfolder, **how)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    monkeypatch.setattr(layout, "hf_hub_download", small_file)
    for kind in (*NETWORKS.values(), CLIPTokenizer, DDPMScheduler):
        there(kind)
    return asked


def test_the_hub_is_asked_for_the_revision_and_the_variant(hub, small_model):
    backbone = load_backbone(Source("owner/model", "v2", "fp16"))
    assert backbone.fingerprint() == load_backbone(Source("owner/model", "v2", "fp16")).fingerprint()
    assert {revision for revision, _ in hub.values()} == {"v2"}
    assert {part for part, (_, variant) in hub.items() if variant == "fp16"} == set(NETWORKS)
    assert resolution_of("owner/model") == 16


def test_weights_that_the_hub_does_not_have_may_be_there_as_a_variant(hub, monkeypatch):
    def nothing(*_, **__):
        raise OSError("owner/model does not appear to have a file named diffusion_pytorch_model.safetensors.")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", nothing)
    with pytest.raises(InputError, match=r"such as fp16, give --model\.variant$"):
        load_backbone("owner/model")
    with pytest.raises(InputError, match="check the name, the network"):
        load_backbone(Source("owner/model", variant="fp16"))
