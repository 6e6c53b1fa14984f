"""Forward and backward on the device that holds no values: element by element, nothing mixes it with another one."""

import pytest
import torch

from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.finetuning.weights import Weights
from tests.devices.fake import Shapes, empty_on
from tests.devices.noise import same_noise
from tests.devices.paths import OF_EACH_KIND, VICTIMS, a_victims_step, ready

META = torch.device("meta")


def lend(backbone, training):
    """As a run does, but for AdamW's fused step, which the device does not have."""
    learned = backbone.learned()
    return Weights(learned, torch.optim.AdamW(learned, lr=training.learning_rate))


@pytest.fixture
def models(small_model, small_v_model):
    """Both small models without values."""
    return [empty_on(load_backbone(str(folder)), META) for folder in (small_model, small_v_model)]


# An offloaded model, and the models of a pool, rest on the CPU.
@pytest.mark.parametrize("name", [case for case in OF_EACH_KIND if not {"offload", "metacloak"} & {*case.values}])
def test_a_round(models, name):
    with same_noise(Shapes):
        outcome = ready(name, models, META, lend).round()
    assert {(tensor.device, tensor.dtype) for tensor in outcome[:-1]} == {(META, torch.float32)}
    assert outcome.state.shape == ((6 * 32 * 32 + 3 * 24 * 32,) if "own size" in name else (3, 3, 16, 16))


@pytest.mark.parametrize("name", VICTIMS)
def test_a_victims_step(models, name):
    backbone, _ = models
    with same_noise(Shapes):
        assert a_victims_step(name, backbone, META, lend)().device == META
    assert {tensor.device for tensor in (*backbone.parameters(), *backbone.buffers())} == {META}
