"""Base models in one file: the same models as in a folder, wherever a base model can be named; and what is refused."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from PIL import Image
from safetensors.torch import load_file, save_file

from antidreambooth import cloak
from antidreambooth.diffusion.families import FAMILIES, family_named
from antidreambooth.diffusion.layout import bytes_of_networks, family_of, inspect, read_defaults, resolution_of
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.source import Source, locate
from antidreambooth.errors import InputError
from cli import main
from launch.verdict.cell import Person, make_cloak
from launch.verdict.experiment import Experiment
from tests.conftest import ROOT, random_images
from tests.families import original
from tests.families.tiny import SIDE, TINY, build, often, save
from tests.helpers import fit_of_a_victim, make_photos, manifest, refused

WHOLE = {  # networks in the file
    "sd": {"unet", "vae", "text_encoder"},
    "sd-v": {"unet", "vae", "text_encoder"},
    "sdxl": {"unet", "vae", "text_encoder", "text_encoder_2"},
    "sd3": {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"},
    "z-image": {"transformer", "vae"},
}


@dataclass(frozen=True)
class One:
    """A tiny model in a folder; the same in a file, beside which lies a folder that lacks the file's weights."""

    name: str
    folder: Path
    file: Path
    components: Path

    @property
    def held(self) -> set[str]:
        return WHOLE.get(self.name, {"transformer"})

    @property
    def source(self) -> Source:
        return Source(str(self.file), components=str(self.components))


def make(name: str, root: Path) -> One:
    pipeline = build(name)
    if name == "sd3":  # diffusers' converter puts the identity there
        with torch.no_grad():
            pipeline.text_encoder.text_projection.weight.copy_(torch.eye(8))
    folder = save(name, root / "folder", seed=1)  # for what belongs to it beside the pipeline
    pipeline.save_pretrained(folder)
    one = One(name, folder, original.write(name, pipeline, root / "one.safetensors"), root / "components")
    shutil.copytree(folder, one.components)
    for part in one.held:
        for weights in (one.components / part).glob("*.safetensors"):
            weights.unlink()
    return one


@pytest.fixture(scope="module", params=often(TINY))
def one(request, tmp_path_factory) -> One:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=list(WHOLE))
def fresh(request, tmp_path) -> One:
    """One that may be broken."""
    return make(request.param, tmp_path)


@pytest.fixture
def plain(tmp_path) -> One:
    """A Stable Diffusion that may be broken, for what does not depend on the family."""
    return make("sd", tmp_path)


def change(one: One, **changes) -> None:
    """Replaces weights of the file by name; None takes them out."""
    state = {**load_file(one.file), **changes}
    save_file({name: values for name, values in state.items() if values is not None}, one.file)


def said(source: Source, *words: str, load: bool = False) -> None:
    """The one line that it is refused with, before weights are read or, with ``load``, then."""
    if load:
        resolution_of(source)
    with pytest.raises(InputError) as raised:
        load_backbone(source) if load else resolution_of(source)
    line = str(raised.value)
    assert "\n" not in line
    for word in (source.name, *words):
        assert word in line, line


# --- the same model ---


def test_a_file_is_the_same_model_as_a_folder(one):
    backbone = load_backbone(one.source)
    assert backbone.fingerprint() == load_backbone(one.folder).fingerprint()
    assert {weights.dtype for weights in backbone.parameters()} == {torch.float32}
    assert not backbone.training
    assert not backbone.learned()


def test_what_small_files_say_is_read_beside_the_file(one):
    assert inspect(one.source)[2] == one.held
    assert resolution_of(one.source) == SIDE
    assert family_of(one.source) is family_of(one.folder)
    assert read_defaults(one.source) == read_defaults(one.folder)
    assert bytes_of_networks(one.source) == bytes_of_networks(one.folder)
    assert locate(one.source) == one.components


def test_diffusers_reads_the_same_from_it(one):
    """Whole pipelines where the file has all of their networks, else the network that it has."""
    kind, how = family_of(one.source), {"config": str(one.components), "local_files_only": True}
    backbone = load_backbone(one.source)
    if one.held == set(kind.networks):
        pipeline = kind.official.from_single_file(str(one.file), **how, **kind.left_out)
        found = {part: getattr(pipeline, part) for part in kind.networks}
    else:
        component = kind.networks["transformer"]
        found = {"transformer": component.from_single_file(str(one.file), subfolder="transformer", **how)}
    for part, network in found.items():
        ours = getattr(backbone, part).state_dict()
        assert ours.keys() == network.state_dict().keys()
        assert all(torch.equal(ours[name], values) for name, values in network.state_dict().items()), part


