"""Detection, embedding and verification, on the photos that the project ships and on people of one's own."""

import copy
import os
import pickle
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from antidreambooth.errors import InputError
from antidreambooth.evaluation import faces
from antidreambooth.evaluation.faces import Dlib, UniFace, belonging, find, reference
from antidreambooth.photos.decoding import load_photos
from antidreambooth.photos.formats import SUFFIXES
from antidreambooth.photos.regions import face_boxes
from tests.conftest import ROOT, random_images

PEOPLE = os.environ.get("ANTIDREAMBOOTH_PEOPLE")  # a folder of people, each a folder of their photos


@pytest.fixture(scope="session")
def shipped():
    """Three photos of one person and one of another, as names and pictures of 128 pixels."""
    folders = ("photos", "other")
    return [[(p.name, p.pixels) for p in load_photos(ROOT / "examples" / folder, 128)] for folder in folders]


def test_same_person_is_near_and_another_is_far(shipped):
    model = Dlib()
    same, other = (reference(model, pictures) for pictures in shipped)
    assert same.shape == (3, 128)
    assert model.distance(same, same)[~torch.eye(3, dtype=torch.bool)].max() < model.threshold
    assert model.distance(other, same).min() > model.threshold


def test_centre_makes_strangers_unlike_and_keeps_distances(shipped):
    model = Dlib()
    same, other = (reference(model, pictures) for pictures in shipped)
    centre = faces._dlib().centre
    cosines = [torch.cosine_similarity(other + c, same + c) for c in (0, centre)]
    assert cosines[0].max() < 0.3
    assert cosines[1].min() > 0.7  # of the raw descriptors
    torch.testing.assert_close(model.distance(other, same), model.distance(other + centre, same + centre))


@pytest.mark.parametrize("side", [128, 600, 1500])
def test_a_face_is_found_at_its_place_at_any_size(side):
    (photo,) = load_photos(ROOT / "examples" / "other", side)
    (face,) = Dlib().faces(photo.pixels)
    left, top, right, bottom = (edge / side for edge in face.box)
    assert left < 0.5 < right
    assert top < 0.5 < bottom
    assert face.area == pytest.approx(side**2 * (right - left) * (bottom - top))
    x, y = (face.landmarks / side).T
    assert ((x > left) & (x < right) & (y > top) & (y < bottom)).all()


def test_the_largest_face_comes_first():
    (one,), (large,) = (load_photos(ROOT / "examples" / "other", side) for side in (128, 256))
    canvas = torch.full((3, 256, 384), 128, dtype=torch.uint8)
    canvas[:, :128, :128] = one.pixels
    canvas[:, :, 128:] = large.pixels
    found = Dlib().faces(canvas)
    assert [face.area for face in found] == sorted((face.area for face in found), reverse=True)
    assert len(found) == 2
    assert found[0].box[0] > 128


def test_find_keeps_the_order_and_marks_pictures_without_face(shipped):
    model = Dlib()
    pictures = torch.stack([random_images(1, 128)[0], shipped[0][0][1], random_images(1, 128, seed=1)[0]])
    found = find(model, pictures)
    assert found.any.tolist() == [False, True, False]
    assert found.embeddings.isnan().all(1).tolist() == [True, False, True]
    torch.testing.assert_close(found.embeddings[1:2], reference(model, shipped[0][:1]))
    assert len(found.aligned) == 1


def test_find_without_any_face_or_picture():
    assert find(Dlib(), random_images(2, 64)).embeddings.shape == (2, 128)
    assert find(Dlib(), random_images(0, 64)).embeddings.shape == (0, 128)


def test_same_picture_same_embedding_from_a_copy(shipped):
    again = [pickle.loads(pickle.dumps(Dlib())), copy.deepcopy(Dlib())]
    first, *others = (reference(model, shipped[0]) for model in [Dlib(), *again])
    assert all(torch.equal(first, other) for other in others)


def test_the_persons_face_is_told_from_a_strangers(shipped):
    model, picture = Dlib(), Image.new("RGB", (1200, 900), (90, 110, 130))
    stranger, person = (Image.open(ROOT / "examples" / name) for name in ("other/biden-1.jpg", "photos/obama-3.jpg"))
    picture.paste(stranger.resize((800, 800)), (400, 0))
    picture.paste(person.resize((300, 300)), (0, 600))  # reaches into the corner
    large, small = face_boxes(picture)
    clean = reference(model, shipped[0][:2])
    assert belonging(model, picture, [large, small], clean) == [small]
    assert belonging(model, picture, [small, large, small], clean) == [small, small]
    assert belonging(model, picture, [large, small], reference(model, shipped[1])) == [large]
    assert belonging(model, picture, [], clean) == []


def test_a_stranger_in_one_clean_photo_is_not_taken_for_the_person(shipped):
    model, stranger = Dlib(), Image.open(ROOT / "examples" / "other" / "biden-1.jpg")
    clean = reference(model, [*shipped[0][:2], *shipped[1]])  # in whose photo the stranger is in front
    assert belonging(model, stranger, face_boxes(stranger), clean) == []


