"""How each family learns a person, and whether the official pipeline alone can use what is saved of it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

from antidreambooth import cloak
from antidreambooth.attack.methods import Settings
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.errors import InputError
from antidreambooth.finetuning import Adaptation, CrossAttention, Full, LoRA, TextualInversion
from antidreambooth.finetuning.dreambooth import DreamBooth
from lightning_modules.aspl import ASPL
from lightning_modules.victim import Victim
from tests.conftest import random_images
from tests.families import oracle as official
from tests.families.conftest import same
from tests.families.tiny import TINY, often, save

PROMPTS = ("a photo of sks person", "sks")
STEPS = 3
FILE = "pytorch_lora_weights.safetensors"
# What diffusers trains and loads of each family.
TEXT = ("sd", "sd-v", "sdxl", "sd3", "flux", "flux-schnell")
WORDS = ("sd", "sd-v", "sdxl", "flux", "flux-schnell")
SHARED = ("z-image", "lumina2")  # whose keys and values of the text are those of the picture, too
KINDS: dict[str, tuple[Adaptation, bool, tuple[str, ...]]] = {  # is the text encoder trained, of which families
    "lora": (LoRA(rank=2), False, tuple(TINY)),
    "lora-text": (LoRA(rank=2, alpha=6), True, TEXT),
    "full": (Full(), False, tuple(TINY)),
    "full-text": (Full(), True, TEXT),
    "keys-and-values": (CrossAttention(), False, ("sd", "sd3", "z-image")),  # of each kind of attention one
    "textual-inversion": (TextualInversion(), False, WORDS),
}
TABLE = [(name, kind) for name in TINY for kind, (_, _, names) in KINDS.items() if name in names]


def rows(kind: str) -> list[tuple[str, str]]:
    """Those of the table whose adaptation's name starts so."""
    return [row for row in TABLE if row[1].startswith(kind)]


@dataclass(frozen=True)
class Learned:
    """A tiny model that has learned.

    Args:
        name: of the family.
        kind: of the adaptation.
        model: the folder of the model as it was.
        folder: what was saved.
        backbone: the trained model.
        before: its loss as it was.
    """

    name: str
    kind: str
    model: Path
    folder: Path
    backbone: Backbone
    before: Tensor

    @property
    def adaptation(self) -> Adaptation:
        return KINDS[self.kind][0]

    @property
    def prompts(self) -> list[str]:
        return list(map(self.adaptation.prompt, PROMPTS))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each family, written when it is asked for."""
    made: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return model


def learned_by(name: str, kind: str, model: Path, folder: Path) -> Learned:
    adaptation, text, _ = KINDS[kind]
    backbone = load_backbone(str(model))
    training = DreamBooth(train_text_encoder=text).completed(backbone.defaults, adaptation.role)
    adaptation.apply(backbone, training, seed=0)
    found = Learned(name, kind, model, folder, backbone, loss(backbone, list(map(adaptation.prompt, PROMPTS))).detach())
    optimizer = AdamW(backbone.learned(), lr=1e-3 if isinstance(adaptation, Full) else 1e-2)
    for _ in range(STEPS):
        loss(backbone, found.prompts).backward()
        optimizer.step()
        optimizer.zero_grad()
    adaptation.save(backbone, folder)
    return found


@pytest.fixture(scope="module", params=often(TABLE), ids="-".join)
def learned(request, models, tmp_path_factory) -> Learned:
    name, kind = request.param
    return learned_by(name, kind, models(name), tmp_path_factory.mktemp("-".join(request.param)) / "result")


@pytest.fixture(params=rows("lora"), ids="-".join)
def lora(request, models, tmp_path) -> Learned:
    """Of its own, to be damaged."""
    name, kind = request.param
    return learned_by(name, kind, models(name), tmp_path / "lora")


def loss(backbone: Backbone, prompts: list[str]) -> Tensor:
    """Of latents, noises and timesteps that are always the same."""
    shape = (len(prompts), *backbone.latent_shape(*official.SIZE))
    rows = torch.tensor([250, 800])
    told = backbone.embed(prompts)
    return backbone.denoising_loss(official.normal(shape, 1), rows, official.normal(shape, 2), told).mean()


def plain(learned: Learned) -> Any:
    """The official pipeline of what was learned, loaded as somebody would who was given the files."""
    if isinstance(learned.adaptation, Full):
        return official.load(learned.folder)
    pipe: Any = official.load(learned.model)
    if isinstance(learned.adaptation, LoRA):
        pipe.load_lora_weights(learned.folder)
    elif learned.name != "sdxl":
        pipe.load_textual_inversion(learned.folder)
    else:
        state, token = load_file(learned.folder / "learned_embeds.safetensors"), "<sks>"
        first, second = (pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)
        for key, (tokenizer, text_encoder) in {"clip_l": first, "clip_g": second}.items():
            pipe.load_textual_inversion(state[key], token, tokenizer=tokenizer, text_encoder=text_encoder)
    return pipe


def around(backbone: Backbone, pipe: Any) -> Backbone:
    """The modules of an official pipeline, with this project's loss."""
    parts = {part: getattr(pipe, part) for part in (*backbone.networks, *backbone.tokenizers)}
    return type(backbone)(
        **parts, **{name: pipe.config[name] for name in backbone.switches}, scheduler=backbone.scheduler
    )