def test_diffusers_knows_every_familys_denoiser():
    """Its table is no documented API: if this fails, look where its ``from_single_file`` finds its converters now."""
    kinds = [family_named(name) for name in FAMILIES]
    assert {kind.networks[kind.denoiser_name()].__name__ for kind in kinds if kind} <= set(SINGLE_FILE_LOADABLE_CLASSES)


def test_the_tests_names_are_those_of_the_published_file():
    """By what diffusers knows a Stable Diffusion 1.x by, and by how many there are."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # its defaults are 1.5's
        names = original.unet(unet)
    assert {CHECKPOINT_KEY_NAMES["v1"], CHECKPOINT_KEY_NAMES["v2"], CHECKPOINT_KEY_NAMES["inpainting"]} <= names.keys()
    assert len(names) == 686


def test_weights_that_are_two_may_be_in_the_file_once(tmp_path):
    """Some files lack T5's second name of its embedding, with which diffusers leaves it without values."""
    one = make("sd3", tmp_path)
    change(one, **{"text_encoders.t5xxl.transformer.encoder.embed_tokens.weight": None})
    assert load_backbone(one.source).fingerprint() == load_backbone(one.folder).fingerprint()


def test_half_precision_is_computed_in_single(fresh):
    original.write(fresh.name, build(fresh.name), fresh.file, torch.float16)
    backbone, expected = load_backbone(fresh.source), load_backbone(fresh.folder)
    for name, weights in backbone.denoiser.state_dict().items():
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, expected.denoiser.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_a_folder_may_have_weights_that_the_file_has_too(one):
    """Whoever has downloaded a whole model beside the fine-tuned file: the file's are taken."""
    other = save(one.name, one.components.parent / "other", seed=1)
    found, base = load_backbone(Source(str(one.file), components=str(other))), load_backbone(other)
    expected = load_backbone(one.folder)
    for part in family_of(other).networks:
        wanted = expected if part in one.held else base
        ours = getattr(found, part).state_dict()
        assert all(torch.equal(ours[name], v) for name, v in getattr(wanted, part).state_dict().items()), part
    shutil.rmtree(other)


# --- damaged, of another kind, quantized ---


def first(one: One, prefix: str) -> str:
    return min(n for n, values in load_file(one.file).items() if n.startswith(prefix) and values.ndim > 1)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.|vae."])
def test_missing_weights_are_named_before_any_are_read(fresh, prefix):
    names = load_file(fresh.file)
    prefix = next(one for one in prefix.split("|") if any(name.startswith(one) for name in names))
    network = "vae" if "model.diff" not in prefix else family_of(fresh.source).denoiser_name()
    change(fresh, **{first(fresh, prefix): None})
    said(fresh.source, f"its {network} lacks ", "the file is damaged, or components is of another kind of model")


def test_weights_of_another_shape_are_named_before_any_are_read(fresh):
    name = first(fresh, "model.diffusion_model.")
    change(fresh, **{name: load_file(fresh.file)[name][:, :-1].clone()})
    said(fresh.source, f"its {family_of(fresh.source).denoiser_name()} holds weights of another shape: ")


