"""What a victim of each family has learned, in the plain pipeline of diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image

from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.sampling import sample
from antidreambooth.finetuning import Full, LoRA
from cli import main
from tests.conftest import ROOT
from tests.families.tiny import TINY, often, save

FAMILIES = often(name for name in TINY if name != "sd-v")
PROMPT = "a photo of sks person"
SHORT = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(48, 40), (40, 48)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def run(model, photos, tmp_path):
    def command(config, *more, out="out"):
        main([
            "fit", f"--config={ROOT / 'configs' / config}", f"--model.backbone={model}", f"--data.photos={photos}",
            f"--trainer.default_root_dir={tmp_path / out}", *SHORT, *more,
        ])  # fmt: skip
        return tmp_path / out

    return command


@pytest.mark.parametrize("kind", ["dreambooth.yaml", "dreambooth-lora.yaml"])
def test_the_plain_pipeline_loads_what_a_victim_has_learned(run, model, tmp_path, kind):
    """It draws what our own code draws of the result, which is not what the base model draws."""
    more = ("--model.training.steps=2", "--model.training.learning_rate=1e-2", "--model.training.prior.images=2")
    out = run(kind, *more)
    base, own = load_backbone(str(model)), load_backbone(str(model))
    if kind == "dreambooth.yaml":
        plain = AutoPipelineForText2Image.from_pretrained(out / "model")
        Full().load(own, out / "model")
        assert load_backbone(str(out / "model")).fingerprint() == own.fingerprint()
    else:
        plain = AutoPipelineForText2Image.from_pretrained(model)
        plain.load_lora_weights(out / "lora")
        LoRA().load(own, out / "lora")
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *own.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    told, scale = own.embed([PROMPT]), own.guidance[1]
    with torch.no_grad():
        given = {**own.given(told), own.guidance[0]: scale, **own.options, "latents": own.pack(noise)}
        drawn = plain(**given, height=32, width=32, num_inference_steps=2, output_type="latent").images
    with torch.no_grad():
        # With the folder's own sampler, which the plain pipeline has; Stable Diffusion XL's own is another one.
        pipeline = own.pipeline(type(plain.scheduler).from_config(plain.scheduler.config))
        ours = pipeline(**given, height=32, width=32, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(drawn, ours, rtol=1e-4, atol=1e-4)
    assert not torch.equal(sample(base, PROMPT, noise, steps=2), sample(own, PROMPT, noise, steps=2))
