"""What a victim trains, and its files, which diffusers alone must be able to use."""

import json
import re
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.optim import AdamW

from antidreambooth.diffusion.defaults import Defaults, Recipe
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.sampling import Generation, noise_of, sample
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.finetuning.adaptation import Untrained
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation, dreambooth_loss
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.lora import LoRA
from antidreambooth.finetuning.textual_inversion import TextualInversion
from antidreambooth.photos.decoding import to_float
from tests.conftest import contents, random_images, save_small_model, small_unet

CPU = torch.device("cpu")
PROMPT = "a photo of sks person"

CASES = {
    "full": (Full(), True),
    "full-unet": (Full(), False),
    "lora": (LoRA(rank=2, alpha=6), False),
    "lora-text": (LoRA(rank=2), True),
    "textual-inversion": (TextualInversion(), False),
}


NAMES = list(CASES)


def posteriors(backbone, count=2):
    pictures = [to_float(random_images(count, seed=seed)) for seed in (0, 1)]
    return [backbone.encode_all(images, 8) for images in pictures]


def train(backbone, adaptation, train_text_encoder, steps=4, learning_rate=0.02):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adaptation.prepare(backbone, train_text_encoder)
    optimizer = AdamW([p for p in backbone.parameters() if p.requires_grad], lr=learning_rate)
    training = DreamBooth(instance_prompt=adaptation.prompt(PROMPT)).completed(Defaults())
    instances, _ = posteriors(backbone)
    for number in range(steps):
        dreambooth_loss(backbone, training, instances, None, Turn(number).generator(CPU)).backward()
        optimizer.step()
        optimizer.zero_grad()


def pictures(backbone, prompt=PROMPT):
    return sample(backbone, prompt, noise_of(backbone, 16, range(3), seed=0), guidance_scale=2.0, steps=4)


def pictures_of(pipeline, prompt, noise):
    """With nothing of this project: what somebody would do who was given the files."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "pt"}
    images = pipeline([prompt] * len(noise), latents=noise, **settings).images
    return (images * 255).round().to(torch.uint8)


def plain(folder):
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def assert_same(actual, expected):
    """Matrix products round by alignment: a level more or less."""
    assert (actual.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_is_that_of_diffusers_training_script(any_backbone, weight):
    """https://github.com/huggingface/diffusers/blob/main/examples/dreambooth/train_dreambooth.py, main()."""
    prior = PriorPreservation(weight=weight, class_prompt="a picture of somebody")
    training = DreamBooth(instance_prompt="a photo of sks", prior=prior).completed(Defaults())
    instances, classes = posteriors(any_backbone)
    actual = dreambooth_loss(any_backbone, training, instances, classes if weight else None, seeded(3))

    images, prompts = to_float(random_images(2)), ["a photo of sks"] * 2
    if weight:
        images = torch.cat([images, to_float(random_images(2, seed=1))])
        prompts += ["a picture of somebody"] * 2
    draw = Draw.sample(any_backbone, (len(images), 4, 8, 8), seeded(3))
    vae, scheduler, tokenizer = any_backbone.vae, any_backbone.scheduler, any_backbone.tokenizer
    distribution = vae.encode(images).latent_dist
    model_input = (distribution.mean + distribution.std * draw.posterior_noise) * vae.config.scaling_factor
    noisy = scheduler.add_noise(model_input, draw.noise, draw.timesteps)
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    prediction = any_backbone.unet(noisy, draw.timesteps, any_backbone.text_encoder(ids)[0]).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(model_input, draw.noise, draw.timesteps) if velocity else draw.noise
    if weight:
        (prediction, prediction_prior), (target, target_prior) = prediction.chunk(2), target.chunk(2)
        expected = F.mse_loss(prediction, target) + weight * F.mse_loss(prediction_prior, target_prior)
    else:
        expected = F.mse_loss(prediction, target)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_the_class_images_count_by_their_weight(backbone):
    instances, classes = posteriors(backbone)
    losses = []
    for weight in (0.0, 1.0, 3.0):
        prior = PriorPreservation(weight=weight)
        training = DreamBooth(prior=prior).completed(Defaults())
        losses.append(dreambooth_loss(backbone, training, instances, classes, seeded(0)))
    torch.testing.assert_close(losses[2] - losses[0], 3 * (losses[1] - losses[0]), rtol=1e-4, atol=1e-5)
    assert losses[1] > losses[0]


