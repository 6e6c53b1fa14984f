"""How weights are held that do not learn: what a run says of it, what it refuses, and what it computes."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from antidreambooth import api, cloak
from antidreambooth.attack.methods import Settings
from antidreambooth.diffusion import loading
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.families.stable_diffusion import StableDiffusion
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.lora import LoRA
from cli import main
from lightning_modules import backbone_module
from tests.conftest import contents, random_images, save_small_model
from tests.helpers import files, fit_of_a_victim, manifest, refused

LORA = ("--model.adaptation=LoRA", "--model.adaptation.rank=2")
LOW = "--trainer.precision=bf16-mixed"
BF16 = "--model.frozen_weights=bf16"


@pytest.fixture(scope="module")
def published_in_bf16(tmp_path_factory):
    """The small model with weights that bf16 has, though in files of fp32."""
    folder = save_small_model(tmp_path_factory.mktemp("bf16") / "model")
    for file in (*folder.glob("unet/*.safetensors"), *folder.glob("text_encoder/*.safetensors")):
        weights = {name: value.bfloat16().float() for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_a_run_on_weights_in_bf16_writes_the_same_photos(command, published_in_bf16, tmp_path):
    model = f"--model.backbone={published_in_bf16}"
    main(command(model, LOW, *LORA, out="whole"))
    main(command(model, LOW, *LORA, BF16, out="half"))
    whole, half = files(tmp_path / "whole"), files(tmp_path / "half")
    assert {name for name in whole if whole[name] != half[name]} == {"manifest.json"}
    assert manifest(tmp_path / "half")["settings"]["model"]["frozen_weights"] == "bf16"
    assert manifest(tmp_path / "whole")["settings"]["model"]["frozen_weights"] == "fp32"


def test_a_run_is_not_resumed_with_weights_held_otherwise(command):
    main(command(LOW, *LORA, BF16, rounds=1))
    refused(command(LOW, *LORA, "--ckpt_path=last"), "frozen_weights: bf16 then, fp32 now")
    main(command(LOW, *LORA, BF16, "--ckpt_path=last"))


def test_weights_in_bf16_need_a_run_in_bf16(command, small_model, photos, tmp_path):
    refused(command(BF16), "needs --trainer.precision bf16-mixed, got 32-true")
    refused(command(BF16, config="advdm"), "needs --trainer.precision bf16-mixed")
    refused(fit_of_a_victim(small_model, photos, tmp_path / "victim", BF16), "needs --trainer.precision bf16-mixed")


def test_base_models_by_plain_name_are_held_as_the_first_one(command, small_v_model, tmp_path):
    others = f"--model.ensemble.backbones=[{small_v_model}, {{name: {small_v_model}, frozen_weights: fp32}}]"
    held = []
    usual = backbone_module.load_backbone

    def noted(source: Source, encoder_only: bool) -> Backbone:
        held.append(source.frozen_weights)
        return usual(source, encoder_only)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone_module, "load_backbone", noted)
        main(command(LOW, *LORA, BF16, others, config="e-aspl", rounds=1))
    assert held == ["bf16", "bf16", "fp32"]


def test_an_unknown_way_is_named():
    source = Source("embedded")
    object.__setattr__(source, "frozen_weights", "fp8")  # the tests check types before it is looked at
    with pytest.raises(InputError, match="one of fp32, bf16, nf4: got 'fp8'"):
        source.__post_init__()


def test_a_notebook_needs_a_device_that_computes_in_bf16(small_model, monkeypatch):
    pictures = random_images(1).permute(0, 2, 3, 1).numpy()
    source = Source(str(small_model), frozen_weights="bf16")
    training = DreamBooth(learning_rate=1e-3, prior=PriorPreservation(weight=0.0))
    settings = Settings(adaptation=LoRA(rank=2), training=training)
    monkeypatch.setattr(api, "computes_in_bf16", lambda device: False)
    with pytest.raises(InputError, match="cpu does not compute in bf16"):
        cloak(pictures, source, device="cpu", rounds=1, settings=settings)
    monkeypatch.setattr(api, "computes_in_bf16", lambda device: True)
    (found,) = cloak(pictures, source, device="cpu", rounds=1, settings=settings)
    assert found.size == (16, 16)


@pytest.fixture
def four_bits(monkeypatch):
    """A machine with CUDA and bitsandbytes, on which a denoiser is loaded as usual; gives what it was asked."""
    asked: dict[str, Any] = {}
    usual = StableDiffusion.networks["unet"].from_pretrained

    def from_pretrained(place: Any, **how: Any) -> Any:
        asked.update(how)
        return usual(place, **{key: value for key, value in how.items() if key != "quantization_config"})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(loading, "BitsAndBytesConfig", lambda **how: how)
    monkeypatch.setattr(StableDiffusion.networks["unet"], "from_pretrained", from_pretrained)
    return asked


def test_the_denoiser_alone_is_asked_for_in_four_bits(small_model, four_bits):
    backbone = load_backbone(Source(str(small_model), frozen_weights="nf4"))
    assert four_bits["quantization_config"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    assert four_bits["torch_dtype"] == torch.bfloat16
    assert {weight.dtype for weight in backbone.vae.parameters()} == {torch.float32}
    assert backbone.text_encoder.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16


def test_four_bits_are_refused_where_they_do_not_work(small_model, monkeypatch):
    source = Source(str(small_model), frozen_weights="nf4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^frozen_weights nf4 works on an NVIDIA GPU only: use frozen_weights bf16"):
        load_backbone(source)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "bitsandbytes" else SimpleNamespace())
    with pytest.raises(InputError, match=r"needs bitsandbytes: pip install 'antidreambooth\[quantized\]'"):
        load_backbone(source)


def test_four_bits_are_refused_for_one_file(tmp_path, small_model):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(InputError, match=r"model\.safetensors is one file: use frozen_weights bf16"):
        load_backbone(Source(str(file), components=str(small_model), frozen_weights="nf4"))


def test_four_bits_do_not_learn(command, small_model, photos, tmp_path):
    """Said before anything is loaded; a LoRA, and what does not learn, get as far as to this machine."""
    nf4, here = "--model.frozen_weights=nf4", "works on an NVIDIA GPU only"
    refused(command(nf4, LOW), "weights of 4 bits do not learn, and Full trains them all: use LoRA")
    refused(command(nf4, LOW, *LORA), here)
    refused(command(nf4, LOW, config="advdm"), here)
    victim = fit_of_a_victim(small_model, photos, tmp_path / "victim", nf4, LOW)
    refused(victim, "weights of 4 bits do not learn")
    refused([*victim, *LORA], here)
    pictures = random_images(1).permute(0, 2, 3, 1).numpy()
    with pytest.raises(InputError, match="weights of 4 bits do not learn"):
        cloak(pictures, Source(str(small_model), frozen_weights="nf4"), device="cpu")


@pytest.fixture
def resting(monkeypatch):
    """As on a device with its own memory; gives the lists of prompts that each base model was told of."""
    told: list[list[list[str]]] = []
    usual = Backbone.rest_text_encoders

    def noted(self: Backbone, device: torch.device, prompts: Any) -> None:
        told.append([list(asked) for asked in prompts])
        usual(self, device, told[-1])

    monkeypatch.setattr(Backbone, "rest_text_encoders", noted)

    def begin() -> list[list[list[str]]]:
        monkeypatch.setattr(backbone_module, "has_own_memory", lambda device: True)
        monkeypatch.setattr(api, "has_own_memory", lambda device: True)
        return told

    return begin


@pytest.mark.parametrize(("config", "more", "models"), [("aspl", LORA, 1), ("e-fsmg", (), 2), ("advdm", (), 1)])
def test_photos_are_the_same_with_text_encoders_at_rest(command, tmp_path, resting, config, more, models):
    main(command(*more, config=config, out="usual"))
    told = resting()
    main(command(*more, config=config, out="resting"))
    assert contents(tmp_path / "usual" / "cloaked") == contents(tmp_path / "resting" / "cloaked")
    runs = [asked for asked in told if asked]
    assert len(runs) >= models
    assert all(asked for run in runs for asked in run)


def test_a_victim_is_the_same_with_text_encoders_at_rest(small_model, photos, tmp_path, resting):
    main(fit_of_a_victim(small_model, photos, tmp_path / "usual", *LORA))
    told = resting()
    main(fit_of_a_victim(small_model, photos, tmp_path / "resting", *LORA))
    assert contents(tmp_path / "usual" / "lora") == contents(tmp_path / "resting" / "lora")
    person, usual = "a photo of sks person", "a photo of person"
    assert told == [[[person], [person, usual], [usual] * 4, [person] * 4]]  # the last one is of the sample grids


def test_text_encoders_that_learn_stay(small_model, photos, tmp_path, resting):
    told = resting()
    for config, more in (("dreambooth", ()), ("textual-inversion", ())):
        main(fit_of_a_victim(small_model, photos, tmp_path / config, *more, config=config))
    assert told == []


def test_a_whole_model_is_saved_with_text_encoders_at_rest(small_model, photos, tmp_path, resting):
    told = resting()
    still = "--model.training.train_text_encoder=false"
    main(fit_of_a_victim(small_model, photos, tmp_path / "out", still))
    assert len(told) == 1
    before, after = load_backbone(str(small_model)), load_backbone(str(tmp_path / "out" / Full.folder))
    for name, weight in before.text_encoder.state_dict().items():
        assert torch.equal(weight, after.text_encoder.state_dict()[name]), name
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]
