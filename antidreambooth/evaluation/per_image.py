"""What all measures have in common: a value for each picture, and their mean."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from antidreambooth.diffusion.precision import made_on_cpu


class PerImage(Metric):
    """Keeps a value for each picture, NaN where undefined; computes the mean of the defined ones over all ranks.

    ``higher_is_better`` speaks for the person who is protected: of what a victim draws it is True where a higher mean
    is more protection, of the cloak itself where a higher mean disturbs the photo less.
    """

    name: ClassVar[str]
    is_differentiable = False
    full_state_update = False

    values: list[Tensor]  # one tensor for each update; a tensor of all ranks inside ``sync_context()``

    def __init__(self, **kwargs: Any) -> None:
        with made_on_cpu():
            super().__init__(**kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def add(self, values: Float[Tensor, " n"]) -> None:
        """More pictures."""
        self.values.append(values.detach().to(self.device, self.dtype))

    @property
    def per_image(self) -> Float[Tensor, " n"]:
        """Of this rank's pictures, in the order of the updates."""
        return dim_zero_cat(self.values)

    def compute(self) -> Float[Tensor, ""]:
        """Mean over the pictures where it is defined; NaN if it is nowhere."""
        return self.per_image.nanmean()
