"""The formulas, against diffusers' own; loading, and what cannot be loaded."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from antidreambooth.diffusion.backbone import frozen
from antidreambooth.diffusion.defaults import Recipe
from antidreambooth.diffusion.layout import bytes_of_networks, read_defaults, resolution_of
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import to_float
from tests.conftest import random_images


def test_denoising_loss_is_diffusers(any_backbone):
    scheduler, unet, vae = any_backbone.scheduler, any_backbone.unet, any_backbone.vae
    images = to_float(random_images(4))
    posterior_noise, noise = torch.randn(2, 4, 4, 8, 8)
    timesteps = torch.tensor([0, 17, 500, 999])
    embeddings = any_backbone.embed(["a photo of sks person"]).expanded(4)

    dist = vae.encode(images).latent_dist
    latents = (dist.mean + dist.std * posterior_noise) * vae.config.scaling_factor
    prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, *embeddings).sample
    kind = scheduler.config.prediction_type
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    expected = F.mse_loss(prediction.float(), target.float(), reduction="mean")

    actual = any_backbone.denoising_loss(
        any_backbone.encode(images).sample(posterior_noise), timesteps, noise, embeddings
    ).mean()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_embedding_is_the_pipelines(backbone):
    prompt = "a photo of sks person"
    expected, _ = backbone.pipeline().encode_prompt(prompt, "cpu", 1, False)
    torch.testing.assert_close(backbone.embed([prompt])[0], expected)


def test_encoding_in_micro_batches(backbone):
    images = to_float(random_images(5))
    whole, parts = backbone.encode_all(images, 5), backbone.encode_all(images, 2)
    torch.testing.assert_close(whole.mean, parts.mean)
    torch.testing.assert_close(whole.std, parts.std)


def test_loads_fp32_frozen_and_sized(small_model):
    backbone = load_backbone(str(small_model))
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in backbone.parameters())
    assert resolution_of(str(small_model)) == 16
    assert resolution_of("embedded") == 128
    assert load_backbone("embedded").text_encoder.dtype == torch.float32  # stored in fp16


def test_fingerprint_knows_every_weight(backbone):
    before = backbone.fingerprint()
    assert before == backbone.fingerprint()
    with torch.no_grad():
        backbone.vae.encoder.conv_in.bias[0] += 1
    assert backbone.fingerprint() != before


def test_frozen_gives_back_what_it_took(backbone):
    backbone.unet.requires_grad_(True)

    def interrupted():
        with frozen(backbone):
            assert not any(p.requires_grad for p in backbone.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(p.requires_grad for p in backbone.unet.parameters())
    assert not any(p.requires_grad for p in backbone.vae.parameters())


def edit(folder, part, **values):
    file = folder / part
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("breaking", "named"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "vae/config.json"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "unet"),
        (lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"half"), "text_encoder"),
        (lambda f: edit(f, "scheduler/scheduler_config.json", prediction_type="sample"), "sample"),
        (lambda f: edit(f, "vae/config.json", latent_channels=8), "vae"),
        (lambda f: (f / "antidreambooth.json").write_text('{"learning": 1}'), "antidreambooth.json"),
        (lambda f: (f / "antidreambooth.json").write_text('{"lora": {"steps": 1}}'), "antidreambooth.json"),
        (lambda f: (f / "antidreambooth.json").write_text("[1]"), "antidreambooth.json"),
    ],
)
def test_a_broken_folder_is_named(small_model, tmp_path, breaking, named):
    folder = shutil.copytree(small_model, tmp_path / "broken")
    breaking(folder)
    with pytest.raises(InputError, match="broken.*" + named):
        load_backbone(str(folder))


def test_pickled_weights_are_refused(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "pickled")
    torch.save(load_backbone(str(small_model)).unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_backbone(str(folder))


@pytest.mark.parametrize("name", ["./nowhere", "two words/x", "no-such-thing"])
def test_a_name_that_is_nothing(name):
    with pytest.raises(InputError, match="embedded"):
        load_backbone(name)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # diffusers gives it to the hub's client
def test_an_unreachable_hub_says_what_to_download():
    with pytest.raises(InputError, match=r"hf download owner/model .*--model.backbone FOLDER"):
        resolution_of("owner/model")
    with pytest.raises(InputError, match=r"model_index.*hf download owner/model"):
        load_backbone("owner/model")


def test_defaults_are_published_unless_the_folder_has_its_own(small_model):
    assert read_defaults(str(small_model)).full == Recipe(5e-7, 2, 1000, True)
    assert read_defaults(str(small_model)).surrogate.batch_size == 1
    assert read_defaults("embedded").prior_weight == 0
    assert read_defaults("embedded").recipe("lora").learning_rate > read_defaults("embedded").full.learning_rate
    assert "non-commercial" in read_defaults("embedded").notice


def test_reconstruct_is_decoding_the_mean_as_diffusers_does(backbone):
    images = to_float(random_images(2))
    with torch.no_grad():
        latents = backbone.vae.encode(images).latent_dist.mode()
        expected = backbone.vae.decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(backbone.reconstruct(images), expected)


def test_the_size_of_weights_is_known_without_them(backbone, small_model, tmp_path):
    """The config files alone tell it."""
    copy = shutil.copytree(small_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = bytes_of_networks(str(copy))
    assert sizes == {
        part: sum(weights.nbytes for weights in getattr(backbone, part).parameters())
        for part in ("unet", "vae", "text_encoder")
    }
    (copy / "vae" / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded: vae"):
        bytes_of_networks(str(copy))