def test_a_face_whose_place_is_known_is_embedded_like_one_that_is_found():
    (photo,) = load_photos(ROOT / "examples" / "other", 512)
    (found,) = Dlib().faces(photo.pixels)
    left, top, right, bottom = map(int, found.box)
    again = Dlib().face(photo.pixels, (left, top, right + 1, bottom + 1))
    assert again.box == found.box
    assert torch.equal(again.landmarks, found.landmarks)


def test_photos_without_face_are_named(shipped):
    with pytest.warns(UserWarning, match=r"^no face is found in noise\.png: not compared with$"):
        found = reference(Dlib(), [("noise.png", random_images(1, 128)[0]), *shipped[0]])
    assert len(found) == 3


def test_photos_with_several_faces_are_named(shipped):
    both = torch.cat([shipped[1][0][1], shipped[0][0][1]], dim=2)
    with pytest.warns(UserWarning, match=r"^several faces are in both\.png: the largest is taken for the person's$"):
        assert len(reference(Dlib(), [("both.png", both)])) == 1


def test_no_face_at_all_is_an_error():
    with pytest.raises(InputError, match=r"^no face is found in a\.png, b\.png: give photos"):
        reference(Dlib(), list(zip(("a.png", "b.png"), random_images(2, 64), strict=True)))


def test_uniface_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uniface", None)
    faces._uniface.cache_clear()
    with pytest.raises(InputError, match=r"pip install -e '\.\[uniface\]'"):
        UniFace().faces(random_images(1)[0])


@pytest.fixture
def fake_uniface(monkeypatch):
    """The parts of uniface 4 that are used, which looks at the top left pixel and wants blue first."""
    package: Any = ModuleType("uniface")
    constants: Any = ModuleType("uniface.constants")

    class RetinaFace:
        def detect(self, image):
            def face(left, right):
                return SimpleNamespace(bbox=np.array([left, 0, right, 8], np.float32), landmarks=np.eye(5, 2))

            return [face(0, 4), face(0, 8)]

    class ArcFace:
        def __init__(self, *, model_name):
            assert model_name == "r50"

        def get_embedding(self, face):
            return np.tile(face[0, 0].astype(np.float32), (1, 171))[:, :512]

    package.RetinaFace, package.ArcFace = RetinaFace, ArcFace
    package.face_alignment = lambda image, landmarks, size: (np.tile(image[:1, :1], (size, size, 1)), None)
    constants.ArcFaceWeights = SimpleNamespace(RESNET="r50")
    monkeypatch.setitem(sys.modules, "uniface", package)
    monkeypatch.setitem(sys.modules, "uniface.constants", constants)
    faces._uniface.cache_clear()
    yield package
    faces._uniface.cache_clear()


def test_uniface_through_its_api(fake_uniface):
    model, image = UniFace(), random_images(1)[0]
    largest, smaller = model.faces(image)
    assert largest.box == (0, 0, 8, 8)
    assert smaller.box == (0, 0, 4, 8)
    embedding = model.embed(image, largest)
    assert embedding[:3].tolist() == image[:, 0, 0].flip(0).tolist()  # blue first
    one, two = torch.eye(512)[:2], torch.eye(512)[1:4] * 3
    torch.testing.assert_close(model.distance(one, two), torch.tensor([[1.0, 1, 1], [0, 1, 1]]))


def test_uniface_without_network_names_the_fix(fake_uniface):
    def unreachable():
        raise ConnectionError("Download failed")

    fake_uniface.RetinaFace = unreachable
    with pytest.raises(InputError, match=r"cannot be fetched \(Download failed\): check the network, or copy ~/\.uni"):
        UniFace().faces(random_images(1)[0])


@pytest.mark.skipif(not PEOPLE, reason="ANTIDREAMBOOTH_PEOPLE names no folder of people")
def test_people_are_told_apart_as_published():
    """At least 97 % of pairs on the right side of 0.6, same and different alike (published: 99.4 % on LFW)."""
    model, embeddings, whose = Dlib(), [], []
    assert PEOPLE is not None
    for number, home in enumerate(sorted(path for path in Path(PEOPLE).iterdir() if path.is_dir())):
        folders = {path.parent for path in home.rglob("*") if path.suffix.lower() in SUFFIXES}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # several faces, none, or files that are no photos
            pictures = [(p.name, p.pixels) for folder in sorted(folders) for p in load_photos(folder, 128)]
            found = reference(model, pictures)
        assert len(found) >= 0.9 * len(pictures)
        embeddings.append(found)
        whose += [number] * len(found)
    known, person = torch.cat(embeddings), torch.tensor(whose)
    same, pairs = person[:, None] == person, torch.ones(len(known), len(known)).triu(1).bool()
    near = model.distance(known, known) < model.threshold
    assert near[pairs & same].float().mean() > 0.97
    assert near[pairs & ~same].float().mean() < 0.03
    unlike = torch.cosine_similarity(known[:, None], known[None], dim=-1)[pairs & ~same]
    assert unlike.mean().abs() < 0.1
