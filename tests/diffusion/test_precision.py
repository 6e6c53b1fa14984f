"""What must not depend on a machine: where and how tensors are made, what pictures are decoded and measured in."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.sampling import noise_of, sample
from antidreambooth.errors import InputError
from antidreambooth.evaluation.faces import find, reference
from antidreambooth.evaluation.measures import measure
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.finetuning.lora import LoRA
from benchmarks.fake_faces import FakeFaces
from tests.conftest import hostile, random_images


def lora(name: str) -> list[torch.Tensor]:
    backbone = load_backbone(name)
    LoRA(rank=2).apply(backbone, DreamBooth().completed(backbone.defaults, "lora"), seed=3)
    return list(backbone.learned())


def test_a_model_is_made_on_the_cpu_whatever_the_default_is(small_model):
    expected = load_backbone(str(small_model)).fingerprint()
    started = lora(str(small_model))
    with hostile():
        backbone = load_backbone(str(small_model))
        schedule = backbone.pipeline().scheduler.alphas_cumprod
        restarted = lora(str(small_model))
    assert {tensor.device.type for tensor in (*backbone.parameters(), *backbone.buffers(), schedule)} == {"cpu"}
    assert schedule.dtype == backbone.noising.signal.dtype == torch.float32
    assert backbone.fingerprint() == expected
    for tensor, other in zip(restarted, started, strict=True):
        assert tensor.device.type == "cpu"
        torch.testing.assert_close(tensor, other, rtol=0, atol=0)


def test_pictures_are_drawn_as_asked_and_decoded_in_fp32(backbone):
    seen: list[tuple[object, ...]] = []
    backbone.unet.register_forward_hook(lambda *_: seen.append(("unet", torch.is_autocast_enabled("cpu"))))
    backbone.vae.decoder.register_forward_hook(
        lambda *found: seen.append(("decoder", torch.is_autocast_enabled("cpu"), found[2].dtype))
    )
    noise = noise_of(backbone, 16, range(1), seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        sample(backbone, "a photo", noise, steps=2)
    assert set(seen) == {("unet", True), ("decoder", False, torch.float32)}


class Cosine(FakeFaces):
    """A distance that autocast computes in low precision: a product of matrices."""

    def distance(self, a, b):
        return 1 - torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T


def test_measures_do_not_depend_on_autocast():
    images, known = random_images(3), torch.tensor([[3.0, -2.0, 1.0]])
    expected = measure(Cosine(), known, images)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(Cosine(), known, images)
    for name, column in expected.items():
        torch.testing.assert_close(found[name], column, rtol=0, atol=0)
        assert found[name].dtype == torch.float32


class Blind(FakeFaces):
    """Finds nothing, and says where it looked."""

    def __init__(self):
        self.seen = []

    def faces(self, image):
        self.seen.append(image.device.type)
        return []


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA")
def test_a_face_model_sees_pictures_on_the_cpu_wherever_they_are():
    model = Blind()
    with FakeTensorMode():  # a GPU's tensors without a GPU
        pictures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="cuda")
        find(model, pictures)
        with pytest.raises(InputError, match="no face"):
            reference(model, [("a", pictures[0])])
    assert model.seen == ["cpu"] * 3
