"""Training another base model, small: what comes out, going on, bad input."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import compute_snr

from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.errors import InputError
from antidreambooth.photos.captioned import read_pictures
from cli import main
from lightning_modules import Pretraining
from tests.conftest import ROOT, contents


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    np.save(folder / "pictures.npy", np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8))
    (folder / "captions.json").write_text(json.dumps(["a photo of a man", "a photo of a woman"] * 10))
    return folder


@pytest.fixture
def fit(small_model, pictures, tmp_path):
    def build(*more, out="out", steps=3):
        return [
            "fit",
            f"--config={ROOT / 'configs' / 'pretraining.yaml'}",
            f"--data.folder={pictures}",
            f"--model.backbone={small_model}",
            "--model.widths=[16, 32]",
            f"--model.steps={steps}",
            "--model.batch_size=4",
            "--model.learning_rate=1e-2",
            "--model.warmup_steps=1",
            "--model.averaging=0.5",
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
            f"--trainer.default_root_dir={tmp_path / out}",
            "--checkpoint.every_n_train_steps=1",
            *more,
        ]

    return build


def test_a_sibling_is_a_backbone_with_the_same_autoencoder(fit, small_model, tmp_path):
    main(fit())
    folder = tmp_path / "out" / "model"
    first, sibling = load_backbone(str(small_model)), load_backbone(str(folder))
    assert list(sibling.unet.config.block_out_channels) == [16, 32]
    assert all(torch.equal(v, sibling.vae.state_dict()[k]) for k, v in first.vae.state_dict().items())
    assert sibling.fingerprint() != first.fingerprint()
    assert sibling.defaults == first.defaults
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline("a photo of a man", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_twice_gives_the_same_another_seed_another(fit, tmp_path):
    for out, more in (("one", []), ("two", []), ("three", ["--seed_everything=1"])):
        main(fit(*more, out=out))
    one, two, three = (contents(tmp_path / out / "model" / "unet") for out in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_going_on_equals_not_stopping(fit, tmp_path, noted):
    main(fit(out="whole", steps=4))
    main(fit("--trainer.max_steps=2", out="parts", steps=4))
    steps = noted(Pretraining)
    main(fit("--ckpt_path=last", out="parts", steps=4))
    assert steps == [2, 3]
    assert contents(tmp_path / "whole" / "model") == contents(tmp_path / "parts" / "model")


def test_what_is_saved_is_the_average(fit, tmp_path):
    fast = "--model.warmup_steps=0"  # the first step of a warm-up changes nothing
    main(fit(fast, steps=2))
    main(fit(fast, "--model.averaging=0.0", "--trainer.max_steps=1", steps=2, out="first"))
    main(fit(fast, "--model.averaging=0.0", steps=2, out="second"))
    saved, first, second = (
        load_backbone(str(tmp_path / out / "model")).unet.state_dict() for out in ("out", "first", "second")
    )
    for name, value in saved.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)  # after the first step it is that one's
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_are_min_snr_as_diffusers_training_writes_it(small_model, small_v_model, prediction):
    module = Pretraining()
    module.backbone = load_backbone(str(small_model if prediction == "epsilon" else small_v_model))
    timesteps = torch.tensor([0, 10, 200, 600, 999])
    snr = compute_snr(module.backbone.scheduler, timesteps)
    wanted = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(module._weights(timesteps), wanted)


def test_a_sibling_may_flow(fit, small_model, tmp_path):
    """It is a backbone that predicts noise less latents, and draws what the plain pipeline draws."""
    main(fit("--model.flow=true"))
    folder = tmp_path / "out" / "model"
    sibling = load_backbone(str(folder))
    noise, latents = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 500, 999])
    assert torch.equal(sibling.noising.target(latents, rows, noise), noise - latents)
    torch.testing.assert_close(sibling.noising.add_noise(latents, rows, noise)[-1], noise[-1])
    told, against = sibling.embed(["a photo of a man"] * 3), sibling.negative(3)
    with torch.no_grad():
        drawn = sibling.draw(noise, told, against, steps=3, guidance_scale=2.5)
    plain = StableDiffusionPipeline.from_pretrained(folder)
    expected = plain(["a photo of a man"] * 3, latents=noise, num_inference_steps=3, guidance_scale=2.5,
                     height=64, width=64, output_type="latent").images  # fmt: skip
    torch.testing.assert_close(drawn, expected)


def test_a_sibling_may_start_from_the_models_own_weights(fit, small_model, tmp_path):
    args = [flag for flag in fit("--model.anew=false", "--model.learning_rate=1e-9") if "widths" not in flag]
    main(args)
    first, sibling = load_backbone(str(small_model)), load_backbone(str(tmp_path / "out" / "model"))
    for name, value in first.unet.state_dict().items():
        torch.testing.assert_close(sibling.unet.state_dict()[name], value, rtol=0, atol=1e-6)


def test_latents_of_other_pictures_are_not_used(fit, pictures, tmp_path):
    main(fit("--model.warmup_steps=0", steps=1))
    before = (tmp_path / "out" / "latents.safetensors").read_bytes()
    np.save(pictures / "pictures.npy", np.zeros((20, 16, 16, 3), np.uint8))
    main(fit("--model.warmup_steps=0", "--overwrite", steps=1))
    assert (tmp_path / "out" / "latents.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.resolution=32", "are 16 pixels wide, the model wants 32"),
        ("--model.widths=[16]", "make no U-Net"),
        ("--model.anew=false", "leave out --model.anew"),
    ],
)
def test_what_does_not_fit_is_refused(fit, flag, message):
    with pytest.raises(SystemExit, match=message):
        main(fit(flag))


@pytest.mark.parametrize(
    ("array", "captions", "message"),
    [
        (None, ["a"], r"pictures\.npy cannot be read"),
        (np.zeros((1, 4, 4, 3), np.uint8), None, r"captions\.json cannot be read"),
        (np.zeros((1, 4, 4, 3), np.float32), ["a"], "holds float32"),
        (np.zeros((1, 4, 6, 3), np.uint8), ["a"], r"shape \(1, 4, 6, 3\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), ["a"], "holds 2 pictures"),
        (np.zeros((0, 4, 4, 3), np.uint8), [], "holds 0 pictures"),
        (np.zeros((1, 4, 4, 3), np.uint8), [5], "does not hold as many captions"),
        (np.array([{"a": 1}]), ["a"], "cannot be read"),  # a pickle
    ],
)
def test_what_are_no_pictures_is_refused(tmp_path, array, captions, message):
    if array is not None:
        np.save(tmp_path / "pictures.npy", array)
    if captions is not None:
        (tmp_path / "captions.json").write_text(json.dumps(captions))
    with pytest.raises(InputError, match=message):
        read_pictures(tmp_path)
