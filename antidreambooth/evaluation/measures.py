"""How much of a person is in the pictures that a victim draws (https://arxiv.org/abs/2303.15433, Section 5.1).

No figure is read alone: ISM leaves out pictures without a face, hence joint ISM, acceptance and FDFR beside it, and the
same figures of a model that was fine-tuned on nobody.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics import MetricCollection

from antidreambooth.diffusion.precision import full_precision
from antidreambooth.diffusion.seeding import normal
from antidreambooth.evaluation.brisque import brisque, brisque_available
from antidreambooth.evaluation.faces import FaceModel, Found, find
from antidreambooth.evaluation.per_image import PerImage


class FDFR(PerImage):
    """Face detection failure rate: the share of pictures in which no face is found."""

    name = "fdfr"
    higher_is_better = True

    def update(self, found: Found) -> None:
        """1 without a face, 0 with one."""
        self.add((~found.any).float())


class Compared(PerImage):
    """What compares pictures with a person's clean photos.

    Args:
        model: that made the embeddings.
        reference: embeddings of the photos, see ``antidreambooth.evaluation.faces.reference``.
    """

    reference: Float[Tensor, "m d"]

    def __init__(self, model: FaceModel, reference: Float[Tensor, "m d"], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = model
        self.register_buffer("reference", reference, persistent=False)

    def similarity(self, found: Found) -> Float[Tensor, " n"]:
        """Cosine of each picture's largest face to the mean of the clean photos, in [-1, 1]; NaN without a face."""
        return F.cosine_similarity(found.embeddings.to(self.reference), self.reference.mean(0, keepdim=True))

    def median_distance(self, found: Found) -> Float[Tensor, " n"]:
        """Median of the distances of each picture's largest face to the clean photos; NaN without a face."""
        return self.model.distance(found.embeddings.to(self.reference), self.reference).quantile(0.5, dim=1)


class ISM(Compared):
    """Identity score matching: cosine to the mean of the clean photos, over pictures with a face only."""

    name = "ism"
    higher_is_better = False

    def update(self, found: Found) -> None:
        """NaN without a face."""
        self.add(self.similarity(found))


class JointISM(Compared):
    """ISM over all pictures: one without a face counts as 0, which is what a stranger's face comes to."""

    name = "joint_ism"
    higher_is_better = False

    def update(self, found: Found) -> None:
        """0 without a face."""
        self.add(self.similarity(found).nan_to_num(0.0))


class Distance(Compared):
    """Median distance to the clean photos, over pictures with a face only; the verifier's, see ``FaceModel``."""

    name = "distance"
    higher_is_better = True

    def update(self, found: Found) -> None:
        """NaN without a face."""
        self.add(self.median_distance(found))


class Acceptance(Compared):
    """Share of pictures that a verifier takes for the person: a face, and its median distance below the threshold."""

    name = "acceptance"
    higher_is_better = False

    def update(self, found: Found) -> None:
        """1 where accepted, else 0."""
        self.add((self.median_distance(found) < self.model.threshold).float())


class EmbeddingStability(PerImage):
    """Quality of a face as the stability of its embedding: 2 sigmoid(-d), in (0, 1]; 1 is entirely stable.

    The formula is SER-FIQ's (arXiv:2003.09373, equation 2), but d is the mean distance between the embedding of the
    aligned face and those of four slight changes of it, whereas SER-FIQ drops out units of a network that has dropout,
    and these have none. Figures of the two cannot be compared. Costs four embeddings a face.
    """

    name = "stability"
    higher_is_better = False  # a spoiled face is protection

    def __init__(self, model: FaceModel, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = model

    def update(self, found: Found) -> None:
        """NaN without a face."""
        distance = torch.full_like(found.embeddings[:, 0], torch.nan)
        for index, face in zip(found.any.nonzero().flatten().tolist(), found.aligned, strict=True):
            changed = self.model.embed_aligned(disturbed(face))
            distance[index] = self.model.distance(found.embeddings[index, None], changed).mean()
        self.add(2 * torch.sigmoid(-distance))


class Brisque(PerImage):
    """BRISQUE of the pictures, see ``antidreambooth.evaluation.brisque``; higher is worse to look at."""

    name = "brisque"
    higher_is_better = True

    def update(self, images: UInt8[Tensor, "n 3 h w"]) -> None:
        """NaN where a picture has no texture."""
        self.add(brisque(images))


class FaceMeasures(MetricCollection):
    """All measures of a victim's pictures, with the faces looked for once.

    Args:
        model: detector and embedding.
        reference: embeddings of the person's clean photos.
        stability: whether to take ``EmbeddingStability`` too, which makes it several times slower.
    """

    def __init__(self, model: FaceModel, reference: Float[Tensor, "m d"], stability: bool = False) -> None:
        metrics: list[PerImage] = [FDFR()]
        metrics += [kind(model, reference) for kind in (ISM, JointISM, Distance, Acceptance)]
        metrics += [EmbeddingStability(model)] if stability else []
        metrics += [Brisque()] if brisque_available() else []
        super().__init__({metric.name: metric for metric in metrics}, compute_groups=False)
        self.model = model

    def forward_images(self, images: UInt8[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, " n"]]:
        """Takes in pictures (8 bits) and returns a column for each measure of them, in fp32 even under autocast.

        ``face`` and ``accepted`` are 0 or 1; ``ism``, ``distance`` and ``stability`` are NaN without a face.
        """
        with full_precision(cast(PerImage, self["fdfr"]).device):
            self.update(found=find(self.model, images), images=images)
        columns = {name: cast(PerImage, metric).values[-1] for name, metric in self.items()}
        return {"face": 1 - columns.pop("fdfr"), "accepted": columns.pop("acceptance"), **columns}


def face_measures(model: FaceModel, reference: Float[Tensor, "m d"], *, stability: bool = False) -> FaceMeasures:
    """The measures that can be taken here, of pictures of the person whose clean photos have these embeddings."""
    return FaceMeasures(model, reference, stability)


def measure(
    model: FaceModel, reference: Float[Tensor, "m d"], images: UInt8[Tensor, "n 3 h w"], *, stability: bool = False
) -> dict[str, Float[Tensor, " n"]]:
    """The columns of ``FaceMeasures.forward_images`` for these pictures alone."""
    return face_measures(model, reference, stability=stability).forward_images(images)


def disturbed(face: UInt8[Tensor, "3 s s"]) -> UInt8[Tensor, "4 3 s s"]:
    """An aligned face mirrored, shifted and cropped by a twentieth of its side, and with Gaussian noise (std 8)."""
    side, step = face.shape[-1], face.shape[-1] // 20
    shifted = F.pad(face[None].float(), (step, 0, step, 0), mode="replicate")[0, :, :side, :side]
    inner = face[None, :, step:-step, step:-step].float()
    cropped = F.interpolate(inner, (side, side), mode="bilinear", antialias=True)[0]
    noise = normal(face.shape, torch.Generator("cpu").manual_seed(0)).to(face.device)  # the same for each
    changed = [face.flip(-1).float(), shifted, cropped, face + 8 * noise]
    return torch.stack(changed).round().clamp(0, 255).to(torch.uint8)
