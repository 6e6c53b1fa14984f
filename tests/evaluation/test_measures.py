"""Measures of a victim's pictures and of cloaks: values by hand, several ranks, and what they are on real faces."""

import math
import pickle
from typing import cast

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from antidreambooth.errors import InputError
from antidreambooth.evaluation import brisque as brisque_module
from antidreambooth.evaluation import measures, quality
from antidreambooth.evaluation.brisque import _fitted as fitted
from antidreambooth.evaluation.brisque import brisque, brisque_available
from antidreambooth.evaluation.brisque import features as brisque_features
from antidreambooth.evaluation.faces import Dlib, find, reference
from antidreambooth.evaluation.measures import Brisque, EmbeddingStability, disturbed, face_measures, measure
from antidreambooth.evaluation.per_image import PerImage
from antidreambooth.photos.decoding import load_photos
from tests.conftest import ROOT, random_images
from tests.evaluation.rank_measures import REFERENCE, Dial, dials, one_rank

needs_brisque = pytest.mark.skipif(not brisque_available(), reason="the package brisque is not installed")


def test_columns_by_hand():
    columns = measure(Dial(), REFERENCE, dials((0, 0), (2, 2), (4, 0)))
    assert columns["face"].tolist() == [0, 1, 1]
    assert columns["accepted"].tolist() == [0, 0, 0]
    torch.testing.assert_close(columns["ism"], torch.tensor([math.nan, 1, math.sqrt(0.5)]), equal_nan=True)
    torch.testing.assert_close(columns["joint_ism"], torch.tensor([0, 1, math.sqrt(0.5)]))
    medians = torch.tensor([math.nan, math.sqrt(5), math.sqrt(10)])
    torch.testing.assert_close(columns["distance"], medians, equal_nan=True)


def test_means_are_over_what_is_defined():
    found = face_measures(Dial(), REFERENCE)
    for images in (dials((0, 0), (1, 1)), dials((4, 0))):
        found.forward_images(images)
    means = found.compute()
    assert means["fdfr"] == pytest.approx(1 / 3)
    assert means["ism"] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert means["joint_ism"] == pytest.approx((1 + math.sqrt(0.5)) / 3)
    assert means["acceptance"] == pytest.approx(1 / 3)
    assert means["distance"] == pytest.approx((1 + math.sqrt(10)) / 2)
    assert cast(PerImage, found["fdfr"]).per_image.tolist() == [1, 0, 0]


def test_without_any_face_only_what_needs_one_is_undefined():
    found = face_measures(Dial(), REFERENCE, stability=True)
    found.forward_images(dials((0, 0), (0, 0)))
    means = {name: float(value) for name, value in found.compute().items()}
    assert (means["fdfr"], means["joint_ism"], means["acceptance"]) == (1, 0, 0)
    assert all(math.isnan(means[name]) for name in ("ism", "distance", "stability"))


def test_stability_by_hand():
    (face,) = dials((200, 100))
    found = find(Dial(), face[None])
    metric = EmbeddingStability(Dial())
    metric.update(found)
    embeddings = torch.stack([changed[:2, 0, 0] for changed in disturbed(face)]).float()
    distance = (embeddings - torch.tensor([200.0, 100.0])).norm(dim=1).mean()
    assert metric.compute() == pytest.approx(2 * torch.sigmoid(-distance).item())


def test_disturbed_faces_are_slight_changes_and_always_the_same():
    (photo,) = load_photos(ROOT / "examples" / "other", 150)
    first, again = disturbed(photo.pixels), disturbed(photo.pixels)
    assert torch.equal(first, again)
    assert torch.equal(first[0].flip(-1), photo.pixels)
    assert (first[3].float() - photo.pixels.float()).std() == pytest.approx(8, abs=0.5)
    assert torch.equal(first[1, :, 7:, 7:], photo.pixels[:, :-7, :-7])
    assert (first[2, :, 75, 75].int() - photo.pixels[:, 75, 75].int()).abs().max() < 10  # cropped around the centre


