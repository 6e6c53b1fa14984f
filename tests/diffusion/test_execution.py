"""What makes a round cheaper changes no pixel, or rounds otherwise."""

from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from antidreambooth.attack import perturbation, surrogates
from antidreambooth.attack.canvas import SquareCanvas
from antidreambooth.attack.cost import counted
from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
from antidreambooth.attack.objectives import Targeted
from antidreambooth.attack.rounds import alternate
from antidreambooth.diffusion import recording
from antidreambooth.diffusion.execution import Execution
from antidreambooth.diffusion.precision import cast_once
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.lora import LoRA
from antidreambooth.finetuning.weights import BUCKET, Weights, zeros_like
from antidreambooth.photos.decoding import to_float
from tests.conftest import random_images

TRAINING = DreamBooth(learning_rate=1e-3, batch_size=2, steps=2, prior=PriorPreservation(weight=0.5))
BF16 = torch.bfloat16


def autocast():
    return torch.autocast("cpu", BF16)


def two_rounds(backbone, settings):
    """Photos, losses and weights after two rounds of a method in bf16."""
    originals = to_float(random_images(3))
    assembly = Assembly(METHODS["aspl"], settings)
    with autocast():
        assembly.adopt([backbone], lambda model, _: model.encode_all(originals, 4), seed=0)
        models, cloaked = assembly.surrogates(originals, originals, plain_weights), originals
        for number in range(2):
            outcome = alternate(models, SquareCanvas(originals), cloaked, assembly.attack, Turn(number))
            cloaked = outcome.state
    return [cloaked, *outcome.losses, *(weight.detach() for weight in backbone.learned())]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Calls(TorchDispatchMode):
    """Counts operations, and those that round something to bf16."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.found[str(func)] += 1
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is BF16:
            self.found["to bf16"] += 1
        return func(*args, **kwargs)


VARIANTS = {
    "full": {},
    "lora": {"adaptation": LoRA(rank=2)},
    "still-text": {"training": DreamBooth(learning_rate=1e-3, batch_size=2, steps=2, train_text_encoder=False)},
    "targeted": {"objective": Targeted()},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_what_is_computed_once_a_phase_changes_nothing(backbone, settings, monkeypatch):
    settings = Settings(**{"training": TRAINING, **settings})
    other = deepcopy(backbone)
    with Calls() as calls:
        found = two_rounds(backbone, settings)
    monkeypatch.setattr(perturbation, "cast_once", lambda *networks: nullcontext())
    monkeypatch.setattr(surrogates, "cast_once", lambda *networks: nullcontext())
    monkeypatch.setattr(surrogates, "still_prompts", lambda *_: None)
    monkeypatch.setattr(Weights, "_make_moments", lambda weights: None)
    with Calls() as before:
        expected = two_rounds(other, settings)
    assert same(found, expected)
    assert not torch.equal(found[0], to_float(random_images(3)))
    assert calls.found["to bf16"] < 0.8 * before.found["to bf16"]
    assert calls.found["aten.zeros_like.default"] + 50 < before.found["aten.zeros_like.default"]
    if settings.training.train_text_encoder is False:
        assert calls.found["aten.embedding.default"] < before.found["aten.embedding.default"]


def test_weights_are_rounded_where_autocast_rounds_them_and_come_back(backbone):
    before = dict(backbone.named_parameters())
    backbone.unet.conv_in.requires_grad_(True)
    with autocast(), cast_once(backbone.unet, backbone.vae.encoder):
        for name, module in backbone.named_modules():
            inside = name.startswith(("unet.", "vae.encoder.")) and name != "unet.conv_in"
            rounded = inside and isinstance(module, nn.Linear | nn.Conv2d)
            for key, weight in module.named_parameters(name, recurse=False):
                assert weight.dtype == (BF16 if rounded else torch.float32), key
                assert torch.equal(weight, before[key].to(weight.dtype))
                assert (weight is before[key]) != rounded
    assert all(weight is before[name] for name, weight in backbone.named_parameters())


def test_weights_are_left_alone_where_nothing_is_rounded_and_where_memory_counts(backbone):
    def kinds():
        return {weight.dtype for weight in backbone.unet.parameters()}

    with cast_once(backbone.unet):
        assert kinds() == {torch.float32}
    with autocast(), torch.autocast("cpu", enabled=False), cast_once(backbone.unet):
        assert kinds() == {torch.float32}
    with autocast(), cast_once(backbone.unet):
        assert kinds() == {torch.float32, BF16}
    backbone.checkpoint(True)
    with autocast(), cast_once(backbone.unet):
        assert kinds() == {torch.float32}


def test_weights_come_back_after_an_error(backbone):
    before = dict(backbone.named_parameters())
    with pytest.raises(KeyboardInterrupt), autocast(), cast_once(backbone.unet):
        raise KeyboardInterrupt
    assert all(weight is before[name] for name, weight in backbone.named_parameters())


def test_zeros_have_the_layout_of_weights_and_do_not_overlap():
    wide = torch.empty(BUCKET + 1)
    weights = [torch.empty(3, 5, 7, 7).to(memory_format=torch.channels_last), torch.empty(5), wide, torch.empty(2, 9)]
    made = zeros_like(weights)
    for number, (weight, zeros) in enumerate(zip(weights, made, strict=True)):
        assert (zeros.shape, zeros.stride(), zeros.dtype) == (weight.shape, weight.stride(), weight.dtype)
        assert not zeros.any()
        zeros.fill_(number + 1)
    assert all((zeros == number + 1).all() for number, zeros in enumerate(made))
    assert len({zeros.untyped_storage().data_ptr() for zeros in made}) == 3


def test_only_a_fused_adamw_gets_its_moments_from_us():
    weight = nn.Parameter(torch.ones(3))
    for optimizer in (AdamW([weight], lr=0.1), torch.optim.SGD([weight], lr=0.1)):
        Weights([weight], optimizer)._make_moments()
        assert not optimizer.state
    fused = AdamW([weight], lr=0.1, fused=True)
    Weights([weight], fused)._make_moments()
    assert {*fused.state[weight]} == {"step", "exp_avg", "exp_avg_sq"}


def test_a_decoder_that_rests_decodes_the_same(backbone, monkeypatch):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, moved, move = backbone.decode(latents), [], nn.Module.to

    def recorded(self, *where, **how):
        if self is backbone.vae.decoder:
            moved.append(str(where[0]))
        return move(self, *where, **how)

    monkeypatch.setattr(nn.Module, "to", recorded)
    two_rounds(backbone, Settings(training=TRAINING, execution=Execution(decoder_rests=True)))
    assert moved == ["cpu"]
    assert torch.equal(backbone.decode(latents), expected)
    assert moved == ["cpu", "cpu", "cpu"]  # to the latents' device, and back


@pytest.mark.parametrize("adaptation", [Full(), LoRA(rank=2)], ids=["full", "lora"])
def test_a_replayed_round_is_a_plain_one(backbone, adaptation, monkeypatch):
    """With a stand-in for CUDA graphs: replaying computes into the memory that was there when it was recorded."""
    replays: list[recording.Recording] = []
    recorded: list[recording.Recording] = []

    def warm_up(self, inputs):
        self.run(*inputs)
        self._fresh()

    def capture(self, inputs):
        recorded.append(self)
        assert {weight.dtype for weight in other.parameters()} == {torch.float32}  # rounded copies would not stay
        outputs = self.run(*inputs)
        gradients = [weight.grad for weight in self.weights]

        def replay():
            replays.append(self)
            kept = dict(recording.PASSES)
            self._fresh()
            found = [*self.run(*inputs), *(weight.grad for weight in self.weights)]
            for memory, value in zip([*outputs, *gradients], found, strict=True):
                memory.copy_(value)
            self._fresh()
            recording.PASSES.update(kept)  # a graph calls no hook

        return SimpleNamespace(replay=replay), None, outputs

    settings, other = Settings(training=TRAINING, adaptation=adaptation), deepcopy(backbone)
    with counted([backbone]) as plain:
        expected = two_rounds(backbone, settings)
    monkeypatch.setattr(recording, "RECORDED_ON", ("cpu",))
    monkeypatch.setattr(recording.Recording, "_warm_up", warm_up)
    monkeypatch.setattr(recording.Recording, "_capture", capture)
    with counted([other]) as passes:
        found = two_rounds(other, replace(settings, execution=Execution(recorded=True)))
    assert same(found, expected)
    assert passes == plain
    assert len(recorded) == 2
    assert len(replays) == 2 * (2 * 2 + 6)  # rounds, phases of two steps, PGD


def test_a_pool_ends_with_its_last_recording(monkeypatch):
    """Its handle means nothing afterwards: another run in the process needs another."""
    handles = iter(range(9))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    device = torch.device("cuda", 0)
    first, second = recording.Pool.of(device), recording.Pool.of(device)
    assert first is second
    assert recording.Pool.of(torch.device("cuda", 1)).handle == 1
    del first
    assert recording.Pool.of(device) is second
    del second
    assert recording.Pool.of(device).handle == 2


def test_recorded_steps_compute_the_same(backbone):
    settings, other = Settings(training=TRAINING), deepcopy(backbone)
    expected = two_rounds(backbone, settings)
    assert same(two_rounds(other, Settings(training=TRAINING, execution=Execution(recorded=True))), expected)


@pytest.mark.parametrize(
    "settings",
    [{"offload": True}, {"training": DreamBooth(gradient_checkpointing=True)}],
    ids=["offload", "checkpoint"],
)
def test_what_cannot_be_recorded_is_refused(settings):
    with pytest.raises(InputError, match="leave out"):
        Assembly(METHODS["aspl"], Settings(execution=Execution(recorded=True), **settings))