EXPECTED = {
    "full": lambda name: name.startswith(("unet.", "text_encoder.")),
    "full-unet": lambda name: name.startswith("unet."),
    "lora": lambda name: name.startswith("unet.") and ".lora_" in name,
    "lora-text": lambda name: name.startswith(("unet.", "text_encoder.")) and ".lora_" in name,
    "textual-inversion": lambda name: name.endswith("token_embedding.parametrizations.weight.original"),
}


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_meant_to_is_trained(backbone, name):
    adaptation, text = CASES[name]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    adaptation.prepare(backbone, text)
    trained = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in backbone.named_parameters() if EXPECTED[name](key)}
    assert trained
    now = backbone.state_dict()
    for key, value in before.items():
        if "token_embedding" not in key:
            assert torch.equal(now[key if key in now else renamed(key)], value), key


def renamed(key):
    """Where peft puts the weights of a layer that it wraps."""
    head, _, tail = key.rpartition(".")
    return f"{head}.base_layer.{tail}"


@pytest.mark.parametrize("name", NAMES)
def test_training_changes_what_is_meant_to_change(small_model, name):
    adaptation, text = CASES[name]
    backbone = load_backbone(str(small_model))
    untouched = load_backbone(str(small_model))
    table = untouched.text_encoder.get_input_embeddings().weight
    prepared = load_backbone(str(small_model))
    train(prepared, adaptation, text, steps=0)
    train(backbone, adaptation, text, steps=3)
    before, after = prepared.state_dict(), backbone.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    if name == "textual-inversion":
        learned = backbone.text_encoder.get_input_embeddings().weight
        assert torch.equal(learned[:-1], table)
        assert len(learned) == len(table) + 1


def test_the_new_token_starts_as_its_initializer(backbone):
    table = backbone.text_encoder.get_input_embeddings().weight.clone()
    pieces = backbone.tokenizer.encode("person", add_special_tokens=False)
    TextualInversion().prepare(backbone, False)
    assert torch.equal(backbone.text_encoder.get_input_embeddings().weight[-1], table[pieces].mean(dim=0))
    assert backbone.tokenizer.convert_tokens_to_ids("<sks>") == len(table)


