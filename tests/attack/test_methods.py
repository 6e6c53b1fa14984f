"""The one builder: what a method's row and the settings become."""

import pytest
import torch

from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
from antidreambooth.attack.objectives import Denoising, LikelihoodRatio, Targeted
from antidreambooth.attack.pool import Pooled
from antidreambooth.attack.steps import Momentum
from antidreambooth.attack.surrogates import Alternating, Fixed, Offloaded
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.lora import LoRA
from antidreambooth.photos.decoding import to_float
from tests.conftest import random_images

TRAINING = DreamBooth(learning_rate=1e-3, instance_prompt="a photo of t@t person", prior=PriorPreservation(weight=0.0))


def no_classes(backbone, prior):
    pytest.fail("class images were asked for without prior preservation")


def adopted(method, backbones, **settings):
    assembly = Assembly(METHODS[method], Settings(training=TRAINING, **settings))
    assembly.adopt(backbones, no_classes, seed=0)
    return assembly


def surrogates(assembly, photos=2):
    originals = to_float(random_images(photos))
    return assembly.surrogates(originals, originals, plain_weights)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_becomes_what_its_row_says(method, small_model, small_v_model):
    row = METHODS[method]
    bare = row.surrogate == "none"
    models = [load_backbone(str(name), bare) for name in (small_model, small_v_model)[: 1 + row.several]]
    ratio = LikelihoodRatio(str(small_model)) if isinstance(row.objective(), LikelihoodRatio) else None
    assembly = adopted(method, models, objective=ratio)
    made = surrogates(assembly)
    assert (assembly.attack.steps, assembly.attack.draws) == (row.pgd_steps, 1)
    assert type(assembly.attack.objective) is type(row.objective())
    assert type(assembly.attack.rule) is type(row.step_rule())
    kinds = {{"alternating": Alternating, "pool": Pooled}.get(row.surrogate, Fixed)}
    assert {type(surrogate) for surrogate in made} == kinds
    assert [surrogate.backbone for surrogate in made] == models
    assert all(bool(model.learned()) == (row.surrogate in ("alternating", "pool")) for model in models)
    assert assembly.encoder_only == bare
    if bare:
        assert [surrogate.prompt_embedding() for surrogate in made] == [()]
        return
    wanted = "a photo of person" if row.surrogate == "untouched" else TRAINING.instance_prompt
    expected = [model.embed([wanted]) for model in models]
    for surrogate, embedding in zip(made, expected, strict=True):
        assert torch.equal(*surrogate.prompt_embedding(), *embedding)


def test_settings_reach_attack_and_surrogates(backbone):
    rule = Momentum()
    given = {"budget": 4.0, "step_size": 0.5, "pgd_steps": 3, "micro_batch": 1, "objective": Targeted("rings")}
    assembly = adopted("aspl", [backbone], adaptation=LoRA(rank=2), step_rule=rule, offload=True, **given)
    attack = assembly.attack
    assert (attack.budget, attack.step_size, attack.steps, attack.micro_batch) == (4.0, 0.5, 3, 1)
    assert attack.objective is given["objective"]
    assert attack.rule is rule
    learned = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert learned
    assert all("lora_" in name for name in learned)
    (group,) = assembly.groups()
    assert group["lr"] == 1e-3
    assert {id(p) for p in group["params"]} == {id(p) for p in backbone.learned()}
    assert isinstance(surrogates(assembly)[0], Offloaded)


@pytest.mark.parametrize("method", ["aspl", "fsmg", "advdm"])
def test_checkpointing_reaches_every_kind_of_surrogate(method, backbone):
    training = DreamBooth(learning_rate=1e-3, gradient_checkpointing=True, prior=PriorPreservation(weight=0.0))
    assembly = Assembly(METHODS[method], Settings(training=training))
    assert not backbone.unet.is_gradient_checkpointing
    assembly.adopt([backbone], no_classes, seed=0)
    assert backbone.unet.is_gradient_checkpointing
    assert backbone.vae.is_gradient_checkpointing


def test_a_prompt_of_ones_own_is_what_a_fixed_model_is_asked_for(backbone):
    for method in ("fsmg", "advdm"):
        assert adopted(method, [backbone], prompt="a photo of an old man").prompts == ["a photo of an old man"]


def test_class_images_are_asked_for_while_the_model_is_untouched(backbone):
    asked = []

    def latents(model, prior):
        asked.append((prior.class_prompt, prior.images, bool(model.learned())))
        return model.encode_all(to_float(random_images(3)), 4)

    training = DreamBooth(learning_rate=1e-3, prior=PriorPreservation(weight=0.5, images=3))
    assembly = Assembly(METHODS["aspl"], Settings(training=training))
    assembly.adopt([backbone], latents, seed=0)
    assert asked == [("a photo of person", 3, False)]
    assert len(surrogates(assembly)[0].classes.mean) == 3


def test_numbers_out_of_range_are_refused_before_any_model():
    with pytest.raises(InputError, match="budget"):
        Assembly(METHODS["aspl"], Settings(budget=0.0))
    assert isinstance(Assembly(METHODS["aspl"]).attack.objective, Denoising)
