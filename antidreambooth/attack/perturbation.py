"""The perturbation: its budget, the projection onto it, and the PGD loop that moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from antidreambooth.attack.canvas import STEP, Canvas
from antidreambooth.attack.objectives import Denoising, Objective
from antidreambooth.attack.steps import Sign, StepRule
from antidreambooth.attack.surrogates import Surrogate
from antidreambooth.attack.transforms import JPEGCodec, Transform
from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior, frozen
from antidreambooth.diffusion.densities import LargestGradient
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.precision import cast_once
from antidreambooth.diffusion.recording import Recording
from antidreambooth.diffusion.seeding import Turn, uniform
from antidreambooth.errors import InputError, require
from antidreambooth.photos.resampling import grid_size

T = TypeVar("T")


def alone(gradient: Tensor) -> Tensor:
    """The gradient of a run with one process: as it is."""
    return gradient


def random_noise(originals: UInt8[Tensor, "n 3 h w"], budget: float, seed: int) -> UInt8[Tensor, "n 3 h w"]:
    """The control: each value goes up or down by the whole (floored) budget, with even chance, within 0..255."""
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(0, 2, originals.shape, generator=generator, device="cpu") * 2 - 1
    return (originals.int() + signs * int(budget)).clamp(0, 255).to(torch.uint8)


def random_change(size: tuple[int, int], side: int, budget: float, seed: int) -> Int16[Tensor, "h w 3"]:
    """The control at a photo's own size: signs as of ``random_noise`` for each pixel of a model, enlarged.

    Signs for each pixel of a large photo would be no control: what a trainer's resize leaves of them is 3 % of their
    energy.

    Args:
        size: of the photo, width and height.
        side: of the square that a model sees of the photo's short side, in pixels.
        budget: in 8-bit steps.
        seed: of the signs.
    """
    width, height = grid_size(size, side)
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(0, 2, (1, 3, height, width), generator=generator, device="cpu") * 2.0 - 1
    enlarged = interpolate(signs * int(budget), size[::-1], mode="bilinear")[0]
    return enlarged.round().to(torch.int16).permute(1, 2, 0)


def inside(part: Any, kind: type[T]) -> Iterator[T]:
    """What of a kind an objective is made of, such as transforms or timestep samplers, at whatever depth.

    Args:
        part: an objective, or something in one.
        kind: a class.
    """
    for value in vars(part).values():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, kind):
                yield one
            if isinstance(one, Objective | Transform) or hasattr(one, "objective"):  # the latter is a term of a sum
                yield from inside(one, kind)


class Ascent(NamedTuple):
    """Where the objective rises, and what it is like there."""

    gradient: Float[Tensor, "n 3 h w"]  # of the objective's mean in the pixels
    objective: Float[Tensor, ""]
    latents: Float[Tensor, ""]  # root mean square: an objective that holds them may grow by nothing else


def pixel_gradient(
    objective: Objective,
    backbone: Backbone,
    images: Float[Tensor, "n 3 h w"],
    embedding: Conditioning,
    draws: Sequence[Draw],
    micro_batch: int,
) -> Ascent:
    """Gradient of the objective's mean over images and draws with respect to the pixels, and that mean.

    The encoder is passed once each way, however many draws there are: their gradients are summed in the posterior's
    mean and standard deviation, and the sum goes back to the pixels. Transforms are those of the first draw.

    Memory grows with ``micro_batch``, not with the number of images or draws; the result does not depend on it.
    """
    gradients: list[Tensor] = []
    values: list[Tensor] = []
    squares: list[Tensor] = []
    for start in range(0, len(images), micro_batch):
        rows = slice(start, start + micro_batch)
        pixels = images[rows].detach().requires_grad_()
        posterior = objective.encode(backbone, pixels, draws[0].rows(rows))
        leaves = Posterior(*(part.detach().requires_grad_() for part in posterior))
        sums = [torch.zeros_like(part) for part in posterior]
        for draw in draws:
            value = objective(backbone, leaves, embedding, draw.rows(rows)).sum() / (len(images) * len(draws))
            parts = torch.autograd.grad(value, leaves, materialize_grads=True)
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
            values.append(value.detach())
        ways = [(part, total) for part, total in zip(posterior, sums, strict=True) if part.requires_grad]
        parts, totals = zip(*ways, strict=True)  # some encoders have no spread
        gradients += torch.autograd.grad(parts, pixels, totals)
        squares.append(posterior.mean.detach().square().flatten(1).mean(dim=1))
    return Ascent(torch.cat(gradients), torch.stack(values).sum(), torch.cat(squares).mean().sqrt())


class Moved(NamedTuple):
    """What PGD leaves behind."""

    state: Tensor  # of the canvas, within the budget
    objective: Float[Tensor, ""]  # its mean over the steps
    slope: Float[Tensor, ""]  # mean absolute gradient over the steps; the sign of a gradient hides NaN
    latents: Float[Tensor, ""]  # their root mean square over the steps
    memory: Tensor  # of the step rule


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent on the pixels (arXiv:1706.06083; arXiv:2303.15433, Section 4).

    Args:
        budget: largest change of a pixel, in 8-bit steps.
        step_size: change per step, in 8-bit steps; a tenth of the budget when not given (the published ratio).
        steps: steps per call.
        micro_batch: photos whose gradient is taken at a time.
        draws: of timestep and noise, over which each step's gradient is averaged; photos are encoded once for all of
            them. One as published; more is expectation over the model's noise (as arXiv:1707.07397 over transforms).
        objective: what to climb.
        rule: what a step does with the gradient; its sign, as published, when not given.
        reduce: averages the gradient over processes.
        recorded: whether a GPU replays the kernels of a gradient rather than be told each of them by Python.
    """

    budget: float = 8.0
    step_size: float | None = None
    steps: int = 6
    micro_batch: int = 4
    draws: int = 1
    objective: Objective = field(default_factory=Denoising)
    rule: StepRule = field(default_factory=Sign)
    reduce: Callable[[Tensor], Tensor] = alone
    recorded: bool = False
    recordings: WeakKeyDictionary[Backbone, Recording] = field(
        default_factory=WeakKeyDictionary, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        require("budget", self.budget, 1, 255, unit="in 8-bit steps (the paper's is about 6.4)")
        require("step_size", self.step_size, above=0, most=255, unit="in 8-bit steps")
        require("pgd_steps", self.steps, 1)  # as whoever gives it calls it
        require("micro_batch", self.micro_batch, 1)
        require("draws", self.draws, 1)
        if self.draws > 1 and self.samplers:
            raise InputError("LargestGradient looks at one draw a step: leave out draws, or use Uniform")

        if self.recorded and next(inside(self.objective, JPEGCodec), None):
            raise InputError("JPEGCodec runs on the CPU: use JPEG, or leave out execution.recorded")

    @property
    def samplers(self) -> list[LargestGradient]:
        """The objective's timestep samplers that learn from the gradients."""
        return list(inside(self.objective, LargestGradient))

    @property
    def effective_step_size(self) -> float:
        """Change per step, in 8-bit steps."""
        return self.budget / 10 if self.step_size is None else self.step_size

    def project(self, canvas: Canvas, state: Tensor) -> Tensor:
        """The nearest state within the budget."""
        return canvas.project(state, self.budget * STEP)

    def start(self, canvas: Canvas, seed: int) -> Tensor:
        """The perturbation before the first step: nothing, or noise that is the same on every rank and device.

        What timestep samplers know of the photos of another run is forgotten.
        """
        for sampler in self.samplers:
            sampler.begin()
        blank = canvas.blank
        if not self.rule.random_start:
            return torch.zeros_like(blank)
        generator = Turn(0, seed).generator(torch.device("cpu"))
        noise = uniform(blank.shape, generator) * 2 - 1
        return self.project(canvas, blank + self.budget * STEP * noise.to(blank)) - blank

    def __call__(
        self,
        surrogate: Surrogate,
        canvas: Canvas,
        state: Tensor,
        turn: Turn,
        generator: torch.Generator,
        memory: Tensor | None = None,
    ) -> Moved:
        """Moves a canvas' state by ``steps`` steps.

        Args:
            surrogate: whose gradient is climbed.
            canvas: the photos to protect.
            state: what they have become so far.
            turn: which round of how many this is.
            generator: of the objective's draws.
            memory: what the step rule remembered of this surrogate in the round before; it begins anew when not given.
        """
        size = self.effective_step_size * STEP
        backbone = surrogate.backbone
        memory = canvas.begin(self.rule) if memory is None or not self.rule.lasting else memory
        total, slope, latents = torch.zeros((3,), device=state.device, dtype=torch.float32)
        watching = self.samplers
        # A recording rounds weights by itself: it reads those that stay where they are.
        others = [model.denoiser for model in self.objective.models]
        rounded = nullcontext() if self.recorded else cast_once(*backbone.attacked.values(), *others)
        with frozen(backbone), rounded:
            embedding = surrogate.prompt_embedding()
            for number in range(self.steps):
                looks = canvas.looks(turn, turn.number * self.steps + number)
                images = canvas.images(state, looks)
                draws = [self.objective.draw(backbone, images, generator) for _ in range(self.draws)]
                if self.objective.compares:
                    clean = canvas.images(canvas.blank, looks)
                    draws = self.objective.compared(backbone, clean, draws, self.micro_batch)
                ascent = self._gradient(backbone, images, embedding, draws)
                for sampler in watching:
                    sampler.observe(ascent.gradient.abs().flatten(1).mean(dim=1), self.reduce)
                gradient = self.reduce(canvas.gradient(ascent.gradient, looks))
                direction, memory = canvas.direction(self.rule, gradient, memory)
                step = size * self.rule.factor(turn.progress(number / self.steps))
                state = self.project(canvas, state + step * direction)
                total, slope = total + ascent.objective, slope + gradient.abs().mean()
                latents = latents + ascent.latents
        return Moved(state, total / self.steps, slope / self.steps, latents / self.steps, memory)

    def _gradient(
        self,
        backbone: Backbone,
        images: Float[Tensor, "n 3 h w"],
        embedding: Conditioning,
        draws: Sequence[Draw],
    ) -> Ascent:
        """``pixel_gradient``, or its recording."""
        if not self.recorded:
            return pixel_gradient(self.objective, backbone, images, embedding, draws, self.micro_batch)
        if backbone not in self.recordings:
            known_as, kind, parts = (
                ref(backbone),
                type(embedding),
                len(embedding),
            )  # the recording must not keep the model

            def run(images: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
                model, embedding, drawn = known_as(), kind(others[:parts]), others[parts:]
                assert model is not None
                size = len(drawn) // self.draws
                filled = [draw.filled(drawn[size * k : size * (k + 1)]) for k, draw in enumerate(draws)]
                return pixel_gradient(self.objective, model, images, embedding, filled, self.micro_batch)

            self.recordings[backbone] = Recording(run)
        drawn = (part for draw in draws for part in draw.tensors)
        return Ascent(*self.recordings[backbone](images, *embedding, *drawn))
