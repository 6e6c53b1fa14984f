"""Transforms of an attack against Pillow's and torchvision's, and their gradients against finite differences."""

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from antidreambooth.attack.objectives import Transformed
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.transforms import JPEG, Blur, Chain, Crop, Flip, JPEGCodec, Rescale
from antidreambooth.attack.transforms.jpeg import _coded
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.errors import InputError
from antidreambooth.finetuning.augmentation import jpeg
from antidreambooth.photos.decoding import to_float
from tests.conftest import random_images

CASES = {
    "blur": Blur(0.5, 2.0),
    "rescale": Rescale(0.5),
    "jpeg": JPEG(30, 90),
    "chain": Chain([Flip(), Crop(0.5), Blur(), JPEG()], chance=0.5),
}


def generator():
    return Turn(0).generator(torch.device("cpu"))


def smooth_pictures(count, height, width):
    """Pictures in 8 bits that are like photos in that neighbours resemble each other."""
    coarse = random_images(count)[:, :, :4, :4]
    fine = torch.rand((count, 3, height, width), generator=generator()) * 24
    return (F.resize(coarse, [height, width]).float() * 0.9 + fine).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("transform", CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_finite_differences(transform):
    """Along a random direction; a JPEG's rounding jumps somewhere in it, and is looked at alone below."""
    images = to_float(smooth_pictures(2, 16, 24)) * 0.8
    drawn = transform.draw(2, generator())
    direction, weights = torch.randn((2, *images.shape), generator=generator())

    def value(step):
        return (transform(images + step * direction, drawn).double() * weights).sum()

    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((transform(pixels, drawn) * weights).sum(), pixels)
    size = 2e-5
    expected = (value(size) - value(-size)) / (2 * size)
    torch.testing.assert_close((gradient * direction).sum().double(), expected, rtol=1e-1, atol=2e-2)


def test_the_gradient_of_rounded_coefficients_is_exact():
    plane = torch.randn((1, 8, 16), generator=generator(), dtype=torch.float64).mul(30).requires_grad_()
    table = torch.full((1, 8, 8), 7.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda pixels: _coded(pixels, table), plane)


@pytest.mark.parametrize("transform", [*CASES.values(), JPEGCodec()], ids=[*CASES.keys(), "codec"])
def test_a_picture_is_changed_by_its_own_numbers_and_keeps_its_size(transform):
    """So that photos can be worked on a few at a time."""
    images = to_float(smooth_pictures(3, 24, 17))
    drawn = transform.draw(3, generator())
    together = transform(images, drawn)
    assert together.shape == images.shape
    apart = torch.cat([transform(images[i : i + 1], drawn[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_smooth_jpeg_is_nearly_the_codec(quality):
    """Measured: 1.0 to 1.3 steps of 8 bits in the mean, where compression itself changes 5 to 8 of them."""
    pictures = smooth_pictures(3, 32, 41)
    given = to_float(torch.stack([jpeg(picture, quality) for picture in pictures]))
    found = JPEG(quality, quality)(to_float(pictures), torch.zeros(3, 1))
    error, change = (((one - given) * 127.5).abs().mean() for one in (found, to_float(pictures)))
    assert error < 1.5
    assert error < 0.3 * change


def test_the_codec_goes_forward_and_its_gradient_is_the_identity():
    pictures = smooth_pictures(2, 16, 16)
    codec, pixels = JPEGCodec(75, 75), to_float(pictures).requires_grad_()
    found = codec(pixels, codec.draw(2, generator()))
    assert torch.equal((found * 127.5 + 127.5).round(), torch.stack([jpeg(one, 75) for one in pictures]).float())
    (gradient,) = torch.autograd.grad(found.sum(), pixels)
    assert torch.equal(gradient, torch.ones_like(pixels))


def test_qualities_are_drawn_with_equal_chance():
    drawn = (torch.arange(1000.0)[:, None] + 0.5) / 1000
    assert JPEG(60, 95).quality(drawn).unique(return_counts=True)[1].tolist() == pytest.approx([1000 / 36] * 36, abs=1)
    assert JPEG(60, 95).quality(torch.tensor([[0.0], [1.0]])).tolist() == [60, 95]


def test_blur_is_torchvisions_away_from_the_edges():
    images = to_float(smooth_pictures(2, 32, 32))
    found = Blur(0.5, 1.5)(images, torch.tensor([[0.0], [1.0]]))
    for number, sigma in enumerate((0.5, 1.5)):
        wanted = F.gaussian_blur(images[number], [15, 15], [sigma, sigma])
        inner = slice(8, -8)
        torch.testing.assert_close(found[number][:, inner, inner], wanted[:, inner, inner], rtol=0, atol=2e-5)
    even = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(Blur()(even, torch.tensor([[0.9]])), even)


def test_rescale_is_torchvisions_there_and_back():
    images = to_float(smooth_pictures(2, 24, 16))
    wanted = F.resize(F.resize(images, [12, 8], antialias=True), [24, 16], antialias=True)
    torch.testing.assert_close(Rescale(0.5)(images, torch.zeros(2, 0)), wanted, rtol=0, atol=1e-5)


def test_a_chain_is_its_transforms_in_order_or_nothing():
    images, flip, blur = to_float(smooth_pictures(4, 16, 16)), Flip(), Blur()
    chain = Chain([flip, blur], chance=0.5)
    drawn = torch.rand((4, 3), generator=generator())
    drawn[:, 0] = torch.tensor([0.1, 0.9, 0.2, 0.8])
    wanted = blur(flip(images, drawn[:, 1:2]), drawn[:, 2:])
    found = chain(images, drawn)
    assert torch.equal(found[::2], wanted[::2])
    assert torch.equal(found[1::2], images[1::2])
    assert chain.draw(5, generator()).shape == (5, 3)


def test_the_codec_is_no_part_of_a_recording():
    PGD(objective=Transformed([Chain([JPEG()])]), recorded=True)
    with pytest.raises(InputError, match="leave out execution"):
        PGD(objective=Transformed([Flip(), Chain([JPEGCodec()])]), recorded=True)


@pytest.mark.parametrize(
    "wrong", [lambda: Chain([]), lambda: JPEG(0), lambda: JPEG(90, 80), lambda: Blur(2.0, 1.0), lambda: Rescale(1.5)]
)
def test_impossible_transforms_are_refused(wrong):
    with pytest.raises(InputError):
        wrong()
