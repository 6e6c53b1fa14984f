"""Targets, the targeted objective against diffusers' own reverse step, random transforms."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from PIL import Image

from antidreambooth.attack.canvas import SquareCanvas
from antidreambooth.attack.objectives import Denoising, Targeted, Transformed
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.surrogates import Fixed
from antidreambooth.attack.targets import PATTERNS, target_image
from antidreambooth.attack.transforms import Crop, Flip
from antidreambooth.diffusion.backbone import Posterior, squared_distance
from antidreambooth.diffusion.densities import Uniform
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import to_float
from tests.conftest import random_images

PROMPT = "a photo of sks person"


def value(objective, backbone, images, embedding, draw):
    return objective(backbone, objective.encode(backbone, images, draw), embedding, draw)


def generator():
    return Turn(0).generator(torch.device("cpu"))


@pytest.mark.parametrize("t", [1, 2, 40, 500, 999])
def test_one_reverse_step_is_diffusers_without_its_noise(any_backbone, monkeypatch, t):
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape))
    noisy, prediction = torch.randn((2, 1, 4, 2, 2), generator=generator())
    scheduler = DDPMScheduler.from_config(any_backbone.scheduler.config, clip_sample=False)
    wanted = scheduler.step(prediction, t, noisy).prev_sample
    actual = any_backbone.noising.step_back(noisy, torch.tensor([t]), prediction)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_targeted_is_the_loss_less_the_distance_from_the_noised_target(any_backbone, monkeypatch):
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape))
    images, objective = to_float(random_images(3)), Targeted("stripes")
    embedding = any_backbone.embed([PROMPT])
    draw = objective.draw(any_backbone, images, generator())
    with torch.no_grad():
        actual = value(objective, any_backbone, images, embedding, draw)
        loss = value(Denoising(), any_backbone, images, embedding, draw)
        latents = any_backbone.encode(images).sample(draw.posterior_noise)
        noisy = any_backbone.scheduler.add_noise(latents, draw.noise, draw.timesteps)
        out = any_backbone.denoise(noisy, draw.timesteps, embedding.expanded(3))
        goal = any_backbone.encode(target_image("stripes", 16)).mean
        for i, t in enumerate(draw.timesteps):
            step = any_backbone.scheduler.step(out[i : i + 1], int(t), noisy[i : i + 1]).prev_sample
            noised = any_backbone.scheduler.add_noise(goal, draw.noise[i : i + 1], (t - 1)[None])
            torch.testing.assert_close(actual[i], loss[i] - (step - noised).square().mean(), rtol=1e-4, atol=1e-5)


def test_no_gradient_goes_through_a_detached_target(any_backbone):
    """It is that of || u - constant ||^2; where noise is predicted, the target holds no latents to begin with."""
    images, objective = to_float(random_images(2)), Denoising(detached_target=True)
    embedding, draw = any_backbone.embed([PROMPT]), objective.draw(any_backbone, images, generator())
    mean, std = any_backbone.encode_all(images, 2)

    def slope(loss):
        latents = mean.clone().requires_grad_()
        (found,) = torch.autograd.grad(loss(Posterior(latents, std)).sum(), latents)
        return found

    def expected(posterior):
        latents, t = posterior.sample(draw.posterior_noise), draw.timesteps
        noisy = any_backbone.noising.add_noise(latents, t, draw.noise)
        constant = any_backbone.noising.target(mean + std * draw.posterior_noise, t, draw.noise)
        return squared_distance(any_backbone.predict(noisy, t, embedding.expanded(2)), constant)

    detached = slope(lambda posterior: objective(any_backbone, posterior, embedding, draw))
    torch.testing.assert_close(detached, slope(expected))
    published = slope(lambda posterior: Denoising()(any_backbone, posterior, embedding, draw))
    predicts_noise = any_backbone.scheduler.config.prediction_type == "epsilon"
    assert torch.allclose(detached, published, rtol=1e-4) == predicts_noise


def test_targeted_never_draws_the_level_that_has_none_before_it(backbone):
    class Zero(Uniform):
        def __call__(self, count, total, generator):
            return torch.zeros(count, dtype=torch.long)

    draw = Targeted(timesteps=Zero()).draw(backbone, to_float(random_images(4)), generator())
    assert draw.timesteps.tolist() == [1, 1, 1, 1]


def test_targeted_pgd_raises_its_objective(backbone):
    originals, objective = to_float(random_images(2)) * 0.5, Targeted("checkerboard")
    embedding = backbone.embed([PROMPT])
    draw = objective.draw(backbone, originals, generator())
    before = value(objective, backbone, originals, embedding, draw).mean()
    attack = PGD(steps=30, objective=objective)
    cloaked = attack(Fixed(backbone, PROMPT), SquareCanvas(originals), originals, Turn(0), generator()).state
    assert value(objective, backbone, cloaked, embedding, draw).mean() > before


def test_a_target_belongs_to_each_model(small_model, small_v_model):
    """The latent of one model's encoder means nothing to another one."""
    objective, images = Targeted(), to_float(random_images(1))
    first, second = load_backbone(str(small_model)), load_backbone(str(small_v_model))
    with torch.no_grad():
        second.vae.encoder.conv_in.weight.mul_(2)
    goals = [objective.goal(model, model.encode(images).mean) for model in (first, second)]
    assert not torch.equal(*goals)
    assert torch.equal(objective.goal(first, first.encode(images).mean), goals[0])


