"""Every family of base models, forward, on a GPU that is none: text encoders rest, as they do on a true one."""

from __future__ import annotations

import pytest
import torch

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.sampling import noise_of, sample
from tests.devices.fake import CUDA, empty_on, fake_gpu, lend
from tests.devices.paths import PROMPT, a_victims_step, ready
from tests.families.tiny import SIDE, TINY, save

CPU = torch.device("cpu")
QUICK = ("flux", "sdxl")
FAMILIES = [  # Stable Diffusion has tests of its own
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in TINY
    if name not in ("sd", "sd-v", "flux-schnell")
]
# What the libraries' own code makes impossible with tensors that hold no values.
NO_TEXT = {
    "z-image": "ZImagePipeline.encode_prompt picks words by a mask: a shape that depends on values",
    "qwen-image": "QwenImagePipeline._extract_masked_hidden picks words by a mask: a shape that depends on values",
}
NO_DENOISER = {
    "lumina2": "Lumina2RotaryPosEmbed reads the prompts' lengths with tolist(): numbers that are not there",
}
NO_DRAWING = {
    **NO_DENOISER,
    "sd3": "FlowMatchEulerDiscreteScheduler.index_for_timestep looks for a time with nonzero()",
    "sana": "DPMSolverMultistepScheduler.set_timesteps turns its table into NumPy's",
}
TABLES = {"z-image": 3, "qwen-image": 2}  # the libraries' tables of angles, copied to the device with the first pass
PADDED = ("qwen-image",)  # whose network reads the number of words in each pass with prompts of different lengths
ROUNDS = {"t-aspl": 2, "checkpointing": 2}  # and passes with the person's prompt and the class's
VICTIMS = {"denoiser": 1, "lora": 1}


@pytest.fixture(scope="module", params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return save(name, tmp_path_factory.mktemp(name) / "model")


@pytest.fixture
def whole(folder) -> Backbone:
    return load_backbone(str(folder))


@pytest.fixture
def resting(name, whole) -> Backbone:
    """The model as a run on a GPU has it: it knows the run's prompts."""
    if name in NO_DENOISER:
        pytest.skip(NO_DENOISER[name])
    known, classes = [PROMPT], whole.defaults.class_prompt
    whole.rest_text_encoders(CPU, [known, [classes], [PROMPT, classes], [PROMPT] * 2])
    return whole


def on_gpu(backbone: Backbone) -> Backbone:
    """Its networks and what it remembers of prompts, on the device that is none."""
    backbone.remembered = {
        asked: type(said)(torch.empty(part.shape, dtype=part.dtype, device=CUDA) for part in said)
        for asked, said in backbone.remembered.items()
    }
    return empty_on(backbone, CUDA)


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_round_stays_on_the_device(name, resting, kind):
    with fake_gpu() as traffic:
        prepared = ready(kind, [on_gpu(resting)], CUDA, lend, SIDE)
        traffic.copies.clear()
        outcome = prepared.round()
    assert {(tensor.device, tensor.dtype) for tensor in outcome[:-1]} == {(CUDA, torch.float32)}
    assert traffic.copies.total() == TABLES.get(name, 0) + ROUNDS[kind] * (name in PADDED), traffic.copies
    assert not traffic.bytes_at


@pytest.mark.parametrize("kind", VICTIMS)
def test_a_victims_step_stays_on_the_device(name, resting, kind):
    with fake_gpu() as traffic:
        step = a_victims_step(kind, on_gpu(resting), CUDA, lend, SIDE)
        traffic.copies.clear()
        assert step().device == CUDA
    assert traffic.copies.total() == TABLES.get(name, 0) + VICTIMS[kind] * (name in PADDED), traffic.copies
    assert not traffic.bytes_at


def test_pictures_are_drawn_on_the_device(name, resting):
    if name in NO_DRAWING:
        pytest.skip(NO_DRAWING[name])
    with fake_gpu() as traffic:
        pictures = sample(on_gpu(resting), PROMPT, noise_of(resting, SIDE, range(2), seed=0), steps=2)
    assert (pictures.device, pictures.dtype) == (CUDA, torch.uint8)
    assert {place.partition(" ")[2] for place in traffic.bytes_at} == {"(eight_bits)"}


def test_prompts_are_embedded_on_the_device(name, whole):
    if name in NO_TEXT:
        pytest.skip(NO_TEXT[name])
    with torch.no_grad():
        expected = whole.embed([PROMPT, "a cat"])
    with fake_gpu():
        said = empty_on(whole, CUDA).embed([PROMPT, "a cat"])
    assert [(part.shape, part.device) for part in said] == [(part.shape, CUDA) for part in expected]
