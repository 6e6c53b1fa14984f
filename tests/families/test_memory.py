"""What needs less memory computes the same, in every family: weights in bf16, text encoders at rest, checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from antidreambooth.diffusion.backbone import Backbone, Conditioning, frozen
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import CAST
from antidreambooth.diffusion.sampling import noise_of, sample
from antidreambooth.diffusion.source import Source
from antidreambooth.finetuning.adaptation import Adaptation
from antidreambooth.finetuning.dreambooth import DreamBooth, batch_loss, embed_prompts, prompts_asked
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.lora import LoRA
from tests.families.tiny import SIDE, TINY, often, save

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # torch, of norms under autocast
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers, of Sana's sampler
]
REFUSING = ("sana", "qwen-image")  # whose autoencoders know no checkpointing


@pytest.fixture(scope="module", params=often(TINY))
def model(request, tmp_path_factory) -> Path:
    return save(request.param, tmp_path_factory.mktemp(request.param) / "model")


def rounded_as_published(backbone: Backbone) -> Backbone:
    """Norms and embeddings with values that bf16 has, as in a model that is published in bf16.

    So is Gemma's scale of its embeddings, which is no weight: the root of their width in the precision of the model.
    """
    for part in (backbone.denoiser, *backbone.text_encoders.values()):
        own = part.state_dict().keys()
        for name, values in (*part.named_parameters(), *part.named_buffers()):
            if (name in own or name.endswith("embed_scale")) and values.is_floating_point():
                values.data = values.data.bfloat16().float()
    return backbone


def images() -> Tensor:
    """Two pictures of nobody in [-1, 1]."""
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def a_step(backbone: Backbone, adaptation: Adaptation) -> list[Tensor]:
    """A LoRA's first step and the pixels' gradient under autocast: prompts, loss, gradients, weights."""
    training = DreamBooth(learning_rate=1e-2, train_text_encoder=False).completed(backbone.defaults)
    adaptation.apply(backbone, training, seed=0)
    pixels = images().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        told = embed_prompts(backbone, training, prior=True)
        posterior = backbone.encode(pixels)
        draw = Draw.sample(backbone, posterior.mean.shape, torch.Generator().manual_seed(0))
        loss = batch_loss(backbone, training, posterior, True, draw, told)
        loss.backward()
    assert pixels.grad is not None
    gradients = [weight.grad for weight in backbone.learned() if weight.grad is not None]
    return [pixels.grad, *told, loss.detach(), *gradients, *(weight.detach() for weight in backbone.learned())]


def test_a_lora_on_weights_in_bf16_is_one_on_weights_in_fp32(model):
    whole = rounded_as_published(load_backbone(str(model)))
    half = load_backbone(Source(str(model), frozen_weights="bf16"))
    expected, found = a_step(whole, LoRA(rank=2)), a_step(half, LoRA(rank=2))
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert {weight.dtype for weight in half.learned()} == {torch.float32}
    assert {weight.dtype for weight in half.vae.parameters()} == {torch.float32}


def test_what_autocast_rounds_is_held_in_bf16_and_the_rest_stays_near(model):
    whole, half = load_backbone(str(model)), load_backbone(Source(str(model), frozen_weights="bf16"))
    for part in (half.denoiser, *half.text_encoders.values()):
        kinds = {weight.dtype for layer in part.modules() if isinstance(layer, CAST) for weight in layer.parameters()}
        assert torch.bfloat16 in kinds
        others = [layer for layer in part.modules() if not isinstance(layer, CAST)]
        assert {w.dtype for layer in others for w in layer.parameters(recurse=False)} <= {torch.float32}
    held = sum(weight.element_size() * weight.numel() for weight in half.denoiser.parameters())
    assert held < 0.6 * sum(4 * weight.numel() for weight in whole.denoiser.parameters())
    # A model that is published in fp32 has its norms and embeddings rounded when they are read.
    expected, found = a_step(whole, LoRA(rank=2))[0], a_step(half, LoRA(rank=2))[0]
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.97


def test_what_learns_is_fp32_and_is_saved_whole(model, tmp_path):
    backbone = load_backbone(Source(str(model), frozen_weights="bf16"))
    backbone.rest_text_encoders(CPU, [])
    a_step(backbone, Full())
    assert {weight.dtype for weight in backbone.denoiser.parameters()} == {torch.float32}
    Full().save(backbone, tmp_path / "model")
    pipeline = backbone.official.from_pretrained(tmp_path / "model")
    for name, encoder in backbone.text_encoders.items():
        saved = getattr(pipeline, name).state_dict()
        assert all(torch.equal(saved[key], weight.float()) for key, weight in encoder.state_dict().items()), name
    assert load_backbone(str(tmp_path / "model")).denoiser.state_dict().keys() == backbone.denoiser.state_dict().keys()


@torch.no_grad()
def test_text_encoders_that_rest_say_the_same(model):
    usual, backbone = load_backbone(str(model)), load_backbone(str(model))
    fingerprint, modules = backbone.fingerprint(), list(backbone.text_encoders.values())
    calls: list[nn.Module] = []
    for encoder in modules:
        encoder.register_forward_hook(lambda module, *_: calls.append(module))
    training = DreamBooth().completed(backbone.defaults)
    asked = prompts_asked(training, 2)
    backbone.rest_text_encoders(CPU, asked)
    said = len(calls)
    assert said >= len(asked) * bool(modules)
    for prompts in asked:
        compare(backbone.embed(prompts), usual.embed(prompts))
    noise = noise_of(backbone, SIDE, range(2), seed=0)
    (usual_prompt, *_) = asked[-1]
    assert torch.equal(sample(backbone, usual_prompt, noise), sample(usual, usual_prompt, noise))
    assert len(calls) == said  # all of that was remembered
    compare(backbone.embed(["another one"]), usual.embed(["another one"]))
    assert len(calls) > said
    assert backbone.fingerprint() == fingerprint
    assert not {*modules} & {*backbone.modules()}
    assert [*backbone.text_encoders.values()] == modules


def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Both to the bit."""
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_text_encoders_are_on_the_device_only_while_they_are_asked(model, monkeypatch):
    backbone, moves = load_backbone(str(model)), []
    known_as = {id(encoder): name for name, encoder in backbone.text_encoders.items()}
    move: Any = nn.Module.to

    def recorded(self: nn.Module, *where: Any, **how: Any) -> nn.Module:
        if id(self) in known_as:
            moves.append((known_as[id(self)], torch.device(where[0]).type))
            return self
        return move(self, *where, **how) if "cuda" not in map(str, where) else self

    monkeypatch.setattr(nn.Module, "to", recorded)
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    before: list[list[tuple[str, str]]] = []  # of each time that they were asked

    def asked(self: Backbone, *_: Any) -> Conditioning:
        before.append([*moves])
        return Conditioning((torch.zeros(1),))

    monkeypatch.setattr(type(backbone), "encode_text", asked)
    monkeypatch.setattr(type(backbone), "guides", lambda self, scale: False)
    backbone.rest_text_encoders(CPU, [["a"], ["b", "c"]])
    names = [*known_as.values()]
    put_aside, there = [(name, "cpu") for name in names], [(name, "cuda") for name in names]
    back = [(name, "cpu") for name in reversed(names)]
    assert moves == [*put_aside, *there, *back]
    assert before == 2 * [[*put_aside, *there]]
    backbone.embed(["a"])
    assert len(moves) == 3 * len(names)
    backbone.embed(["d"])
    assert before[2:] == [[*put_aside, *there, *back, *there]]
    assert moves == [*put_aside, *there, *back, *there, *back]


@pytest.mark.parametrize("name", REFUSING)
def test_an_autoencoder_that_knows_no_checkpointing_is_run_twice(name, tmp_path):
    """Less is kept for the backward pass, and every gradient is the same to the bit."""
    kept: list[int] = []
    gradients: list[Tensor] = []
    for which in (False, "vae"):
        backbone = load_backbone(str(save(name, tmp_path / str(which))))
        assert not getattr(backbone.vae, "_supports_gradient_checkpointing", False)
        backbone.checkpoint(which)
        total, pixels = [0], images().requires_grad_()
        own = {weight.data_ptr() for weight in backbone.parameters()}

        def keep(tensor: Tensor, total: list[int] = total, own: set[int] = own) -> Tensor:
            total[0] += tensor.nbytes * (tensor.data_ptr() not in own)
            return tensor

        with frozen(backbone), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            posterior = backbone.encode(pixels)
        kept.append(total[0])
        (posterior.mean.square().sum() + posterior.std.sum()).backward()
        assert pixels.grad is not None
        gradients.append(pixels.grad)
    assert 0 < kept[1] < 0.1 * kept[0]
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0
