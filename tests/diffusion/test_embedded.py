"""The embedded model on the example photos: what it is embedded for."""

import pytest
import torch
from PIL import Image

from antidreambooth.attack.canvas import STEP, SquareCanvas
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import alternate
from antidreambooth.attack.surrogates import Alternating
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.weights import Weights
from antidreambooth.photos.decoding import load_photos, to_float
from antidreambooth.photos.delivery import to_8bit
from tests.conftest import ROOT


@torch.no_grad()
def denoising_loss(backbone, pixels, draws=48):
    """Mean over many timesteps and noises, the same for every picture given."""
    generator = torch.Generator().manual_seed(0)
    posterior = backbone.encode_all(to_float(pixels), 4)
    embeddings = backbone.embed(["a photo of sks person"]).expanded(len(pixels))
    total = torch.zeros(())
    for _ in range(draws):
        t = torch.randint(1000, (1,), generator=generator).expand(len(pixels))
        noise, posterior_noise = torch.randn((2, 1, *posterior.mean.shape[1:]), generator=generator)
        noise, posterior_noise = noise.expand_as(posterior.mean), posterior_noise.expand_as(posterior.mean)
        latents = posterior.sample(posterior_noise)
        total += backbone.denoising_loss(latents, t, noise, embeddings).mean()
    return float(total / draws)


@pytest.mark.slow
def test_a_cloak_is_not_noise():
    """A few rounds of ASPL raise the untouched model's loss more than random noise of the same budget does."""
    budget = 8.0
    originals = torch.stack([photo.pixels for photo in load_photos(ROOT / "examples" / "photos", 128)])
    backbone = load_backbone("embedded")
    training = DreamBooth().completed(backbone.defaults)
    Full().apply(backbone, training, seed=0)
    parameters = backbone.learned()
    assert training.learning_rate is not None
    weights = Weights(parameters, torch.optim.AdamW(parameters, lr=training.learning_rate))
    images = cloaked = to_float(originals)
    surrogate = Alternating(backbone, training, weights, backbone.encode_all(images, 4))
    for number in range(4):
        cloaked = alternate([surrogate], SquareCanvas(images), cloaked, PGD(budget=budget), Turn(number)).state

    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    untouched = load_backbone("embedded")
    with_cloak = denoising_loss(untouched, to_8bit(cloaked, originals, budget))
    with_noise = denoising_loss(untouched, to_8bit(images + signs * budget * STEP, originals, budget))
    without = denoising_loss(untouched, originals)
    assert with_cloak > with_noise > without


def test_example_photos_are_of_one_person_and_another():
    folder = ROOT / "examples"
    assert len(load_photos(folder / "photos", 128)) >= 3
    assert len(load_photos(folder / "other", 128)) >= 1
    text = (folder / "README.md").read_text()
    for photo in [*(folder / "photos").iterdir(), *(folder / "other").iterdir()]:
        assert photo.name in text  # source and terms are stated
        with Image.open(photo) as image:
            assert image.width == image.height  # nothing of the face is lost in the square