def test_a_face_behind_noise_is_less_stable():
    photos = torch.stack([photo.pixels for photo in load_photos(ROOT / "examples" / "photos", 128)])
    noise = 40 * torch.randn(photos.shape, generator=torch.Generator().manual_seed(0))
    means = []
    for images in (photos, (photos + noise).clamp(0, 255).to(torch.uint8)):
        metric = EmbeddingStability(Dlib())
        metric.update(find(Dlib(), images))
        means.append(metric.compute())
    assert means[0] > means[1]


def test_a_person_is_measured_as_that_person():
    model = Dlib()
    photos, others = (load_photos(ROOT / "examples" / folder, 128) for folder in ("photos", "other"))
    known = reference(model, [(photo.name, photo.pixels) for photo in photos[:2]])
    images = torch.stack([photos[2].pixels, others[0].pixels, random_images(1, 128)[0]])
    columns = measure(model, known, images)
    assert columns["face"].tolist() == [1, 1, 0]
    assert columns["accepted"].tolist() == [1, 0, 0]
    assert columns["ism"][0] > 0.7
    assert abs(columns["ism"][1]) < 0.3
    again = measure(model, known, images)
    assert all(torch.equal(columns[name].nan_to_num(), again[name].nan_to_num()) for name in columns)


def test_a_collection_can_be_copied_and_moved():
    found = pickle.loads(pickle.dumps(face_measures(Dial(), REFERENCE, stability=True))).to("cpu")
    assert found.forward_images(dials((1, 1)))["accepted"].tolist() == [1]


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    images = dials((0, 0), (1, 1), (4, 0), (2, 1), (3, 9), side=32)
    images[:, 2] = random_images(5, 32)[:, 2] * images[:, :1, :1, 0].bool().any(-1, keepdim=True)
    mp.spawn(one_rank, (str(tmp_path / "rendezvous"), images, str(tmp_path / "means")), nprocs=2)
    alone = face_measures(Dial(), REFERENCE, stability=True)
    columns = alone.forward_images(images)
    for rank in range(2):
        means, ism = torch.load(f"{tmp_path / 'means'}-{rank}")
        assert means == pytest.approx({name: float(value) for name, value in alone.compute().items()}, nan_ok=True)
        shared = torch.cat([columns["ism"][0::2], columns["ism"][1::2]])
        torch.testing.assert_close(ism, shared, equal_nan=True)


@needs_brisque
def test_brisque_rises_with_noise_and_with_blur():
    images = torch.stack([photo.pixels for photo in load_photos(ROOT / "examples" / "photos", 128)])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [brisque((images + std * noise).clamp(0, 255).to(torch.uint8)) for std in (0, 15, 30, 60)]
    small = [F.interpolate(images, scale_factor=1 / k, mode="bilinear", antialias=True) for k in (1, 2, 4)]
    blurred = [brisque(F.interpolate(image, images.shape[2:], mode="bilinear")) for image in small]
    for first, second in zip(noisy[:-1] + blurred[:-1], noisy[1:] + blurred[1:], strict=True):
        assert (first < second).all()
    assert (noisy[0] < 40).all()


@needs_brisque
def test_brisque_of_a_picture_without_texture_is_undefined():
    metric = Brisque()
    metric.update(torch.full((1, 3, 32, 32), 90, dtype=torch.uint8))
    assert metric.compute().isnan()