@torch.no_grad()
def drawn(name: str, pipe: Any, backbone: Backbone, prompts: list[str]) -> Tensor:
    start = official.normal((len(prompts), *backbone.latent_shape(*official.SIZE)), 3)
    return official.draw(name, pipe, start, official.FAMILIES[name].unguided, prompts).latents


def test_it_learns(learned):
    assert loss(learned.backbone, learned.prompts) < learned.before


@pytest.mark.parametrize("name", TINY)
def test_every_family_has_keys_and_values_of_the_text_and_all_of_them_are_used(models, name):
    backbone = load_backbone(str(models(name)))
    adaptation = CrossAttention()
    adaptation.apply(backbone, adaptation.surrogate_settings(DreamBooth(), backbone.defaults), seed=0)
    loss(backbone, list(PROMPTS)).backward()
    learned = {n: weight for n, weight in backbone.named_parameters() if weight.requires_grad}
    kinds = {"attn2", "add_k_proj", "add_v_proj"} if name not in SHARED else {"layers"}
    assert all(kinds & set(n.split(".")) and "refiner" not in n for n in learned)
    assert learned
    slopes = [weight.grad for n, weight in learned.items() if n.endswith("weight")]  # a key's bias changes nothing
    assert all(slope is not None and slope.abs().max() > 0 for slope in slopes)


@torch.no_grad()
def test_the_official_pipeline_alone_has_the_trained_models_loss(learned):
    found = loss(around(learned.backbone, plain(learned)), learned.prompts)
    same(found, loss(learned.backbone, learned.prompts))
    assert (found - learned.before).abs() > 1e-4 * learned.before  # ten times what is the same


@torch.no_grad()
def test_the_official_pipeline_alone_draws_the_trained_models_pictures(learned):
    name, backbone, prompts = learned.name, learned.backbone, learned.prompts
    found = drawn(name, plain(learned), backbone, prompts)
    start = official.normal(found.shape, 3)
    same(found, backbone.draw(start, backbone.embed(prompts), None, official.STEPS, backbone.guidance[1]), atol=1e-4)
    untouched = drawn(name, official.load(learned.model), backbone, list(PROMPTS))
    assert (found - untouched).abs().max() > 1e-3


@torch.no_grad()
def test_a_fresh_backbone_takes_it_up(learned):
    fresh = load_backbone(str(learned.model))
    learned.adaptation.load(fresh, learned.folder)
    same(loss(fresh, learned.prompts), loss(learned.backbone, learned.prompts))


@pytest.mark.parametrize("learned", rows("full"), indirect=True, ids="-".join)
def test_a_full_result_is_a_model_of_the_same_family(learned):
    again = load_backbone(str(learned.folder))
    assert type(again) is type(learned.backbone)
    assert again.fingerprint() == learned.backbone.fingerprint()
    assert again.defaults == learned.backbone.defaults

    def said(folder: Path) -> dict[str, Any]:
        index = json.loads((folder / "model_index.json").read_text())
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        return {"scheduler_config": scheduler, **{key: value for key, value in index.items() if key != "_name_or_path"}}

    before, after = said(learned.model), said(learned.folder)
    if learned.name in ("sd", "sd-v"):  # the sampler that this project has always put there
        assert after["scheduler"] == ["diffusers", "DDIMScheduler"]
        before, after = ({k: v for k, v in one.items() if "scheduler" not in k} for one in (before, after))
    assert after == before


@pytest.mark.parametrize(
    ("name", "switch"), [("flux2-klein", "is_distilled"), ("sdxl", "force_zeros_for_empty_prompt")]
)
def test_what_a_folder_switches_stays_so(tmp_path, name, switch):
    file = save(name, tmp_path / "model") / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, switch: not index[switch]}))
    backbone = load_backbone(str(tmp_path / "model"))
    assert getattr(backbone, switch) is not index[switch]
    Full().save(backbone, tmp_path / "again")
    assert official.load(tmp_path / "again").config[switch] is not index[switch]
    assert getattr(load_backbone(str(tmp_path / "again")), switch) is not index[switch]


