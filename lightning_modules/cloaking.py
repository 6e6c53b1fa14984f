"""What every cloaking method shares: the perturbation as state, the round, logging."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from antidreambooth.attack.canvas import STEP, Canvas
from antidreambooth.attack.cost import counted
from antidreambooth.attack.methods import Assembly, Method, Settings
from antidreambooth.attack.objectives import Objective
from antidreambooth.attack.objectives.ratio import against_base, decoys, oppose_base, require_decoys
from antidreambooth.attack.parametrisation import OwnSize, Parametrisation, Shape
from antidreambooth.attack.rounds import Outcome, Photos, alternate, require_vital
from antidreambooth.attack.steps import StepRule
from antidreambooth.attack.surrogates import Surrogate
from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.diffusion.execution import Execution
from antidreambooth.diffusion.layout import resolution_of
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.diffusion.source import Precision, Source
from antidreambooth.errors import InputError
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.weights import Weights
from lightning_modules.backbone_module import BackboneModule
from lightning_modules.running.borrowing import weights_of


@dataclass(frozen=True)
class Ensemble:
    """Further base models to attack beside the first (arXiv:2303.15433, Section 4: ensemble-based variants).

    Args:
        backbones: ``embedded``, folders in diffusers layout, or hub ids; for a revision or a variant of the weights
            {name: NAME, revision: REVISION, variant: VARIANT} instead of a name, for one file {name: FILE,
            components: FOLDER}; each may hold frozen_weights of its own instead of the run's.
        offload: whether from the first round on only the one at work is on the device, and the others rest in main
            memory; for a single process.
    """

    backbones: list[str | Source] = field(default_factory=list)
    offload: bool = False


class Cloaking(BackboneModule):
    """A run that perturbs photos; one ``training_step``, one epoch, is one round of a method.

    Subclasses say what the surrogates are. The perturbation (n 3 h w, in units of [-1, 1]) and what the step rule
    remembers of each base model are buffers: saved in checkpoints and, since gradients are averaged over ranks,
    identical on all of them.

    Args:
        backbone: base model: ``embedded``, a folder in diffusers layout, a hub id, or one file (``components``).
        revision: branch, tag or commit of a hub id.
        variant: variant of the weights' files, such as ``fp16``; computed in fp32 all the same.
        components: where backbone is one ``.safetensors`` file, a folder in diffusers layout of the same kind of model:
            its config files, tokenizers and scheduler are used, and its weights of networks that the file lacks.
        frozen_weights: how weights of denoiser and text encoders are held that do not learn: ``bf16`` takes half the
            memory (for --trainer.precision bf16-mixed, which rounds to it anyway), ``nf4`` an eighth of the denoiser's
            (also on CUDA, with bitsandbytes, for a LoRA as the surrogate or one that does not learn).
        resolution: side in pixels at which photos are cloaked; what the backbone was made for when not given.
        budget: largest change of any pixel's value, in 8-bit steps.
        shape: of the budget: ``flat``, the same for all pixels, or ``visible``: more for pixels at which less is seen,
            up to four times as much, and less for the others, so that all in all it is as visible, by SSIM.
        step_size: change per PGD step, in 8-bit steps; a tenth of the budget when not given.
        pgd_steps: PGD steps in a round.
        micro_batch: photos whose gradient is taken at a time; memory grows with it, the result does not change.
        draws: of timestep and noise for each time that photos are encoded; a step goes along their mean gradient, as
            expectation over transforms does (arXiv:1707.07397). One as published; a step takes longer with more.
        objective: what the perturbation maximises: Denoising (when not given), Targeted, ACE, ScoreDistillation,
            EncoderTarget, EncoderAway, EncoderSpread, LikelihoodRatio, or Transformed and Weighted ones of these.
        step_rule: what a PGD step does with the gradient: Sign (when not given), Momentum, NormalizedL2; each has a
            schedule of the step size and a random start.
        parametrisation: what of the photos PGD moves, and so what comes back: OwnSize (when not given) or Square.
        ensemble: further base models to attack at the same time.
        execution: how the networks are run, for speed or memory.
    """

    perturbation: Tensor
    memory: Tensor  # of the step rule, for each base model; empty where it remembers nothing from round to round
    passes: Tensor  # images through U-Nets and through encoders in all rounds, on this rank
    buffers_kept = ("perturbation", "memory", "passes")

    def __init__(
        self,
        *,
        backbone: str = "embedded",
        revision: str | None = None,
        variant: str | None = None,
        components: str | None = None,
        frozen_weights: Precision = "fp32",
        resolution: int | None = None,
        budget: float = 8.0,
        shape: Shape = "flat",
        step_size: float | None = None,
        pgd_steps: int = 6,
        micro_batch: int = 4,
        draws: int = 1,
        objective: Objective | None = None,
        step_rule: StepRule | None = None,
        parametrisation: Parametrisation | None = None,
        ensemble: Ensemble = Ensemble(),
        execution: Execution = Execution(),  # noqa: B008 (frozen)
    ) -> None:
        source = Source(backbone, revision, variant, components=components, frozen_weights=frozen_weights)
        super().__init__(source=source, resolution=resolution)
        others = Source.several(ensemble.backbones, frozen_weights)
        for source in others:
            resolution_of(source, self.resolution)  # a wrong one is found before the others are loaded, or trained on
        self.save_hyperparameters(logger=False)  # a subclass's own, too
        self.automatic_optimization = False
        settings = Settings(
            budget=budget,
            shape=shape,
            step_size=step_size,
            step_rule=step_rule,
            pgd_steps=pgd_steps,
            micro_batch=micro_batch,
            draws=draws,
            objective=objective,
            parametrisation=parametrisation or OwnSize(),
            offload=ensemble.offload,
            execution=execution,
        )
        self.assembly = Assembly(self.method(), self.completed(settings), self._average)
        self.assembly.require_possible([self.source, *others])
        self.attack, self.parametrisation = self.assembly.attack, self.assembly.parametrisation
        if others and (decoys(self.attack.objective) or against_base(self.attack.objective)):
            raise InputError("a likelihood ratio of the run's own is of one base model: leave out --model.ensemble")
        if not self.trains_decoys:
            require_decoys(self.attack.objective)
        oppose_base(self.attack.objective, self.source)
        self.register_buffer("perturbation", torch.empty(0))
        self.register_buffer("memory", torch.empty(0))
        self.register_buffer("passes", torch.zeros(2, dtype=torch.int64))
        self.surrogates: list[Surrogate] = []
        self.rounds = 0  # after the last one in this process; Lightning counts an epoch only after all hooks

    @property
    def sources(self) -> list[Source]:
        """The base models, the first one first."""
        return [self.source, *Source.several(self.hparams.ensemble.backbones, self.source.frozen_weights)]

    @property
    def trains_decoys(self) -> bool:
        """Whether models of nobody are trained before the attack, where the objective wants one."""
        return False

    @property
    def encoder_only(self) -> bool:
        """As the objective says."""
        return self.assembly.encoder_only

    @property
    def backbones(self) -> list[Backbone]:
        """The base models, as loaded."""
        return [self.backbone, *cast(list[Backbone], list(self.others))]

    def setup(self, stage: str) -> None:
        """Refuses a run of no rounds, which would deliver the photos as they are."""
        super().setup(stage)
        if (self.trainer.max_epochs or 0) < 1:  # Lightning's -1 is without end
            raise InputError(f"--trainer.max_epochs is the number of rounds, 1 or more: got {self.trainer.max_epochs}")
        if self.hparams.execution.recorded and self.trainer.world_size > 1:  # messages between them are not recorded
            raise InputError("a recorded run is one process: leave out --model.execution.recorded")

    def method(self) -> Method:
        """Which row of the methods' table this run is."""
        raise NotImplementedError

    def completed(self, settings: Settings) -> Settings:
        """The settings that all methods share, with those of this one."""
        raise NotImplementedError

    def build(self) -> None:
        """Loads all base models and makes surrogates of them; the perturbation starts at nothing."""
        super().build()
        resting: Canvas = self.trainer.datamodule.canvas  # type: ignore[attr-defined]
        canvas = resting.to(self.place)
        self.perturbation = torch.zeros_like(canvas.blank)
        others = [self.load(number) for number in range(1, len(self.sources))]
        self.others = nn.ModuleList(backbone for backbone, _ in others)
        self.fingerprints = [fingerprint for _, fingerprint in others]
        self.memory = self._remembered([canvas.begin(self.attack.rule) for _ in self.backbones])
        self.assembly.adopt(self.backbones, self.class_latents, self.seed, self.prompts())

    def prompts(self) -> list[str] | None:
        """What each base model that does not learn is asked for; the method's own prompt when not said."""
        return None

    def asks(self, backbone: Backbone, number: int) -> list[list[str]] | None:
        """What the method asks for."""
        prompts = self.prompts()
        return self.assembly.asks(backbone, prompts[number] if prompts else None)

    def class_latents(self, backbone: Backbone, prior: PriorPreservation) -> Posterior | None:
        """Latents of a base model's class images."""
        known = zip(self.backbones, [self.fingerprint, *self.fingerprints], strict=True)
        fingerprint = next(known_as for one, known_as in known if one is backbone)
        return self.class_posterior(backbone, fingerprint, prior, self.attack.micro_batch)

    def lend(self, backbone: Backbone, training: DreamBooth) -> Weights:
        """The weights of a base model that learn, as the strategy lends them."""
        return weights_of(self.trainer.strategy, backbone, cast(Optimizer, self.optimizers()), self.manual_backward)

    def training_step(self, batch: Photos, batch_idx: int) -> None:
        """One round."""
        if not self.surrogates:
            seen = batch.canvas.images(batch.canvas.blank)
            self.surrogates = self.assembly.surrogates(seen, batch.clean, self.lend, self._progress("pool"))
        if self.current_epoch == 0:
            self.perturbation = self.attack.start(batch.canvas, self.seed)
        with counted([*self.backbones, *self.attack.objective.models]) as passes:
            state = batch.canvas.blank + self.perturbation
            memory = list(self.memory)
            outcome = alternate(self.surrogates, batch.canvas, state, self.attack, self.turn, memory)
        self.memory = self._remembered(list(outcome.memory))
        self.passes += torch.tensor([passes.denoiser, passes.encoder], device=self.device)
        self.perturbation = outcome.state - batch.canvas.blank
        self.rounds = self.current_epoch + 1
        self._log(outcome, batch.canvas.pixel_change(self.perturbation))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keeps what timestep samplers have learned of the photos."""
        super().on_save_checkpoint(checkpoint)
        if tables := [sampler.table for sampler in self.attack.samplers]:
            checkpoint["timesteps"] = tables

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also gives it back to them."""
        super().on_load_checkpoint(checkpoint)
        for sampler, table in zip(self.attack.samplers, checkpoint.get("timesteps", []), strict=True):
            sampler.table = table

    def memory_savers(self) -> list[str]:
        """Photos one at a time; base models one at a time; in bf16 what is frozen in it."""
        chosen, alone = self.hparams, self.trainer.world_size == 1
        several = bool(chosen.ensemble.backbones)
        frozen = not (self.assembly.learns and self.assembly.adaptation.whole)
        halved = frozen and self.trainer.precision == "bf16-mixed" and self.source.frozen_weights == "fp32"
        return [
            *(["--model.execution.recorded false"] if chosen.execution.recorded else []),
            *(["--model.micro_batch 1"] if chosen.micro_batch > 1 else []),
            *(["--model.ensemble.offload true"] if several and alone and not chosen.ensemble.offload else []),
            *(["--model.frozen_weights bf16"] if halved else []),
        ]

    def on_train_epoch_end(self) -> None:
        """The round is whole."""
        self.preemption.leave_if_asked(self.trainer)

    @property
    def turn(self) -> Turn:
        """The round that is under way."""
        return replace(self.turn_of(self.current_epoch), rounds=max(1, self.trainer.max_epochs or 0))

    def effective(self) -> dict[str, Any]:
        """Also how the attack goes."""
        return {
            **super().effective(),
            "ensemble_sha256": self.fingerprints,
            "step_size": self.attack.effective_step_size,
            "objective": self.attack.objective,
            "step_rule": self.attack.rule,
            "parametrisation": self.parametrisation,
            # A step size that falls over the run makes another one of a run with more rounds.
            **({"rounds": self.trainer.max_epochs} if self.attack.rule.schedule != "constant" else {}),
        }

    def _remembered(self, memory: list[Tensor]) -> Tensor:
        """What of the step rule's memory the next round needs, for each base model."""
        return torch.stack(memory) if self.attack.rule.lasting else self.perturbation.new_zeros(len(memory), 0)

    def _average(self, gradient: Tensor) -> Tensor:
        """Over ranks, in place; ``Strategy.reduce`` would have the host wait at a barrier first, six times a round."""
        if self.trainer.world_size > 1:
            dist.all_reduce(gradient)
            gradient /= self.trainer.world_size
        return gradient

    def _log(self, outcome: Outcome, change: Tensor) -> None:
        # One message for all of them. Lightning's sync_dist takes four for each, and a bar that only the first rank has
        # sends some of them by itself.
        signs = self._average(outcome.vital_signs)
        require_vital(signs.tolist(), self.turn)  # the round's one copy from the device
        names = ("surrogate/clean_loss", "pgd/objective", "surrogate/cloaked_loss", "pgd/gradient", "pgd/latents")
        values = {
            **dict(zip(names, signs, strict=False)),
            "perturbation/largest": change.abs().max() / STEP,
            "perturbation/mean": change.abs().mean() / STEP,
        }
        # A metric named "step" is Lightning's x-axis; its own counts optimizer steps, six a round.
        values["step"] = torch.tensor(float(self.current_epoch + 1))
        self.log_dict(values, batch_size=1)