def test_brisque_features_of_known_distributions():
    """A Gaussian has shape 2, a Laplacian 1; halves of different width have a ratio of their deviations."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(300_000, dtype=torch.float64, generator=generator)
    uneven = torch.cat([-normal[:100_000].abs(), 2 * normal[100_000:].abs()])  # as much mass as width on each side
    uniform = torch.rand(300_000, dtype=torch.float64, generator=generator)
    laplacian = torch.where(uniform < 0.5, (2 * uniform).log(), -(2 - 2 * uniform).log())
    for values, wanted in ((normal, (2, 1, 1)), (uneven, (2, 1, 2)), (laplacian, (1, 2**0.5, 2**0.5))):
        found = torch.stack(fitted(values[None, None]))
        torch.testing.assert_close(found[:, 0], torch.tensor(wanted, dtype=torch.float64), rtol=0.02, atol=0)


def test_brisque_features_do_not_depend_on_the_orientation():
    (image,) = random_images(1, 64)
    upright, mirrored = brisque_features(torch.stack([image, image.flip(-1)]))
    horizontal, vertical, falling, rising = (slice(2 + 4 * k, 6 + 4 * k) for k in range(4))
    torch.testing.assert_close(upright[:10], mirrored[:10])
    torch.testing.assert_close(upright[falling], mirrored[rising])
    (turned,) = brisque_features(image.mT[None])
    torch.testing.assert_close(upright[horizontal], turned[vertical])


@pytest.fixture
def made_package(monkeypatch, tmp_path):
    """A package brisque whose model has two support vectors, and the ranges of which are those of one picture."""
    (picture,) = random_images(1, 64)
    (highest,) = 2 * brisque_features(picture[None])  # with a lowest of 0, all its features are scaled to 0
    folder = tmp_path / "brisque" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "normalize.pickle").write_bytes(pickle.dumps({"min_": [0.0] * 36, "max_": highest.tolist()}))
    vectors = [[3.0] + [0.0] * 36, [2.0] + [0.5] * 36]
    rows = [" ".join([str(own[0]), *(f"{i}:{v}" for i, v in enumerate(own[1:], 1))]) for own in vectors]
    (folder / "svm.txt").write_text("\n".join(["gamma 0.1", "rho 1.0", "SV", *rows, ""]))
    monkeypatch.syspath_prepend(tmp_path)
    brisque_module._model.cache_clear()
    yield picture
    brisque_module._model.cache_clear()


def test_brisque_is_the_support_vector_regression_of_the_features(made_package):
    value = brisque(made_package[None])
    assert value.item() == pytest.approx(3 + 2 * math.exp(-0.1 * 36 * 0.25) - 1)


def test_brisque_is_measured_where_its_package_is(made_package, monkeypatch):
    assert "brisque" in face_measures(Dial(), REFERENCE)
    monkeypatch.setattr(measures, "brisque_available", lambda: False)
    assert "brisque" not in face_measures(Dial(), REFERENCE)


def test_a_model_that_is_more_than_numbers_is_refused(made_package, tmp_path):
    (tmp_path / "brisque" / "models" / "normalize.pickle").write_bytes(pickle.dumps({"min_": print}))
    with pytest.raises(pickle.UnpicklingError, match="only numbers"):
        brisque(made_package[None])


def test_without_its_package_brisque_names_it(monkeypatch):
    monkeypatch.setattr(brisque_module, "find_spec", lambda _: None)
    brisque_module._model.cache_clear()
    with pytest.raises(InputError, match="pip install --no-deps brisque"):
        brisque(random_images(1, 64))


def test_cloak_measures_agree_with_the_single_picture():
    original = random_images(3, 32).clamp(10, 240)
    cloaked = original.clone()
    cloaked[0, :, ::2] += 4
    cloaked[1, 0, 0] -= 9
    metrics = [quality.PSNR(), quality.SSIM(), quality.LargestDifference()]
    for metric in metrics:
        metric.update(original, cloaked)
        assert len(metric.per_image) == 3
    for index, figures in enumerate(map(quality.cloak_quality, original, cloaked)):
        for metric, (name, figure) in zip(metrics, figures.items(), strict=True):
            assert metric.name == name
            wanted = math.nan if figure is None else figure
            assert metric.per_image[index].item() == pytest.approx(wanted, abs=1e-3, nan_ok=True)
    assert metrics[2].compute() == pytest.approx((4 + 9 + 0) / 3)
    assert metrics[0].compute().isfinite()


def test_lpips_downloads_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    quality._lpips.cache_clear()
    assert not quality.lpips_available()
    with pytest.raises(InputError, match=r"^LPIPS is left out: it needs https://.*alexnet"):
        quality.LPIPS().update(random_images(1, 64), random_images(1, 64))
    assert not list(tmp_path.iterdir())