def loaded_plainly(name, folder, small_model):
    if name.startswith("full"):
        return plain(folder), PROMPT
    pipeline = plain(small_model)
    if name.startswith("lora"):
        pipeline.load_lora_weights(folder)
        return pipeline, PROMPT
    pipeline.load_textual_inversion(str(folder / "learned_embeds.safetensors"))
    return pipeline, "a photo of <sks> person"


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_alone_draws_the_same_pictures(backbone, small_model, tmp_path, name):
    adaptation, text = CASES[name]
    untrained = pictures(backbone)
    train(backbone, adaptation, text)
    adaptation.save(backbone, tmp_path / "result")
    expected = pictures(backbone, adaptation.prompt(PROMPT))
    assert (expected.int() - untrained.int()).abs().max() > 3
    pipeline, prompt = loaded_plainly(name, tmp_path / "result", small_model)
    assert_same(pictures_of(pipeline, prompt, noise_of(backbone, 16, range(3), seed=0)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_backbone_takes_it_up(backbone, small_model, tmp_path, name):
    adaptation, text = CASES[name]
    train(backbone, adaptation, text)
    adaptation.save(backbone, tmp_path / "result")
    fresh = load_backbone(str(small_model))
    adaptation.load(fresh, tmp_path / "result")
    assert_same(pictures(fresh, adaptation.prompt(PROMPT)), pictures(backbone, adaptation.prompt(PROMPT)))


@pytest.mark.parametrize("name", NAMES)
def test_saving_twice_gives_the_same_files(backbone, tmp_path, name):
    adaptation, text = CASES[name]
    train(backbone, adaptation, text, steps=1)
    for name in ("one", "two"):
        adaptation.save(backbone, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_loras_targets_are_in_order(backbone, tmp_path):
    """peft keeps them as a set, whose order is another in every process."""
    targets = ["to_v", "to_q", "to_out.0", "to_k"]
    LoRA(targets=targets).prepare(backbone, False)
    LoRA().save(backbone, tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.target_modules"] == sorted(targets)


def test_a_full_result_is_a_backbone_with_the_same_defaults(backbone, tmp_path):
    backbone.defaults = replace(Defaults(), lora=Recipe(0.5, 3, 7, True), guidance_scale=3.0, class_prompt="somebody")
    train(backbone, Full(), True)
    Full().save(backbone, tmp_path / "model")
    again = load_backbone(str(tmp_path / "model"))
    assert again.defaults == backbone.defaults
    assert again.fingerprint() == backbone.fingerprint()
    assert again.scheduler.config.prediction_type == backbone.scheduler.config.prediction_type
    assert torch.equal(again.noising.signal, backbone.noising.signal)


def save_other_model(folder):
    """Twice as wide, hence of no use to the small one."""
    save_small_model(folder)
    text_encoder = load_backbone(str(folder)).text_encoder
    small_unet((32, 64), cross_attention_dim=24).save_pretrained(folder / "unet")
    config = deepcopy(text_encoder.config)
    config.hidden_size = 24
    type(text_encoder)(config).save_pretrained(folder / "text_encoder")
    return folder


def breakings():
    def missing(adaptation, folder, tmp_path):
        shutil.rmtree(folder)

    def truncated(adaptation, folder, tmp_path):
        for file in folder.rglob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-100])

    def no_weights(adaptation, folder, tmp_path):
        for file in folder.rglob("*.safetensors"):
            file.write_bytes(b"")

    def another_architecture(adaptation, folder, tmp_path):
        shutil.rmtree(folder)
        other = load_backbone(str(save_other_model(tmp_path / "other")))
        train(other, adaptation, False, steps=1)
        adaptation.save(other, folder)

    def changed(change):
        def breaking(adaptation, folder, tmp_path):
            file = max(folder.rglob("*.safetensors"))  # of a whole model: the autoencoder's
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            save_file(change(load_file(file)), file, metadata)

        return breaking

    def not_a_number(state):
        return {name: values * (float("nan") if name == max(state) else 1) for name, values in state.items()}

    def one_less(state):
        return {name: values for name, values in state.items() if name != max(state)}

    def one_more(state):
        return {**state, "unet.nowhere.lora.up.weight": torch.ones(2)}

    files = {change.__name__: changed(change) for change in (not_a_number, one_less, one_more)}
    for name, breaking in files.items():
        breaking.__name__ = name
    return [missing, truncated, no_weights, another_architecture, *files.values()]


@pytest.mark.parametrize("breaking", breakings(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["full-unet", "lora", "textual-inversion"])
def test_a_result_that_cannot_be_used_is_named(backbone, small_model, tmp_path, name, breaking):
    adaptation, text = CASES[name]
    train(backbone, adaptation, text, steps=1)
    folder = tmp_path / "out" / adaptation.folder
    adaptation.save(backbone, folder)
    breaking(adaptation, folder, tmp_path)
    with pytest.raises(InputError, match=rf"{folder} holds no result.*run `fit`") as raised:
        adaptation.load(load_backbone(str(small_model)), folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("lost", [1, 2, 1000], ids=["one matrix", "a layer", "a component"])
def test_a_lora_without_some_of_its_weights_names_them(backbone, small_model, tmp_path, part, lost):
    """Peft would start them anew and draw other pictures, without a word that reaches anybody."""
    train(backbone, LoRA(rank=2), True, steps=1)
    LoRA(rank=2).save(backbone, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    gone = sorted(name for name in state if name.startswith(f"{part}."))[:lost]
    save_file({name: values for name, values in state.items() if name not in gone}, file, metadata)
    named = re.escape(gone[0].partition(".lora")[0]) if lost < 1000 else f"all weights of the {part}"
    with pytest.raises(InputError, match=rf"pytorch_lora_weights\.safetensors lacks {named}"):
        LoRA(rank=2).load(load_backbone(str(small_model)), tmp_path)


def test_another_token_than_the_prompts_is_named(backbone, tmp_path):
    """The prompts would ask for a word that was never trained, and the pictures would look protected."""
    train(backbone, TextualInversion(token="<ann>"), False, steps=1)
    TextualInversion(token="<ann>").save(backbone, tmp_path)
    with pytest.raises(InputError, match="holds <ann>, not <bob>"):
        TextualInversion(token="<bob>").load(backbone, tmp_path)


@pytest.mark.parametrize("targets", [["to_q", "to_nowhere"], ["o_q"]])
def test_layers_that_are_not_there_are_named(backbone, targets):
    with pytest.raises(InputError, match=f"UNet2DConditionModel has no layers {targets[-1]}"):
        LoRA(targets=targets).prepare(backbone, False)


def test_layers_of_the_text_encoder_that_are_not_there_are_named(backbone):
    with pytest.raises(InputError, match="CLIPTextModel has no layers nothing"):
        LoRA(text_targets=["nothing"]).prepare(backbone, True)


def test_a_peft_that_is_too_old_for_transformers_is_named(backbone, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    with pytest.raises(InputError, match=r"CLIPTextModel takes no LoRA.*PEFT"):
        LoRA().prepare(backbone, True)


def test_textual_inversion_trains_no_text_encoder(backbone):
    with pytest.raises(InputError, match="train_text_encoder"):
        TextualInversion().prepare(backbone, True)


@pytest.mark.parametrize("token", ["<|endoftext|>", "!", "a</w>"])
def test_a_token_that_is_known_is_refused(backbone, token):
    with pytest.raises(InputError, match=r"knows .* already"):
        TextualInversion(token=token).prepare(backbone, False)


def test_untrained_trains_nothing_and_changes_nothing(backbone, tmp_path):
    before = backbone.fingerprint()
    with pytest.raises(InputError, match="Untrained has nothing to train"):
        Untrained().prepare(backbone, True)
    Untrained().load(backbone, tmp_path / "nowhere")
    assert backbone.fingerprint() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of sks person", "a photo of <sks> person"),
        ("sks", "<sks>"),
        ("sks, sks-like, (sks)", "<sks>, <sks>-like, (<sks>)"),
        ("asks sksy sks1 sks_ masks", "asks sksy sks1 sks_ masks"),
        ("a photo of a person", "a photo of a person"),
    ],
)
def test_the_token_replaces_whole_words(text, expected):
    assert TextualInversion().prompt(text) == expected


@given(words=st.lists(st.sampled_from(["sks", "asks", "sksy", "photo", "of"])), token=st.sampled_from(["<x>", r"\1"]))
def test_every_whole_word_is_replaced_and_nothing_else(words, token):
    expected = [token if word == "sks" else word for word in words]
    assert TextualInversion(token=token).prompt(" ".join(words)).split() == expected
    assert Full().prompt(" ".join(words)) == LoRA().prompt(" ".join(words)) == " ".join(words)


def test_the_noise_is_drawn_on_the_cpu_whatever_the_default_device(backbone):
    """Where a model is built for a GPU, that GPU is the default: class images are sampled there."""
    wanted = noise_of(backbone, 16, [5], seed=1)
    with torch.device("meta"):
        assert torch.equal(noise_of(backbone, 16, [5], seed=1), wanted)


def test_noise_depends_on_each_index_only(backbone):
    alone, together = noise_of(backbone, 16, [5], seed=1), noise_of(backbone, 16, [2, 5, 9], seed=1)
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, noise_of(backbone, 16, [5], seed=2))
    assert together.shape == (3, 4, 8, 8)


def test_sampling_leaves_the_model_as_it_was(backbone):
    backbone.unet.train()
    modes = [part.training for part in backbone.modules()]
    before = pictures(backbone)
    assert [part.training for part in backbone.modules()] == modes
    assert torch.equal(pictures(backbone), before)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_guidance_and_steps_are_the_models_own_unless_given(backbone):
    noise = noise_of(backbone, 16, range(2), seed=0)
    backbone.defaults = replace(Defaults(), guidance_scale=3.0, sampling_steps=3)
    own = sample(backbone, PROMPT, noise)
    assert torch.equal(own, sample(backbone, PROMPT, noise, 3.0, 3))
    assert not torch.equal(own, sample(backbone, PROMPT, noise, 3.0, 4))
    assert not torch.equal(own, sample(backbone, PROMPT, noise, 1.0, 3))


def test_defaults_come_back_from_their_file(tmp_path):
    defaults = replace(Defaults(), full=Recipe(0.1, 2, 3, False), notice="terms", prior_weight=0.25)
    defaults.write(tmp_path)
    assert Defaults.read(tmp_path, Defaults()) == defaults
    assert Defaults.read(tmp_path / "nothing", Defaults()) == Defaults()


@pytest.mark.parametrize("role", ["surrogate", "full", "lora", "textual_inversion"])
def test_what_is_not_given_is_the_models_own(role):
    recipe = Defaults().recipe(role)
    training = DreamBooth().completed(Defaults(), role)
    found = training.learning_rate, training.batch_size, training.steps, training.train_text_encoder
    assert found == (recipe.learning_rate, recipe.batch_size, recipe.steps, recipe.train_text_encoder)
    assert (training.prior.weight, training.prior.class_prompt) == (1.0, "a photo of person")
    given_all = DreamBooth(0.5, 9, 9, weight_decay=0.0, train_text_encoder=False, prior=PriorPreservation(0.0, "x"))
    assert given_all.completed(Defaults(), role) == given_all  # 0 and False are values, too
    assert training.completed(replace(Defaults(), full=Recipe(9.0, 9, 9, False)), role) == training


def test_the_published_pictures_are_asked_for():
    assert Generation().prompts == ("a photo of sks person", "a dslr portrait of sks person")
