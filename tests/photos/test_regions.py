"""Faces of the photos that the project ships, pasted into larger pictures; masks of a user."""

from pathlib import Path

import dlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from antidreambooth.errors import InputError
from antidreambooth.evaluation.faces import Dlib
from antidreambooth.photos import regions
from antidreambooth.photos.regions import (
    SIDES,
    Region,
    chosen,
    detector,
    face_boxes,
    faces_at,
    find_masks,
    mask_of,
    read_mask,
    widened,
)
from tests.conftest import ROOT

SIZE = (30, 20)
FACE = (0.31, 0.31, 0.74, 0.74)  # of other/biden-1.jpg, in its sides: brow to chin, as looked at


def portrait(name="other/biden-1.jpg", side=None):
    image = Image.open(ROOT / "examples" / name).convert("RGB")
    return image if side is None else image.resize((side, side), Image.Resampling.LANCZOS)


def framed(*pasted, size=(1500, 2000)):
    """A grey picture with smaller ones, each with its corner, pasted into it."""
    frame = Image.new("RGB", size, (90, 110, 130))
    for image, corner in pasted:
        frame.paste(image, corner)
    return frame


def overlap(box, other):
    """Area of what two boxes share over the area of both together; dlib's sizes go in steps of a fifth."""
    pairs = zip(box, other, strict=True)
    left, top, right, bottom = (pick(pair) for pick, pair in zip((max, max, min, min), pairs, strict=True))
    shared = max(0, right - left) * max(0, bottom - top)
    return shared / (sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)) - shared)