TEXTS = {
    "sd": ["cond_stage_model.transformer."],
    "sdxl": ["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."],
    "sd3": [f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")],
}
texts = pytest.mark.parametrize(("name", "prefix"), [(name, one) for name, some in TEXTS.items() for one in some])


@texts
def test_missing_weights_of_a_text_encoder_are_named(name, prefix, tmp_path):
    one = make(name, tmp_path)
    gone = max(key for key in load_file(one.file) if key.startswith(prefix) and ".0." in key)  # of the first layer
    change(one, **{gone: None})
    said(one.source, "lacks ", "text_encoder", load=True)


@texts
def test_a_text_encoder_of_another_shape_is_named(name, prefix, tmp_path):
    one = make(name, tmp_path)
    gone = max(key for key in load_file(one.file) if key.startswith(prefix) and ".0." in key)
    change(one, **{gone: load_file(one.file)[gone][:-1].clone()})
    said(one.source, "shape", "text_encoder", load=True)


def test_numbers_that_are_none_are_named(fresh):
    state = load_file(fresh.file)
    held = [prefix for prefix in ("model.diffusion_model.", *TEXTS.get(fresh.name, [])) if first(fresh, prefix)]
    for prefix in held:
        name = first(fresh, prefix)
        change(fresh, **{name: state[name] * float("nan")})
        said(fresh.source, "holds values that are no finite numbers", load=True)
        change(fresh, **{name: state[name]})
    assert load_backbone(fresh.source)


def test_zeros_alone_are_no_weights(fresh):
    save_file({name: values * 0 for name, values in load_file(fresh.file).items()}, fresh.file)
    said(fresh.source, "nothing but zeros", load=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantized_weights_are_refused(fresh, dtype):
    name = first(fresh, "model.diffusion_model.")
    change(fresh, **{name: load_file(fresh.file)[name].to(dtype)})
    said(fresh.source, f"holds quantized weights ({name})")


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"<html>404</html>", "cut"])
def test_a_file_that_is_none_is_named(plain, damage):
    plain.file.write_bytes(plain.file.read_bytes()[:-100] if damage == "cut" else damage)
    said(plain.source, "the file is damaged: download it again")


@pytest.mark.parametrize(
    "name", ["sd", "sdxl", "sd3", "z-image", "flux", "flux2-klein", "qwen-image", "sana", "lumina2"]
)
def test_a_file_of_another_family_is_refused(name, tmp_path):
    """For every family, all of the others' files."""
    components = save(name, tmp_path / "components")
    for other in {*TINY} - {name, f"{name}-v", f"{name}-schnell"}:
        file = original.write(other, build(other), tmp_path / f"{other}.safetensors")
        said(Source(str(file), components=str(components)), "components is of another kind of model")


def test_a_lora_is_no_model(fresh):
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2, 2)}, fresh.file)
    if fresh.name == "sdxl":  # whose converter takes some weights by name
        said(fresh.source, "its unet lacks label_emb")
    else:
        said(fresh.source, f"holds no {family_of(fresh.source).denoiser_name()}", "a LoRA is none")


def test_weights_that_are_nowhere_are_named(fresh):
    prefixes = ("first_stage_model.", "vae.")
    change(fresh, **{name: None for name in load_file(fresh.file) if name.startswith(prefixes)})
    said(fresh.source, "neither the file nor vae/ of components holds its safetensors weights")


# --- which file, which folder ---


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_are_refused_by_name(plain, ending, beside):
    pickle = plain.file.rename(plain.file.with_suffix(ending))
    source = Source(str(pickle), components=str(plain.components) if beside else None)
    said(source, "is a pickle, which may run anything when it is read: convert it with `python -c ")


def test_without_components_it_is_said_how_to_give_them(plain):
    said(Source(str(plain.file)), "--model.components FOLDER", "Source(name, components=FOLDER)", "python -c ")


@pytest.mark.parametrize("name", ["owner/name", "nowhere", "{photos}"])
def test_components_are_a_folder_in_diffusers_layout(plain, photos, name):
    source = Source(str(plain.file), components=name.format(photos=photos))
    said(source, "as --model.components", f"{source.components} lacks model_index.json")


@pytest.mark.parametrize("name", ["embedded", "owner/name", "{folder}", "nowhere.safetensors"])
def test_components_are_for_one_file(plain, name):
    source = Source(name.format(folder=plain.folder), components=str(plain.components))
    said(source, "is no .safetensors file", "leave out --model.components, which is for one file")


def test_what_components_lack_is_named(plain):
    (plain.components / "vae" / "config.json").unlink()
    said(plain.source, "lacks vae/config.json")


# --- wherever a base model can be named ---


@pytest.fixture
def small(small_model, tmp_path) -> Source:
    """The small model in one file, which has all of its weights."""
    pipeline = StableDiffusionPipeline.from_pretrained(small_model, local_files_only=True)
    file, components = tmp_path / "small.safetensors", tmp_path / "components"
    original.write("sd", pipeline, file)
    shutil.copytree(small_model, components, ignore=shutil.ignore_patterns("*.safetensors"))
    return Source(str(file), components=str(components))


def flags(source: Source) -> list[str]:
    return [f"--model.{name}={value}" for name, value in source.given.items()]


