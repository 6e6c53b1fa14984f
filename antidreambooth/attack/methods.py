"""The published methods by name, and the one builder: from a method, base models and settings to surrogates and attack.

A method is a row of ``METHODS``. Whoever runs one (the notebook's function, the Lightning modules, the benchmarks)
makes an ``Assembly`` of it, lets it adopt base models, and asks it for the surrogates that a round works with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from antidreambooth.attack.objectives import (
    ACE,
    Denoising,
    EncoderAway,
    EncoderTarget,
    LikelihoodRatio,
    Objective,
    ScoreDistillation,
    Targeted,
    Term,
    Transformed,
    Weighted,
)
from antidreambooth.attack.objectives.ratio import against_base
from antidreambooth.attack.parametrisation import OwnSize, Parametrisation, Shape
from antidreambooth.attack.perturbation import PGD, alone
from antidreambooth.attack.pool import Pooled
from antidreambooth.attack.steps import Momentum, Sign, StepRule
from antidreambooth.attack.surrogates import Alternating, Fixed, Offloaded, Surrogate
from antidreambooth.attack.transforms import Blur, Crop, Flip
from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.diffusion.class_images import BATCH, Progress
from antidreambooth.diffusion.defaults import Defaults, given
from antidreambooth.diffusion.densities import LargestGradient
from antidreambooth.diffusion.execution import Execution
from antidreambooth.diffusion.layout import read_defaults
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError, require
from antidreambooth.finetuning.adaptation import Adaptation
from antidreambooth.finetuning.cross_attention import CrossAttention
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation, prompts_asked
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.weights import Weights

ClassLatents = Callable[[Backbone, PriorPreservation], Posterior | None]
Lend = Callable[[Backbone, DreamBooth], Weights]


@dataclass(frozen=True)
class Method:
    """A method as its paper runs it; the files in ``configs/`` say the same.

    Args:
        surrogate: what is attacked: a model that learns clean and cloaked photos in turn (``alternating``), one that
            was trained on the clean photos before (``trained``), the base model itself (``untouched``), nothing of it
            but the autoencoder, whose encoder is all that the objective asks (``none``), or models along one training
            run on the clean photos, each in turn (``pool``).
        rounds: how many.
        pgd_steps: in a round.
        objective: what the perturbation maximises.
        several: whether it wants more than one base model.
        step_rule: what a PGD step does with the gradient.
        adaptation: what of a surrogate learns.
    """

    surrogate: Literal["alternating", "trained", "untouched", "none", "pool"]
    rounds: int
    pgd_steps: int
    objective: Callable[[], Objective] = Denoising
    several: bool = False
    step_rule: Callable[[], StepRule] = Sign
    adaptation: Callable[[], Adaptation] = Full


def mist() -> Objective:
    """Mist's fused loss (arXiv:2305.12683, equation 4), with its pattern replaced by one of ours.

    The paper's weight of 10^4 goes with a sum over the target's latent of 4 * 64 * 64 numbers: .61 with a mean.
    """
    return Weighted([Term(Denoising(), 0.61), Term(EncoderTarget("checkerboard"))])


def simac() -> Objective:
    """Denoising at the timesteps of the largest gradients (arXiv:2312.07865)."""
    return Denoising(LargestGradient())


def metacloak() -> Objective:
    """Denoising through what trainers and websites do to photos (arXiv:2311.13127): a blur of 7 pixels, flip, crop."""
    return Transformed([Blur(0.1, 2.0), Flip(), Crop(0.8)])


FALLING = partial(Momentum, 0.95, schedule="linear")  # ours; published methods take equal steps along the sign

METHODS = {
    "aspl": Method("alternating", rounds=50, pgd_steps=6),
    "t-aspl": Method("alternating", rounds=50, pgd_steps=6, objective=Targeted),
    "e-aspl": Method("alternating", rounds=50, pgd_steps=6, several=True),
    "fsmg": Method("trained", rounds=10, pgd_steps=10),
    "t-fsmg": Method("trained", rounds=10, pgd_steps=10, objective=Targeted),
    "e-fsmg": Method("trained", rounds=10, pgd_steps=10, several=True),
    "advdm": Method("untouched", rounds=10, pgd_steps=10),
    "simac": Method("alternating", rounds=50, pgd_steps=6, objective=simac),
    "caat": Method("alternating", rounds=50, pgd_steps=6, adaptation=CrossAttention),
    "metacloak": Method("pool", rounds=50, pgd_steps=6, objective=metacloak),
    "mist": Method("untouched", rounds=10, pgd_steps=10, objective=mist),
    "ace": Method("untouched", rounds=15, pgd_steps=10, objective=ACE),
    "sds": Method("untouched", rounds=10, pgd_steps=10, objective=ScoreDistillation),
    "photoguard": Method("none", rounds=20, pgd_steps=10, objective=EncoderTarget),
    "pid": Method("none", 100, 10, objective=EncoderAway, step_rule=partial(Sign, random_start=True)),
    "decoy": Method("trained", 20, 10, objective=LikelihoodRatio, step_rule=FALLING),
}
METHODS["ours"] = METHODS["decoy"]  # of all that takes no longer than ASPL it does best: results/README.md


@dataclass(frozen=True)
class Settings:
    """What a user may want otherwise than a method's paper; the values here are the published ones.

    Args:
        budget: largest change of a pixel's value, in 8-bit steps.
        shape: of the budget: the same for all pixels (``flat``), or more for those at which less is seen, and as
            visible on the whole as the flat one (``visible``).
        step_size: change per PGD step, in 8-bit steps; a tenth of the budget when not given.
        step_rule: what a PGD step does with the gradient; the method's own when not given.
        pgd_steps: PGD steps in a round; the method's own when not given.
        micro_batch: photos whose gradient is taken at a time; memory grows with it, the result does not change.
        draws: of timestep and noise for each time that photos are encoded; a step goes along their mean gradient, as
            expectation over transforms does (arXiv:1707.07397). One as published; a step takes longer with more.
        objective: what the perturbation maximises; the method's own when not given.
        parametrisation: what of the photos PGD moves, and so what comes back: ``OwnSize`` or ``Square``.
        training: how an alternating surrogate learns; of a model that does not learn only its checkpointing counts.
        adaptation: what of a surrogate learns that is alternating or one of a pool: ``Full``, ``CrossAttention`` or,
            for less memory, ``LoRA``; the method's own when not given.
        members: models of a pool, at equal distances along its training run.
        prompt: what a model that does not learn is asked for. When not given: what DreamBooth calls the person, if the
            model was trained on them, and the model's own class prompt, if it is untouched.
        offload: whether only the base model at work is on the device, and the others rest in main memory.
        execution: how the networks are run, for speed or memory.
    """

    budget: float = 8.0
    shape: Shape = "flat"
    step_size: float | None = None
    step_rule: StepRule | None = None
    pgd_steps: int | None = None
    micro_batch: int = 4
    draws: int = 1
    objective: Objective | None = None
    parametrisation: Parametrisation = field(default_factory=OwnSize)
    training: DreamBooth = field(default_factory=DreamBooth)
    adaptation: Adaptation | None = None
    members: int = 5
    prompt: str | None = None
    offload: bool = False
    execution: Execution = field(default_factory=Execution)


class Assembly:
    """A method with its settings, and the base models that it is given.

    Args:
        method: as published.
        settings: what is otherwise.
        reduce: averages a gradient over processes.

    Raises:
        InputError: a setting is out of range; nothing has been loaded by then.
    """

    def __init__(
        self, method: Method, settings: Settings | None = None, reduce: Callable[[Tensor], Tensor] = alone
    ) -> None:
        self.method, self.settings = method, settings or Settings()
        chosen = self.settings
        if chosen.execution.recorded and (chosen.offload or chosen.training.gradient_checkpointing):
            raise InputError(
                "execution.recorded keeps all of its memory, and weights where they are: leave out offload and "
                "gradient_checkpointing, or execution.recorded"
            )
        require("members", chosen.members, 1)
        self.adaptation = chosen.adaptation or method.adaptation()
        self.attack = PGD(
            budget=chosen.budget,
            step_size=chosen.step_size,
            steps=given(chosen.pgd_steps, method.pgd_steps),
            micro_batch=chosen.micro_batch,
            draws=chosen.draws,
            objective=chosen.objective or method.objective(),
            rule=chosen.step_rule or method.step_rule(),
            reduce=reduce,
            recorded=chosen.execution.recorded,
        )
        self.parametrisation = chosen.parametrisation.shaped(chosen.shape, chosen.budget)
        objective = self.attack.objective
        if self.encoder_only and method.surrogate in ("alternating", "trained", "pool"):
            raise InputError(
                "the objective asks the encoder alone, which no surrogate changes: attack the base model itself "
                "(--model.class_path FSMG --model.surrogate null, in Python method='photoguard')"
            )
        if against_base(objective) and method.surrogate == "untouched":
            raise InputError(
                "the objective compares the base model with itself: attack a model that was trained on the person "
                "(--model.surrogate configs/dreambooth.yaml), or give another decoy"
            )
        if objective.starts_flat and not self.attack.rule.random_start:
            raise InputError(
                f"{type(objective).__name__} has no gradient on photos without any change: use "
                "--model.step_rule Sign --model.step_rule.random_start true, in Python Sign(random_start=True)"
            )
        self.backbones: list[Backbone] = []
        self.prompts: list[str] = []  # of models that do not learn
        self.trainings: list[DreamBooth] = []  # of those that do, completed by the base models' own values
        self.classes: list[Posterior | None] = []

    @property
    def learns(self) -> bool:
        """Whether the surrogates learn, in every round or before the first one."""
        return self.method.surrogate in ("alternating", "pool")

    @property
    def encoder_only(self) -> bool:
        """Whether no denoiser and no text encoder is asked, nor loaded."""
        return self.attack.objective.encoder_only

    def require_possible(self, sources: Sequence[Source]) -> None:
        """Refuses base models that cannot learn, or be attacked, as this method and its settings want.

        To be called before they are loaded.

        Raises:
            InputError: one cannot.
        """
        for source in sources:
            for one in self.attack.objective.members():
                one.require_possible(source)
        for source in sources if self.learns else ():
            self.adaptation.require_learnable(source, self._training(read_defaults(source)))

    def asks(self, backbone: Backbone, prompt: str | None = None) -> list[list[str]] | None:
        """The lists of prompts that a run will ask a base model's text encoders for; None where one of them learns.

        Args:
            backbone: the base model.
            prompt: what it is asked for, if it does not learn; the settings' prompt when not given.
        """
        chosen = self.settings
        if self.encoder_only:
            return None
        if not self.learns:
            return [[given(prompt, given(chosen.prompt, self._usual_prompt(backbone)))]]
        training = self._training(backbone.defaults)
        if self.adaptation.teaches_text(training):
            return None
        return prompts_asked(training, min(chosen.micro_batch, BATCH))

    def adopt(
        self,
        backbones: Sequence[Backbone],
        class_latents: ClassLatents,
        seed: int,
        prompts: Sequence[str] | None = None,
    ) -> None:
        """Takes base models, untouched, on the device that will run them, and makes those ready that learn.

        Args:
            backbones: the base models, or what was trained on the person before.
            class_latents: latents of a base model's class images; called while it is untouched.
            seed: of what an adaptation adds at random.
            prompts: what each model that does not learn is asked for; the settings' prompt when not given.
        """
        chosen = self.settings
        self.backbones = list(backbones)
        if not self.learns:
            if not self.encoder_only:
                self.prompts = list(prompts or [given(chosen.prompt, self._usual_prompt(one)) for one in backbones])
            for backbone in self.backbones:
                backbone.checkpoint(chosen.training.gradient_checkpointing)
            return
        for backbone in self.backbones:
            training = self._training(backbone.defaults)
            self.trainings.append(training)
            self.classes.append(class_latents(backbone, training.prior) if training.prior.weight else None)
            self.adaptation.apply(backbone, training, seed)

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's parameter groups: what the surrogates learn with, each at its own learning rate."""
        return [
            {"params": backbone.learned(), "lr": training.learning_rate, "weight_decay": training.weight_decay}
            for backbone, training in zip(self.backbones, self.trainings, strict=True)
        ]

    def surrogates(
        self,
        originals: Float[Tensor, "n 3 h w"],
        clean: Float[Tensor, "m 3 h w"],
        lend: Lend,
        progress: Progress = iter,
    ) -> list[Surrogate]:
        """What the rounds work with, one for each base model; computes what stays the same in all of them.

        Args:
            originals: the photos to protect, in [-1, 1], on the device.
            clean: the photos that the surrogates learn from.
            lend: the weights of a base model that learn, with their optimizer.
            progress: wraps the loop over the steps in which a pool is trained, in the first round.
        """
        made: list[Surrogate] = []
        for number, backbone in enumerate(self.backbones):
            surrogate = self._surrogate(number, clean, lend, progress)
            self.attack.objective.prepare(backbone, originals)
            if self.settings.execution.decoder_rests:
                backbone.rest_decoder()
            made.append(Offloaded(surrogate, originals.device) if self.settings.offload else surrogate)
        return made

    def _surrogate(self, number: int, clean: Tensor, lend: Lend, progress: Progress) -> Surrogate:
        backbone, micro_batch = self.backbones[number], self.attack.micro_batch
        if not self.learns:
            return Fixed(backbone, None if self.encoder_only else self.prompts[number])
        training = self.trainings[number]
        latents = backbone.encode_all(clean, micro_batch)
        weights, recorded = lend(backbone, training), self.settings.execution.recorded
        given_to = (backbone, training, weights, latents, self.classes[number], micro_batch, recorded)
        if self.method.surrogate == "pool":
            return Pooled(*given_to, members=self.settings.members, progress=progress)
        return Alternating(*given_to)

    def _training(self, defaults: Defaults) -> DreamBooth:
        """How a surrogate of a base model learns: a pool as a victim does, in as many steps.

        Raises:
            InputError: a pool has fewer steps than members.
        """
        training = self.settings.training
        if self.method.surrogate == "pool":
            training = self.adaptation.usual(training).completed(defaults, self.adaptation.role)
            if (training.steps or 0) < self.settings.members:
                raise InputError(
                    f"{training.steps} training steps give no {self.settings.members} models along the way: use fewer "
                    "--model.members (in Python Settings(members=...)), or more --model.surrogate.steps"
                )
        return self.adaptation.surrogate_settings(training, defaults)

    def _usual_prompt(self, backbone: Backbone) -> str:
        """An untouched base model knows nobody by name."""
        if self.method.surrogate in ("untouched", "none"):
            return backbone.defaults.class_prompt
        return self.settings.training.instance_prompt


def plain_weights(backbone: Backbone, training: DreamBooth) -> Weights:
    """The weights that learn, with torch's own AdamW: for a run with one process and no training framework."""
    learned = backbone.learned()
    rate, decay = training.learning_rate, training.weight_decay
    assert rate is not None  # an assembly's are complete
    assert decay is not None
    return Weights(learned, torch.optim.AdamW(learned, lr=rate, weight_decay=decay, fused=True))