@torch.no_grad()
def test_an_empty_prompt_is_zeros_only_where_the_folder_says_so(models, tmp_path):
    backbone: Any = load_backbone(str(models("sdxl")))
    assert not any(part.any() for part in backbone.negative(2))
    backbone.force_zeros_for_empty_prompt = False
    pipe: Any = official.load(models("sdxl"))
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    expected = pipe.encode_prompt("", num_images_per_prompt=2, do_classifier_free_guidance=True)
    for part, wanted in zip(backbone.negative(2), (expected[1], expected[3]), strict=True):
        same(part, wanted)


def rewritten(folder: Path, change: Any, metadata: bool = True) -> None:
    """Replaces the weights in a LoRA's file by what ``change`` makes of them."""
    with safe_open(folder / FILE, "pt") as opened:
        kept = opened.metadata() if metadata else None
    save_file(change(load_file(folder / FILE)), folder / FILE, kept)


def test_a_lora_that_lacks_a_weight_is_refused(lora):
    name = max(load_file(lora.folder / FILE))
    rewritten(lora.folder, lambda state: {key: value for key, value in state.items() if key != name})
    layer = re.escape(name.partition(".lora")[0])
    with pytest.raises(InputError, match=rf"lacks {layer}"):
        lora.adaptation.load(load_backbone(str(lora.model)), lora.folder)


def test_a_lora_with_a_weight_too_many_is_refused(lora):
    part = lora.backbone.denoiser_name()
    rewritten(
        lora.folder, lambda state: {**state, **{f"{part}.nowhere.lora_{one}.weight": torch.ones(2, 2) for one in "AB"}}
    )
    with pytest.raises(InputError, match=rf"no place for: {part}\.nowhere"):
        lora.adaptation.load(load_backbone(str(lora.model)), lora.folder)


@torch.no_grad()
@pytest.mark.parametrize("lora", [row for row in rows("lora") if row[1] == "lora"], indirect=True, ids="-".join)
def test_a_lora_of_a_trainer_that_says_nothing_of_itself_is_taken_up(lora):
    """Its alpha is its rank, then."""
    rewritten(lora.folder, lambda state: state, metadata=False)
    fresh = load_backbone(str(lora.model))
    lora.adaptation.load(fresh, lora.folder)
    same(loss(fresh, lora.prompts), loss(lora.backbone, lora.prompts))


COMPONENTS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
BLOCKS = {  # as the original code of Stable Diffusion XL numbers them
    "down_blocks_1_attentions_0": "input_blocks_3_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
}


def as_kohya(state: dict[str, Tensor], alpha: float, numbered: bool, first: str) -> dict[str, Tensor]:
    """A LoRA in the names of the kohya-ss trainer."""
    found = {}
    for name, values in state.items():
        match = re.fullmatch(r"(.*)\.(?:lora|lora_linear_layer)(?:\.|_)(A|B|up|down)\.weight", name)
        assert match
        path, matrix = match.groups()
        part, _, layer = path.partition(".")
        if part != "unet":  # as transformers 4 has it
            layer = f"text_model.{layer.removeprefix('text_model.')}"
        layer = layer.replace(".", "_")
        if numbered:
            for ours, theirs in BLOCKS.items():
                layer = re.sub(rf"^{ours}_", f"{theirs}_", layer)
        stem = f"{first if part == 'text_encoder' else COMPONENTS[part]}_{layer}"
        found[f"{stem}.lora_{ {'A': 'down', 'B': 'up'}.get(matrix, matrix) }.weight"] = values
        found[f"{stem}.alpha"] = torch.tensor(alpha)
    return found


@torch.no_grad()
@pytest.mark.parametrize(("name", "numbered"), [("sd", False), ("sdxl", False), ("sdxl", True)])
def test_a_lora_of_the_kohya_trainer_is_taken_up(models, tmp_path, name, numbered):
    with torch.enable_grad():
        lora = learned_by(name, "lora-text", models(name), tmp_path / "lora")
    assert isinstance(lora.adaptation, LoRA)
    alpha, first = float(lora.adaptation.alpha or 0), "lora_te" if name == "sd" else "lora_te1"
    rewritten(lora.folder, lambda state: as_kohya(state, alpha, numbered, first), metadata=False)
    expected = loss(lora.backbone, lora.prompts)
    same(loss(around(lora.backbone, plain(lora)), lora.prompts), expected)
    fresh = load_backbone(str(lora.model))
    lora.adaptation.load(fresh, lora.folder)
    same(loss(fresh, lora.prompts), expected)