def test_the_command_line_takes_it(command, small, small_model, tmp_path):
    refused(command(flags(small)[0], rounds=1), "--model.components FOLDER")
    main(command(*flags(small), rounds=1, out="one"))
    main(command(rounds=1, out="other"))
    found, expected = manifest(tmp_path / "one"), manifest(tmp_path / "other")
    assert found["settings"]["model"]["components"] == small.components
    assert found["settings"]["model"]["backbone_sha256"] == expected["settings"]["model"]["backbone_sha256"]
    for photo in (tmp_path / "other" / "cloaked").iterdir():
        assert (tmp_path / "one" / "cloaked" / photo.name).read_bytes() == photo.read_bytes()
    main([*command(*flags(small), rounds=2, out="one"), "--ckpt_path=last"])
    assert manifest(tmp_path / "one")["rounds"] == 2


def test_an_ensemble_takes_it(command, small, tmp_path):
    named = f"{{name: {small.name}, components: {small.components}}}"
    main(command(f"--model.ensemble.backbones=[{named}]", config="e-aspl", rounds=1))
    record = manifest(tmp_path / "out")["settings"]["model"]
    assert record["ensemble_sha256"] == [record["backbone_sha256"]]
    assert record["ensemble"]["backbones"][0]["components"] == small.components


def test_fsmg_trains_a_surrogate_on_it(command, small, small_model, tmp_path):
    main(command(*flags(small), config="fsmg", rounds=1))
    (folder,) = (tmp_path / "out" / "surrogates").iterdir()
    recorded = json.loads((folder / "surrogate.json").read_text())["settings"]["model"]
    assert (recorded["backbone"], recorded["components"]) == (small.name, small.components)


def test_a_victim_learns_on_it_and_is_tested(small, photos, tmp_path):
    words = fit_of_a_victim(Path(small.name), photos, tmp_path / "out", flags(small)[1])
    main(words)
    assert load_backbone(tmp_path / "out" / "model").fingerprint() != load_backbone(small).fingerprint()


def test_a_dry_run_counts_it(command, small, capsys, tmp_path):
    main(command(*flags(small), "--dry_run", rounds=1))
    assert "GB" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_people_and_verdicts_take_it(small, small_model, photos, tmp_path, capsys):
    make_photos(tmp_path / "everybody" / "ann", 1, 0)
    words = ["people", f"--folder={tmp_path / 'everybody'}", f"--output={tmp_path / 'people'}", "--dry_run"]
    how = f"{ROOT / 'configs' / 'advdm.yaml'} {' '.join(flag.replace('=', ' ') for flag in flags(small))}"
    main([*words, f"--protection={how}"])
    assert "1 to do" in capsys.readouterr().out
    cpu = "--trainer.max_epochs 1 --model.pgd_steps 1 --trainer.accelerator cpu --trainer.precision 32-true"
    experiment = Experiment(
        folder=str(tmp_path / "verdicts"),
        people={"a": Person(str(photos), str(photos))},
        protections={"this": f"{ROOT / 'configs' / 'advdm.yaml'} {cpu}"},
        victims={"this": f"{ROOT / 'configs' / 'dreambooth.yaml'}"},
        backbone=small.name,
        components=small.components,
    )
    (cloaked,) = experiment.resolve().cloaks
    make_cloak(cloaked, main)
    record = manifest(cloaked.record.parent)["settings"]["model"]
    assert record["backbone_sha256"] == load_backbone(small_model).fingerprint()
    assert cloaked.settings["components"] == small.components
    cell = next(cell for cell in experiment.resolve().cells if cell.trained)
    assert flags(small)[1] in cell.training


def test_python_takes_it(small, small_model):
    picture = Image.fromarray(random_images(1)[0].permute(1, 2, 0).numpy())
    found, expected = (cloak([picture], one, "advdm", rounds=1)[0] for one in (small, small_model))
    assert found.tobytes() == expected.tobytes()


def test_a_person_in_the_components_is_not_in_the_file(small, tmp_path, caplog):
    """The manifest of a victim speaks of the model beside it, not of a file that borrows its small files."""
    picture = Image.fromarray(random_images(1)[0].permute(1, 2, 0).numpy())
    model = shutil.move(small.components, tmp_path / "model")
    record = {"settings": {"model": {"training": {"instance_prompt": "a photo of sks person"}}}}
    (tmp_path / "manifest.json").write_text(json.dumps({**record, "versions": {}}))
    cloak([picture], Source(small.name, components=str(model)), "fsmg", rounds=1)
    assert "nothing says that" in caplog.text
