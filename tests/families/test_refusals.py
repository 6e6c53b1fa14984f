"""What is no model of a family that works is refused by name, in one line, before any weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from antidreambooth.diffusion import loading
from antidreambooth.diffusion.families import FAMILIES, family_named
from antidreambooth.diffusion.layout import files_of, resolution_of
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.errors import InputError
from tests.conftest import ROOT
from tests.families.tiny import TINY, save
from tests.helpers import make_photos, refused

QUICK = ("flux", "sdxl")
OTHER_MODELS = (
    *("FluxKontextPipeline", "FluxFillPipeline", "FluxControlNetPipeline", "Flux2Pipeline", "SanaSprintPipeline"),
    *("StableDiffusionXLInpaintPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionControlNetPipeline"),
    *("StableDiffusion3InpaintPipeline", "QwenImageEditPipeline", "QwenImage21Pipeline", "fluxpipeline", None, 3),
)
WIDTHS = {  # numbers of a config that have to fit another one's, and what is said of one twice as large
    "sd": [("unet", "cross_attention_dim", "texts of width 32"), ("vae", "latent_channels", "its vae/ gives 8")],
    "sdxl": [
        ("unet", "cross_attention_dim", "takes texts of width 48"),
        ("vae", "latent_channels", "its vae/ gives 8"),
        ("text_encoder_2", "projection_dim", "there are 80"),
    ],
    "sd3": [
        ("transformer", "pooled_projection_dim", "pooled texts of 48"),
        ("vae", "latent_channels", "vae/ of 32"),
        ("text_encoder_3", "d_model", "T5 of 64"),
    ],
    "flux": [
        ("transformer", "pooled_projection_dim", "pooled texts of 16"),
        ("vae", "latent_channels", "vae/ for tokens of 128"),
        ("text_encoder_2", "d_model", "T5 of 32"),
    ],
    "flux2-klein": [("transformer", "joint_attention_dim", "for texts of 48"), ("vae", "latent_channels", "of 32")],
    "z-image": [
        ("transformer", "cap_feat_dim", "for texts of 16"),
        ("vae", "latent_channels", "vae/ of 32"),
        ("text_encoder", "hidden_size", "text_encoder/ of 16"),
    ],
    "qwen-image": [("transformer", "joint_attention_dim", "for texts of 32"), ("vae", "z_dim", "of 32")],
    "sana": [
        ("transformer", "caption_channels", "for texts of 16"),
        ("vae", "latent_channels", "vae/ of 16"),
        ("text_encoder", "hidden_size", "text_encoder/ of 16"),
    ],
    "lumina2": [
        ("transformer", "cap_feat_dim", "for texts of 16"),
        ("vae", "latent_channels", "vae/ of 32"),
        ("text_encoder", "hidden_size", "text_encoder/ of 16"),
    ],
}


@pytest.fixture(scope="module", params=WIDTHS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(name, tmp_path_factory) -> Path:
    return save(name, tmp_path_factory.mktemp(name) / "whole")


@pytest.fixture
def model(whole, tmp_path) -> Path:
    """A copy that may be broken."""
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp("given") / "photos", 1, 0)


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    """They take long."""
    for network in {part for name in FAMILIES for part in networks(name).values()}:
        monkeypatch.setattr(network, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))


def networks(pipeline: str) -> dict[str, Any]:
    kind = family_named(pipeline)
    assert kind is not None
    return dict(kind.networks)


def edit(file: Path, **values: Any) -> dict[str, Any]:
    """Changes a JSON file; gives what was in it before."""
    known = json.loads(file.read_text())
    file.write_text(json.dumps({**known, **values}))
    return known


def command(model: Path, photos: Path, out: Path) -> list[str]:
    words = ["fit", f"--config={ROOT / 'configs' / 'advdm.yaml'}", f"--data.photos={photos}"]
    return [*words, f"--model.backbone={model}", f"--trainer.default_root_dir={out}"]


def said(name: str, model: Path, photos: Path, *words: str) -> None:
    """The line; through the command line for some families, which takes longer."""
    if name in QUICK:
        refused(command(model, photos, model.parent / "out"), str(model), *words)
        return
    with pytest.raises(InputError) as raised:
        resolution_of(str(model))
    for word in (str(model), *words):
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_family_is_tried():
    assert set(WIDTHS) == set(TINY) - {"sd-v", "flux-schnell"}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_another_pipeline_is_refused_by_name_with_what_is_supported(other, photos, tmp_path):
    """Even where diffusers would take it for one of a family."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text(json.dumps({"_class_name": other}))
    refused(command(model, photos, tmp_path / "out"), f"{model} is a {other}", *FAMILIES)


def test_a_missing_component_is_named(name, model, photos):
    kind = family_named(json.loads((model / "model_index.json").read_text())["_class_name"])
    assert kind is not None
    for part, file in files_of(kind).items():
        aside = (model / part).rename(model.parent / "aside")
        said(name, model, photos, f"lacks {file}", f"{part}/")
        aside.rename(model / part)
    assert resolution_of(str(model))


def test_a_component_of_another_kind_is_named(name, model, photos):
    parts = networks(json.loads((model / "model_index.json").read_text())["_class_name"])
    for part in parts:
        file = model / part / "config.json"
        key = "model_type" if part.startswith("text") else "_class_name"
        before = edit(file, **{key: "AnotherKind"})
        said(name, model, photos, f"its {part}/ is of the kind AnotherKind")
        file.write_text(json.dumps(before))
    scheduler = model / "scheduler" / "scheduler_config.json"
    before = edit(scheduler, _class_name="EDMEulerScheduler", beta_schedule=None, trained_betas=None)
    said(name, model, photos, "EDMEulerScheduler")
    scheduler.write_text(json.dumps(before))
    assert resolution_of(str(model))


def test_components_of_other_widths_are_refused(name, model, photos):
    for part, key, words in WIDTHS[name]:
        file = model / part / "config.json"
        known = json.loads(file.read_text())
        edit(file, **{key: 2 * known[key]})
        said(name, model, photos, words)
        file.write_text(json.dumps(known))
    assert resolution_of(str(model))


def test_nothing_of_a_refused_model_is_loaded(name, model, monkeypatch):
    part, key, _ = WIDTHS[name][0]
    file = model / part / "config.json"
    edit(file, **{key: 2 * json.loads(file.read_text())[key]})
    monkeypatch.setattr(loading, "named_errors", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(InputError):
        load_backbone(str(model))
