"""What happens to photos between the one who publishes them and the one who trains on them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.family import Family
from antidreambooth.diffusion.precision import borrowing, full_precision, made_on_cpu, usual_device
from antidreambooth.diffusion.sampling import eight_bits
from antidreambooth.errors import InputError, require
from antidreambooth.finetuning import augmentation


@dataclass(frozen=True)
class Scene:
    """What a condition may use beside the photos.

    Args:
        backbone: loads the untouched base model; called only where a condition needs it.
        clean: other, unprotected photos of the person, as many as can be had.
        seed: of whatever is random.
    """

    backbone: Callable[[], Backbone]
    clean: UInt8[Tensor, "m 3 h w"]
    seed: int = 0


class Condition(ABC):
    """One thing that happens to photos; several may follow each other."""

    def check(self, family: type[Family]) -> None:  # noqa: B027 (few need it)
        """Looks whether it works with a family of base models, before anything is loaded.

        Raises:
            InputError: it does not.
        """

    @abstractmethod
    def __call__(self, photos: UInt8[Tensor, "n 3 h w"], scene: Scene) -> UInt8[Tensor, "n 3 h w"]:
        """The photos afterwards, at the same size."""


class JPEG(Condition):
    """Compressed, as every upload is.

    Args:
        quality: 1 to 100.
    """

    def __init__(self, quality: int = 75) -> None:
        require("quality", quality, 1, 100)
        self.quality = quality

    def __call__(self, photos: UInt8[Tensor, "n 3 h w"], scene: Scene) -> UInt8[Tensor, "n 3 h w"]:
        """Each photo through an encoder and back."""
        return torch.stack([augmentation.jpeg(photo, self.quality) for photo in photos])


class Rescale(Condition):
    """Scaled down and back up, as thumbnails and screenshots are.

    Args:
        factor: of the small size to the full one.
    """

    def __init__(self, factor: float = 0.5) -> None:
        require("factor", factor, above=0, most=1)
        self.factor = factor

    def __call__(self, photos: UInt8[Tensor, "n 3 h w"], scene: Scene) -> UInt8[Tensor, "n 3 h w"]:
        """Bicubic both ways, with antialiasing."""
        size = list(photos.shape[-2:])
        small = [max(2, round(side * self.factor)) for side in size]  # torch 2.14 fails on a single pixel
        bicubic = F.InterpolationMode.BICUBIC
        back: Tensor = F.resize(F.resize(photos, small, bicubic, antialias=True), size, bicubic, antialias=True)
        return back


class Blur(Condition):
    """Smoothed by a Gaussian.

    Args:
        sigma: its standard deviation, in pixels.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        require("sigma", sigma, above=0)
        self.sigma = sigma

    def __call__(self, photos: UInt8[Tensor, "n 3 h w"], scene: Scene) -> UInt8[Tensor, "n 3 h w"]:
        """A kernel of three standard deviations to each side."""
        side = 2 * max(1, round(3 * self.sigma)) + 1
        blurred: Tensor = F.gaussian_blur(photos, [side, side], [self.sigma, self.sigma])
        return blurred


class Clean(Condition):
    """Cleaned by image-to-image through the untouched base model (SDEdit, arXiv:2108.01073).

    Args:
        strength: share of the noise schedule that is added and taken away again.
        steps: sampling steps of the whole schedule.
        guidance_scale: classifier-free guidance; 1 is none, whatever the family's own scale begins with.
    """

    def __init__(self, strength: float = 0.2, steps: int = 50, guidance_scale: float = 1.0) -> None:
        require("strength", strength, above=0, most=1)
        require("steps", steps, 1)
        require("guidance_scale", guidance_scale, 0)
        self.strength, self.steps, self.guidance_scale = strength, steps, guidance_scale

    def check(self, family: type[Family]) -> None:
        """Diffusers has an image-to-image pipeline of the family."""
        if image_to_image(family) is None:
            raise InputError(
                f"diffusers has no image-to-image pipeline of {family.family} that adds noise to a photo: leave out "
                "the condition Clean, or try it with another base model"
            )

    def __call__(self, photos: UInt8[Tensor, "n 3 h w"], scene: Scene) -> UInt8[Tensor, "n 3 h w"]:
        """One photo at a time, each from noise of its own."""
        backbone, device = scene.backbone(), usual_device()
        self.check(type(backbone))
        with made_on_cpu(), full_precision(device), torch.no_grad(), borrowing(backbone, device):
            return self._cleaned(backbone, photos, scene.seed)

    def _cleaned(self, backbone: Backbone, photos: Tensor, seed: int) -> Tensor:
        pipeline = AutoPipelineForImage2Image.from_pipe(backbone.pipeline())
        pipeline.set_progress_bar_config(disable=True)
        name, none = backbone.guidance
        scale = none + self.guidance_scale - 1
        against = backbone.given(backbone.negative(1), "negative_") if backbone.guides(scale) else {}
        sides = dict(zip(("height", "width"), photos.shape[-2:], strict=True))  # some take them from the photo
        known = inspect.signature(pipeline.__call__).parameters
        cleaned = [
            pipeline(
                **backbone.given(backbone.embed([backbone.defaults.class_prompt])),
                **against,
                **{side: pixels for side, pixels in sides.items() if side in known},
                **{name: scale},
                image=photo[None].float() / 255,
                strength=self.strength,
                num_inference_steps=self.steps,
                generator=torch.Generator("cpu").manual_seed(seed + index),
                output_type="pt",
            ).images
            for index, photo in enumerate(photos)
        ]
        return eight_bits(torch.cat(cleaned), backbone.defaults.class_prompt).cpu()


def image_to_image(family: type[Family]) -> Any:
    """The official pipeline that adds noise to a photo and takes it away again; None where a family has none.

    Some pipelines of that kind take a photo as something to look at, which is another thing.
    """
    names = [name for name, kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items() if kind is family.official]
    found = [AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.get(name) for name in names]
    return next((one for one in found if one and "strength" in inspect.signature(one.__call__).parameters), None)


class Mix(Condition):
    """Some photos replaced by unprotected ones of the same person (arXiv:2303.15433, Section 5: uncontrolled setting).

    Args:
        share: of the photos that are unprotected; at least one, where it is not 0.
    """

    def __init__(self, share: float = 0.5) -> None:
        require("share", share, 0, 1)
        self.share = share

    def __call__(self, photos: UInt8[Tensor, "n 3 h w"], scene: Scene) -> UInt8[Tensor, "n 3 h w"]:
        """The last ones make room for the first clean ones."""
        count = min(-int(-self.share * len(photos) // 1), len(scene.clean))
        return torch.cat([photos[: len(photos) - count], scene.clean[:count]])
