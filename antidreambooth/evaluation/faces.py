"""Faces in pictures: where they are, and whose."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from antidreambooth.errors import InputError
from antidreambooth.photos.decoding import Box
from antidreambooth.photos.regions import detector, widened

SIDES = (256, 512)  # the longer side in pixels that dlib looks for faces at: its detector needs faces of about 80


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture, in the picture's pixels (x to the right, y down)."""

    box: tuple[float, float, float, float]  # left, top, right, bottom; may reach over the edge
    landmarks: Float[Tensor, "5 2"]  # in the order that the model aligns by

    @property
    def area(self) -> float:
        """In square pixels."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


class FaceModel(ABC):
    """A detector and an embedding. Holds no weights of its own, so that it can be copied, pickled and configured."""

    name: ClassVar[str]
    threshold: ClassVar[float]  # the verifier's published one: same person below this distance
    dimensions: ClassVar[int]  # of an embedding

    @abstractmethod
    def faces(self, image: UInt8[Tensor, "3 h w"]) -> list[Face]:
        """All faces of a picture in sRGB, the largest first."""

    @abstractmethod
    def align(self, image: UInt8[Tensor, "3 h w"], face: Face) -> UInt8[Tensor, "3 s s"]:
        """The face cut out upright, at the size that the embedding was trained on."""

    @abstractmethod
    def embed_aligned(self, faces: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        """Embeddings of faces that ``align`` cut out."""

    @abstractmethod
    def distance(self, a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        """Distance that ``threshold`` is about, of each embedding to each; NaN where an embedding is."""

    def embed(self, image: UInt8[Tensor, "3 h w"], face: Face) -> Float[Tensor, " d"]:
        """Embedding of one face."""
        return self.embed_aligned(self.align(image, face)[None])[0]


class Dlib(FaceModel):
    """dlib's HOG detector, five landmarks and 128-d ResNet.

    Same person below a Euclidean distance of 0.6, as published:
    http://blog.dlib.net/2017/02/high-quality-face-recognition-with-deep.html

    From dlib's descriptors a fixed mean face is subtracted: distances stay what they are, and the cosine of two
    strangers becomes about 0 instead of .84, so that ISM reads as likeness, and a stranger counts in joint ISM as no
    face does. The mean, ``dlib_centre.safetensors``, is over the 267 faces found in 300 pictures of the embedded base
    model: ``a photo of a person``, guidance 2.5, 25 steps, ``noise_of(backbone, 128, range(300), seed=0)``.
    """

    name = "dlib"
    threshold = 0.6
    dimensions = 128

    def faces(self, image: UInt8[Tensor, "3 h w"]) -> list[Face]:
        """See ``FaceModel``; small pictures are enlarged and large ones scaled down to ``SIDES`` first."""
        longest = max(image.shape[1:])
        side = min(max(longest, SIDES[0]), SIDES[1])
        size = tuple(max(1, round(length * side / longest)) for length in image.shape[1:])
        scaled = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        boxes = [_rectangle(box, longest / side) for box in detector()(_pixels(scaled))]
        return sorted((self._face(image, box) for box in boxes), key=lambda face: -face.area)

    def face(self, image: UInt8[Tensor, "3 h w"], box: Box) -> Face:
        """A face that ``face_boxes`` found: with its landmarks, which ``align`` needs."""
        import dlib

        left, top, right, bottom = box
        return self._face(image, dlib.rectangle(left, top, right - 1, bottom - 1))  # its last pixels are inside

    def align(self, image: UInt8[Tensor, "3 h w"], face: Face) -> UInt8[Tensor, "3 150 150"]:
        """See ``FaceModel``."""
        import dlib

        points = [dlib.point(round(x), round(y)) for x, y in face.landmarks.tolist()]
        shape = dlib.full_object_detection(dlib.rectangle(*map(round, face.box)), points)
        return torch.from_numpy(dlib.get_face_chip(_pixels(image), shape)).permute(2, 0, 1)

    def embed_aligned(self, faces: UInt8[Tensor, "n 3 150 150"]) -> Float[Tensor, "n 128"]:
        """See ``FaceModel``."""
        found = _dlib().network.compute_face_descriptor([_pixels(face) for face in faces])
        return torch.from_numpy(np.array(found, np.float32).reshape(-1, self.dimensions)) - _dlib().centre

    def distance(self, a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        """Euclidean."""
        distance: Tensor = torch.linalg.vector_norm(a[:, None] - b[None], dim=-1)
        return distance

    @staticmethod
    def _face(image: Tensor, box: Any) -> Face:
        shape = _dlib().predictor(_pixels(image), box)
        landmarks = torch.tensor([[part.x, part.y] for part in shape.parts()], dtype=torch.float32, device="cpu")
        edges = float(box.left()), float(box.top()), float(box.right()), float(box.bottom())
        return Face(edges, landmarks)


class UniFace(FaceModel):
    """RetinaFace (arXiv:1905.00641) and ArcFace (arXiv:1801.07698, ResNet-50) as packaged by uniface.

    Needs the extra ``uniface``, which fetches the weights on first use. Same person below a cosine distance of 0.68:
    the threshold for ArcFace of https://github.com/serengil/deepface (``deepface/modules/verification.py``), as the
    papers publish none.
    """

    name = "uniface"
    threshold = 0.68
    dimensions = 512

    def faces(self, image: UInt8[Tensor, "3 h w"]) -> list[Face]:
        """See ``FaceModel``."""
        found = [
            Face(tuple(face.bbox.tolist()), torch.from_numpy(face.landmarks).float())
            for face in _uniface().detector.detect(_pixels(image.flip(0)))  # wants blue first
        ]
        return sorted(found, key=lambda face: -face.area)

    def align(self, image: UInt8[Tensor, "3 h w"], face: Face) -> UInt8[Tensor, "3 112 112"]:
        """See ``FaceModel``."""
        aligned, _ = _uniface().align(_pixels(image), face.landmarks.numpy(), 112)
        return torch.from_numpy(aligned).permute(2, 0, 1)

    def embed_aligned(self, faces: UInt8[Tensor, "n 3 112 112"]) -> Float[Tensor, "n 512"]:
        """See ``FaceModel``; not normalised."""
        found = [_uniface().recognizer.get_embedding(_pixels(face.flip(0))).ravel() for face in faces]
        return torch.from_numpy(np.array(found, np.float32).reshape(-1, self.dimensions))

    def distance(self, a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        """1 - cosine, in [0, 2]."""
        return 1 - F.normalize(a) @ F.normalize(b).T


class Found(NamedTuple):
    """The largest face of each picture, looked for once for all measures."""

    embeddings: Float[Tensor, "n d"]  # NaN where there is no face
    any: Bool[Tensor, " n"]
    aligned: list[Tensor]  # UInt8[3 s s] of the pictures with a face, in order


def find(model: FaceModel, images: UInt8[Tensor, "n 3 h w"]) -> Found:
    """The largest face of each picture; what is found is on the CPU, where face models work, wherever pictures are."""
    images = images.cpu()
    faces = [model.faces(image)[:1] for image in images]
    present = torch.tensor([bool(found) for found in faces], dtype=torch.bool, device="cpu")
    aligned = [model.align(image, face) for image, found in zip(images, faces, strict=True) for face in found]
    embeddings = torch.full((len(images), model.dimensions), torch.nan, dtype=torch.float32, device="cpu")
    if aligned:
        embeddings[present] = model.embed_aligned(torch.stack(aligned))
    return Found(embeddings, present, aligned)


def reference(model: FaceModel, pictures: Sequence[tuple[str, Tensor]]) -> Float[Tensor, "m d"]:
    """Embeddings of a person's clean photos, given as name and UInt8[3 h w]; of photos with a face only.

    Warns, naming them, about photos without a face, and about those with several, of which the largest is taken.

    Raises:
        InputError: No photo holds a face.
    """
    on_cpu = [(name, image.cpu()) for name, image in pictures]  # a GPU has no kernels for what these models do
    found = [(name, image, model.faces(image)) for name, image in on_cpu]
    without = ", ".join(name for name, _, faces in found if not faces)
    several = ", ".join(name for name, _, faces in found if len(faces) > 1)
    if not any(faces for _, _, faces in found):
        raise InputError(f"no face is found in {without or 'no photo'}: give photos that show the face from the front")
    if without:
        warnings.warn(f"no face is found in {without}: not compared with", stacklevel=2)
    if several:
        warnings.warn(f"several faces are in {several}: the largest is taken for the person's", stacklevel=2)
    return torch.stack([model.embed(image, faces[0]) for _, image, faces in found if faces])


def belonging(model: Dlib, picture: Image.Image, boxes: Sequence[Box], reference: Float[Tensor, "m 128"]) -> list[Box]:
    """Which of a photo's faces the verifier takes for the person's, in the order given.

    As for the measures, a face is the person's where the median of its distances to the clean photos is below the
    threshold; the nearest one alone would be a stranger's, where a clean photo shows one in front of the person.

    No objective may ask a face verifier, as the victim is judged by one. This is none: it chooses whom to protect, once
    and before the attack, and no gradient comes from it.

    Args:
        model: of the embeddings.
        picture: mode RGB, upright, in sRGB.
        boxes: of its faces, as ``face_boxes`` finds them in it.
        reference: embeddings of the person's clean photos, see ``reference``.
    """
    if not boxes:
        return []
    aligned = []
    for left, top, right, bottom in boxes:
        around = widened((left, top, right, bottom), 3.0, picture.size)  # dlib copies all it is given
        x, y = around[:2]
        image = torch.from_numpy(np.array(picture.crop(around))).permute(2, 0, 1)
        aligned.append(model.align(image, model.face(image, (left - x, top - y, right - x, bottom - y))))
    distances = model.distance(model.embed_aligned(torch.stack(aligned)), reference).quantile(0.5, dim=1)
    return [box for box, distance in zip(boxes, distances.tolist(), strict=True) if distance < model.threshold]


class _Dlib(NamedTuple):
    predictor: Any
    network: Any
    centre: Tensor


@cache
def _dlib() -> _Dlib:
    import dlib  # here, as it takes a while

    package = find_spec("face_recognition_models")  # not imported: that needs pkg_resources, which setuptools dropped
    assert package
    assert package.origin
    models = Path(package.origin).parent / "models"
    return _Dlib(
        dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat")),
        dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat")),
        load_file(Path(__file__).with_name("dlib_centre.safetensors"))["centre"],
    )


class _UniFace(NamedTuple):
    detector: Any
    recognizer: Any
    align: Any


@cache
def _uniface() -> _UniFace:
    try:
        from uniface import ArcFace, RetinaFace, face_alignment
        from uniface.constants import ArcFaceWeights
    except ModuleNotFoundError as error:
        raise InputError("UniFace needs the extra uniface: pip install -e '.[uniface]'") from error
    try:
        return _UniFace(RetinaFace(), ArcFace(model_name=ArcFaceWeights.RESNET), face_alignment)
    except (OSError, ValueError) as error:  # no network or no room; a file with another hash
        raise InputError(
            f"the weights of UniFace cannot be fetched ({error}): check the network, or copy ~/.uniface/models from a "
            f"machine that has them (UNIFACE_CACHE_DIR names another folder)"
        ) from error


def _rectangle(box: Any, scale: float) -> Any:
    import dlib

    return dlib.rectangle(*(round(edge * scale) for edge in (box.left(), box.top(), box.right(), box.bottom())))


def _pixels(image: UInt8[Tensor, "3 h w"]) -> NDArray[np.uint8]:
    """As these libraries want it: height, width, channel."""
    return image.permute(1, 2, 0).contiguous().cpu().numpy()