@pytest.mark.parametrize("name", sorted({*PATTERNS} - {"grey"}))
def test_patterns_are_pictures_with_contrast(name):
    picture = target_image(name, 64)
    assert picture.shape == (1, 3, 64, 64)
    assert picture.min() >= -1
    assert picture.max() <= 1
    assert picture.std() > 0.5


def test_a_target_can_be_a_picture(tmp_path, backbone):
    path = tmp_path / "target.png"
    Image.new("RGB", (40, 20), (255, 0, 0)).save(path)
    picture = target_image(str(path), 16)
    assert picture.shape == (1, 3, 16, 16)
    assert picture[0, :, 8, 8].tolist() == [1, -1, -1]
    images = to_float(random_images(2))
    goals = [Targeted(name).goal(backbone, backbone.encode(images).mean) for name in (str(path), "checkerboard")]
    assert not torch.equal(*goals)


def test_a_target_that_is_none_is_refused_at_once():
    with pytest.raises(InputError, match=r"'nowhere\.png' is no picture's file.*checkerboard, rings, stripes"):
        Targeted("nowhere.png")


def test_flip_mirrors_about_half_of_the_pictures():
    images = to_float(random_images(200))
    flip = Flip()
    flipped = flip(images, flip.draw(200, generator()))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 60 < mirrored.sum() < 140


def test_a_crop_is_a_part_of_the_picture_at_its_size():
    side = 64
    ramp = torch.linspace(-1, 1, side).expand(8, 3, side, side)  # brightness tells where it was cut
    crop = Crop(0.5)
    drawn = crop.draw(8, generator())
    cropped = crop(ramp, drawn)
    assert cropped.shape == ramp.shape
    width = (cropped[..., -1] - cropped[..., 0])[:, 0, 0] / 2
    torch.testing.assert_close(width, 0.5 + 0.5 * drawn[:, 0], rtol=0, atol=0.03)
    assert cropped.min() >= -1
    assert cropped.max() <= 1
    assert cropped[..., 0].std() > 0.05  # at different places
    torch.testing.assert_close(Crop(1.0)(ramp, drawn), ramp)


def test_a_crop_is_as_exact_under_autocast():
    ramp = torch.linspace(-1, 1, 512).expand(2, 3, 512, 512)
    crop = Crop(0.5)
    drawn = crop.draw(2, generator())
    with torch.autocast("cpu", torch.bfloat16):
        low = crop(ramp, drawn)
    assert torch.equal(low, crop(ramp, drawn))


def test_transforms_are_drawn_anew_in_every_step(backbone):
    objective = Transformed([Flip(), Crop()])
    source, images = generator(), to_float(random_images(3))
    first, second = (objective.draw(backbone, images, source) for _ in range(2))
    assert isinstance(first, Draw)
    assert [len(numbers) for numbers in first.transforms] == [3, 3]
    assert not torch.equal(first.transforms[1], second.transforms[1])


def test_transforms_are_gone_through_in_their_order(backbone):
    images, inner, crop, flip = to_float(random_images(4)), Denoising(), Crop(0.5), Flip()
    objective = Transformed([crop, flip], inner)
    draw, embedding = objective.draw(backbone, images, generator()), backbone.embed([PROMPT])
    with torch.no_grad():
        wanted = value(inner, backbone, flip(crop(images, draw.transforms[0]), draw.transforms[1]), embedding, draw)
        plain = value(inner, backbone, images, embedding, draw)
        actual = value(objective, backbone, images, embedding, draw)
    torch.testing.assert_close(actual, wanted)
    assert not torch.allclose(actual, plain)


def test_nested_transforms_each_get_their_own_numbers(backbone):
    images = to_float(random_images(2))
    nested, flat = Transformed([Flip()], Transformed([Crop()])), Transformed([Flip(), Crop()])
    embedding = backbone.embed([PROMPT])
    with torch.no_grad():
        values = [value(o, backbone, images, embedding, o.draw(backbone, images, generator())) for o in (nested, flat)]
    torch.testing.assert_close(*values)


def test_no_transform_is_refused():
    with pytest.raises(InputError, match="leave out Transformed"):
        Transformed([])