def test_a_word_learns_a_vector_in_each_text_encoder_that_the_file_has_a_place_for(models, tmp_path):
    found = {name: learned_by(name, "textual-inversion", models(name), tmp_path / name) for name in ("sdxl", "flux")}
    files = {name: load_file(one.folder / "learned_embeds.safetensors") for name, one in found.items()}
    assert {key: tuple(row.shape) for key, row in files["sdxl"].items()} == {"clip_l": (1, 8), "clip_g": (1, 16)}
    assert {key: tuple(row.shape) for key, row in files["flux"].items()} == {"<sks>": (8,)}
    learning = {name for name, weight in found["sdxl"].backbone.named_parameters() if weight.requires_grad}
    assert {name.partition(".")[0] for name in learning} == {"text_encoder", "text_encoder_2"}
    assert len(learning) == 2


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_word_that_is_another_or_only_half_there_is_refused(models, tmp_path, name):
    model, file = models(name), tmp_path / "learned_embeds.safetensors"
    learned_by(name, "textual-inversion", model, tmp_path)
    with pytest.raises(InputError, match="holds <sks>, not <ann>"):
        TextualInversion(token="<ann>").load(load_backbone(str(model)), tmp_path)
    one, *_ = load_file(file).items()
    save_file(dict([one, ("more", one[1].clone())] if name == "flux" else [one]), file)
    with pytest.raises(InputError, match=r"holds .*, not "):
        TextualInversion().load(load_backbone(str(model)), tmp_path)


@pytest.fixture
def unreadable(models, tmp_path):
    """A model whose weights cannot be read: whoever speaks of something else has not tried."""

    def model(name: str) -> Path:
        folder = save(name, tmp_path / name)
        for file in folder.rglob("*.safetensors"):
            file.write_bytes(b"")
        return folder

    return model


@pytest.mark.parametrize("name", [name for name in TINY if name not in WORDS])
def test_a_family_without_textual_inversion_is_refused_before_anything_is_loaded(unreadable, name):
    model = unreadable(name)
    with pytest.raises(InputError, match=f"textual inversion does not work with {words_for(name)}"):
        Victim(backbone=str(model), adaptation=TextualInversion())
    with pytest.raises(InputError, match="textual inversion does not work with"):
        ASPL(backbone=str(model), adaptation=TextualInversion())
    with pytest.raises(InputError, match="textual inversion does not work with"):
        TextualInversion().prepare(load_backbone(str(save(name, model.parent / "whole"))), False)


@pytest.mark.parametrize("name", [name for name in TINY if name not in TEXT])
def test_text_encoders_that_nobody_trains_are_refused_before_anything_is_loaded(unreadable, name):
    model, training = unreadable(name), DreamBooth(train_text_encoder=True)
    words = f"the text encoder of {words_for(name)} is not trained by anybody: leave out train_text_encoder"
    photos = list(random_images(1).permute(0, 2, 3, 1).numpy())
    for adaptation in (LoRA(), Full()):
        with pytest.raises(InputError, match=words):
            Victim(backbone=str(model), adaptation=adaptation, training=training)
        with pytest.raises(InputError, match=words):
            ASPL(backbone=str(model), adaptation=adaptation, surrogate=training)
        with pytest.raises(InputError, match=words):
            cloak(photos, backbone=str(model), settings=Settings(adaptation=adaptation, training=training))


def words_for(name: str) -> str:
    """What a message calls a family."""
    return re.escape(
        {
            "sd3": "Stable Diffusion 3 / 3.5",
            "flux2-klein": "FLUX.2 klein",
            "z-image": "Z-Image",
            "qwen-image": "Qwen-Image",
            "sana": "Sana",
            "lumina2": "Lumina-Image 2.0",
        }[name]
    )


@pytest.mark.parametrize(
    ("name", "full", "lora"),
    [
        ("sd", (5e-7, 1e-2), (1e-4, 1e-2)),
        ("sdxl", (1e-6, 1e-2), (1e-4, 1e-4)),
        ("sd3", (1e-4, 1e-4), (4e-4, 1e-4)),
        ("flux", (1e-4, 1e-4), (1e-4, 1e-4)),
        ("qwen-image", (2e-4, 1e-4), (2e-4, 1e-4)),
    ],
)
def test_rates_and_weight_decay_are_those_of_the_examples(models, tmp_path, name, full, lora):
    folder = save(name, tmp_path / "model")
    (folder / "antidreambooth.json").unlink()
    for adaptation, expected in ((Full(), full), (LoRA(), lora)):
        training = Victim(backbone=str(folder), adaptation=adaptation, resolution=64).training_settings
        assert (training.learning_rate, training.weight_decay) == expected
        assembled = adaptation.surrogate_settings(DreamBooth(), load_backbone(str(folder)).defaults)
        assert (assembled.learning_rate, assembled.weight_decay) == expected