@pytest.fixture
def masks(tmp_path):
    """A folder with masks for a.jpg and B.jpg, of ``SIZE``, the left half of each white."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in ("A.png", "b.jpg"):
        mask = Image.new("L", SIZE)
        mask.paste(255, (0, 0, SIZE[0] // 2, SIZE[1]))
        mask.save(folder / name)
    return folder


def saved(folder: Path, image: Image.Image, name: str = "mask.png") -> Path:
    image.save(folder / name)
    return folder / name


@pytest.mark.parametrize("side", [64, 700, 2400])
def test_a_face_is_where_it_is_at_any_size(side):
    (box,) = face_boxes(portrait(side=side))
    assert overlap([edge / side for edge in box], FACE) > 0.5


def test_a_small_face_needs_the_second_look():
    corner, side = (300, 800), 300  # its box has about 126 of 2000 pixels: 32 at 512, 97 at 1536
    picture = framed((portrait(side=side), corner))
    assert faces_at(picture, SIDES[0]) == []
    (box,) = face_boxes(picture)
    assert overlap([(edge - corner[n % 2]) / side for n, edge in enumerate(box)], FACE) > 0.5


def test_a_large_face_does_not_hide_a_small_one_and_comes_first():
    picture = framed((portrait("photos/obama-1.jpg", 250), (100, 1500)), (portrait(side=1000), (400, 100)))
    assert len(faces_at(picture, SIDES[0])) == 1
    large, small = face_boxes(picture)
    assert large[1] < 1100 < 1500 < small[1]
    assert large[2] - large[0] > small[2] - small[0]


def test_faces_are_found_in_a_picture_that_is_no_square():
    for size in ((2000, 500), (500, 2000)):
        (box,) = face_boxes(framed((portrait(side=500), (0, 0)), size=size))
        assert overlap([edge / 500 for edge in box], FACE) > 0.5


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (20000, 100), (100, 20000)])
def test_no_face_in_a_strange_picture(size):
    assert face_boxes(Image.new("RGB", size, (200, 90, 30))) == []


def test_a_picture_of_a_few_pixels_is_hardly_enlarged(monkeypatch):
    asked = []

    def asking(picture, side):
        asked.append(side)
        return []

    monkeypatch.setattr(regions, "faces_at", asking)
    for longest in (20, 300, 5000):
        face_boxes(Image.new("RGB", (longest, 10)))
    assert asked == [80, 512, 1200, 512, 1536]


def test_one_detector_for_the_whole_process(monkeypatch):
    detector()
    pixels = np.asarray(portrait())
    with monkeypatch.context() as patch:
        patch.setattr(dlib, "get_frontal_face_detector", None)
        assert len(Dlib().faces(torch.from_numpy(pixels.copy()).permute(2, 0, 1))) == 1


def test_widened_is_a_square_around_the_face():
    assert widened((400, 300, 500, 400), 2.0, (1000, 800)) == (350, 250, 550, 450)
    assert widened((400, 300, 500, 400), 1.5, (1000, 800)) == (375, 275, 525, 425)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-20, -10, 80, 90), (0, 0, 200, 200)),
        ((950, 750, 1050, 850), (800, 600, 1000, 800)),
        ((300, 100, 900, 700), (200, 0, 1000, 800)),  # the square would be larger than the photo
    ],
)
def test_widened_is_shifted_into_the_photo(box, expected):
    assert widened(box, 2.0, (1000, 800)) == expected


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    corner=st.tuples(st.integers(-50, 300), st.integers(-50, 300)),
    side=st.integers(1, 400),
    widths=st.floats(1, 10),
)
def test_widened_is_always_a_square_in_the_photo(size, corner, side, widths):
    left, top, right, bottom = widened((*corner, corner[0] + side, corner[1] + side), widths, size)
    assert right - left == bottom - top == min(round(widths * side), *size)
    assert left >= 0
    assert top >= 0
    assert right <= size[0]
    assert bottom <= size[1]


def test_region_refuses_two_answers_to_one_question():
    with pytest.raises(InputError, match=r"^widths and mask both say where a photo may change: give one of them$"):
        Region(widths=2.0, mask="masks")
    with pytest.raises(InputError, match=r"^widths is 1 or more: got 0\.5$"):
        Region(widths=0.5)


def test_the_whole_photo_unless_asked():
    assert mask_of(Region(), "a.jpg", (100, 80), [(10, 10, 30, 30)]) is None


def test_a_mask_of_the_users_is_never_forgotten(masks):
    with pytest.raises(AssertionError, match=r"^a mask that the user gave is never left out$"):
        mask_of(Region(mask=str(masks)), "a.jpg", SIZE, [(10, 10, 20, 20)])


def test_which_faces_are_protected(monkeypatch):
    boxes, picture = [(60, 30, 80, 50), (10, 10, 20, 20)], Image.new("RGB", (100, 80))
    monkeypatch.setattr(regions, "face_boxes", lambda _: boxes)
    assert chosen(Region(), picture) == tuple(boxes)
    assert chosen(Region("largest"), picture) == (boxes[0],)
    assert chosen(Region("person"), picture, lambda given, found: [*found][1:] if given is picture else []) == (
        boxes[1],
    )


def test_nothing_but_the_squares_may_change():
    boxes = [(60, 30, 80, 50), (10, 10, 20, 20)]
    allowed = mask_of(Region(widths=2.0), "a.jpg", (100, 80), boxes)
    expected = np.zeros((80, 100), bool)
    expected[20:60, 50:90] = expected[5:25, 5:25] = True
    np.testing.assert_array_equal(allowed, expected)


@pytest.mark.parametrize(
    ("which", "words"), [("all", "no face"), ("person", "no face that looks like the clean photos")]
)
def test_a_photo_without_face_may_change_everywhere_and_is_named(which, words):
    with pytest.warns(UserWarning, match=rf"^{words} is found in a\.jpg: the whole photo may change$"):
        assert mask_of(Region(which, 2.0), "a.jpg", (100, 80), []) is None


def test_a_mask_is_found_by_the_photos_stem(masks):
    photos = [Path("elsewhere/B.heic"), Path("elsewhere/a.jpg")]
    assert find_masks(masks, photos) == [masks / "b.jpg", masks / "A.png"]


def test_one_mask_may_serve_all_photos(masks):
    assert find_masks(masks / "A.png", [Path("x.jpg"), Path("y.jpg")]) == [masks / "A.png"] * 2


def test_a_photo_without_a_mask_of_its_own_is_named(masks):
    with pytest.raises(InputError, match=r"masks holds no mask for c\.jpg: add c\.png, white where it may change$"):
        find_masks(masks, [Path("a.jpg"), Path("c.jpg")])
    Image.new("L", SIZE).save(masks / "a.webp")
    with pytest.raises(InputError, match=r"masks holds several masks for a\.jpg, A\.png and a\.webp: keep one$"):
        find_masks(masks, [Path("a.jpg")])
    with pytest.raises(InputError, match=r"^no masks: .*nowhere does not exist"):
        find_masks(masks / "nowhere", [Path("a.jpg")])


@pytest.mark.parametrize("name", ["A.png", "b.jpg"])
def test_white_may_change(masks, name):
    allowed = mask_of(Region(mask=str(masks)), "a.jpg", SIZE, [], masks / name)
    assert allowed is not None
    assert allowed.shape == (20, 30)
    assert allowed[:, :14].all()
    assert not allowed[:, 16:].any()


def test_a_mask_is_read_upright(tmp_path):
    lying = Image.new("1", (20, 30))
    lying.paste(1, (0, 0, 20, 5))  # its top is the photo's right
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "mask.png"
    lying.save(path, exif=exif)
    allowed = read_mask(path, "a.jpg", SIZE)
    assert allowed[:, 25:].all()
    assert allowed.sum() == 5 * 20


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            Image.new("L", (20, 30), 255),
            "has 20 x 30 pixels, and the photo a.jpg has 30 x 20, upright: save the mask at the photo's size",
        ),
        (Image.new("RGBA", SIZE, (255, 255, 255, 254)), "is transparent in parts: paint them black or white"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(tmp_path, mask, message):
    with pytest.raises(InputError) as raised:
        read_mask(saved(tmp_path, mask), "a.jpg", SIZE)
    assert str(raised.value).startswith(f"the mask mask.png {message}")


def test_a_mask_with_nothing_white_or_no_picture_is_named(tmp_path):
    grey = saved(tmp_path, Image.new("L", SIZE, 127))
    with pytest.raises(InputError, match=r"^nothing in the mask mask\.png is white, so nothing of a\.jpg may change: "):
        read_mask(grey, "a.jpg", SIZE)
    assert read_mask(saved(tmp_path, Image.new("L", SIZE, 128)), "a.jpg", SIZE).all()
    (tmp_path / "text.png").write_text("white")
    with pytest.raises(InputError, match=r"^the mask text\.png cannot be decoded: "):
        read_mask(tmp_path / "text.png", "a.jpg", SIZE)


def test_an_opaque_alpha_channel_is_no_transparency(tmp_path):
    assert read_mask(saved(tmp_path, Image.new("RGBA", SIZE, (255, 255, 255, 255))), "a.jpg", SIZE).all()
