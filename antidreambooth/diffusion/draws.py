"""What is random in a step of diffusion: the timestep, the noise, the sample from the posterior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.densities import TimestepSampler
from antidreambooth.diffusion.seeding import normal


@dataclass(frozen=True)
class Draw:
    """The random part of an objective, drawn for all images at once so that micro-batches do not change it."""

    timesteps: Int[Tensor, " n"]
    noise: Float[Tensor, "n c h w"]
    posterior_noise: Float[Tensor, "n c h w"]
    transforms: tuple[Float[Tensor, "n _"], ...] = ()  # one for each random transform
    clean: tuple[Float[Tensor, "n _ _ _"], ...] = ()  # mean and std of the clean photos' latents, where they count
    parts: tuple[Draw, ...] = ()  # of the terms of a sum

    @classmethod
    def sample(
        cls,
        backbone: Backbone,
        shape: Sequence[int],
        generator: torch.Generator,
        timesteps: TimestepSampler | None = None,
    ) -> Draw:
        """For latents of ``shape`` (n c h w), on the generator's device; timesteps as the base model wants them."""
        drawn = (timesteps or backbone.density)(shape[0], len(backbone.noising), generator)
        noise, posterior_noise = normal((2, *shape), generator)
        return cls(drawn, noise, posterior_noise)

    @classmethod
    def nothing(cls, count: int, device: torch.device, parts: Sequence[Draw] = ()) -> Draw:
        """Of ``count`` images for which nothing is random, or only what is in ``parts``."""
        none = torch.zeros((count, 0, 0, 0), device=device, dtype=torch.float32)
        return cls(torch.zeros(count, device=device, dtype=torch.int64), none, none, parts=tuple(parts))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, one after the other."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.changed(note)
        return tuple(found)

    def filled(self, tensors: Sequence[Tensor]) -> Draw:
        """One of the same form that has these tensors."""
        given = iter(tensors)
        return self.changed(lambda _: next(given))

    def rows(self, index: slice) -> Draw:
        """The part that belongs to some of the images."""
        return self.changed(lambda tensor: tensor[index])

    def changed(self, change: Callable[[Tensor], Tensor]) -> Draw:
        """One with each tensor changed."""
        return Draw(
            change(self.timesteps),
            change(self.noise),
            change(self.posterior_noise),
            tuple(map(change, self.transforms)),
            tuple(map(change, self.clean)),
            tuple(part.changed(change) for part in self.parts),
        )
