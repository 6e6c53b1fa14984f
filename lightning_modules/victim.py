"""The attacker: whoever fine-tunes a model on somebody's photos."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.optimization import get_scheduler
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from antidreambooth.diffusion.backbone import Backbone, Conditioning, Posterior
from antidreambooth.diffusion.class_images import BATCH
from antidreambooth.diffusion.layout import read_defaults
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import full_precision
from antidreambooth.diffusion.sampling import Generation, blank, noise_of, sample
from antidreambooth.diffusion.seeding import uniform
from antidreambooth.diffusion.source import Precision, Source
from antidreambooth.errors import InputError, require
from antidreambooth.evaluation.faces import Dlib, FaceModel, reference
from antidreambooth.evaluation.measures import face_measures
from antidreambooth.finetuning.adaptation import Adaptation
from antidreambooth.finetuning.augmentation import Augmentation
from antidreambooth.finetuning.dreambooth import DreamBooth, dreambooth_loss, prompts_asked, still_prompts
from antidreambooth.finetuning.full import Full
from antidreambooth.photos.decoding import to_float
from antidreambooth.photos.delivery import to_8bit
from antidreambooth.photos.readings import square_at
from lightning_modules.running.sharding import gathered, sharded
from lightning_modules.training import Training

MICRO_BATCH = 8  # photos encoded at a time
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass(frozen=True)
class Optimization:
    """What steps the weights beside the learning rate.

    Args:
        schedule: of the learning rate, by diffusers' names: constant, constant_with_warmup, linear, cosine,
            cosine_with_restarts or polynomial.
        warmup_steps: of the schedules that have a warm-up.
        eight_bit: AdamW with 8-bit moments (bitsandbytes, on a GPU): a quarter of their memory.
    """

    schedule: str = "constant"
    warmup_steps: int = 0
    eight_bit: bool = False

    def __post_init__(self) -> None:
        require("warmup_steps", self.warmup_steps, 0)
        if self.schedule not in SCHEDULES:
            raise InputError(f"optimization.schedule is one of {', '.join(SCHEDULES)}: got {self.schedule!r}")


class Victim(Training):
    """DreamBooth on published photos (arXiv:2208.12242; as in https://arxiv.org/abs/2303.15433, Section 5.1).

    ``fit`` trains, ``test`` generates pictures of the person and measures how much of the person is in them.

    Args:
        backbone: base model: ``embedded``, a folder in diffusers layout, a hub id, or one file (``components``).
        revision: branch, tag or commit of a hub id.
        variant: variant of the weights' files, such as ``fp16``; computed in fp32 all the same.
        components: where backbone is one ``.safetensors`` file, a folder in diffusers layout of the same kind of model:
            its config files, tokenizers and scheduler are used, and its weights of networks that the file lacks.
        frozen_weights: how weights of denoiser and text encoders are held that do not learn: ``bf16`` takes half the
            memory (for --trainer.precision bf16-mixed, which rounds to it anyway), ``nf4`` an eighth of the denoiser's
            (also on CUDA, with bitsandbytes, for a LoRA).
        resolution: side of the pictures in pixels; what the backbone was made for when not given.
        adaptation: what is trained: Full, CrossAttention, LoRA or TextualInversion (Untrained for a test of the base
            model).
        training: how.
        augmentation: what the attacker's pipeline does to photos.
        optimization: schedule and kind of the optimizer.
        generation: which pictures a test asks for.
        faces: detector and embedding of a test; Dlib when not given.
        stability: whether a test also measures the quality of faces, which makes it several times slower.
    """

    rate, length = "--model.training.learning_rate", "--model.training.steps"

    def __init__(
        self,
        *,
        backbone: str = "embedded",
        revision: str | None = None,
        variant: str | None = None,
        components: str | None = None,
        frozen_weights: Precision = "fp32",
        resolution: int | None = None,
        adaptation: Adaptation | None = None,
        training: DreamBooth = DreamBooth(),  # noqa: B008 (frozen)
        augmentation: Augmentation = Augmentation(),  # noqa: B008
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),  # noqa: B008
        faces: FaceModel | None = None,
        stability: bool = False,
    ) -> None:
        source = Source(backbone, revision, variant, components=components, frozen_weights=frozen_weights)
        super().__init__(source=source, resolution=resolution)
        self.adaptation = adaptation or Full()
        training = self.adaptation.usual(training).completed(read_defaults(self.source), self.adaptation.role)
        self.adaptation.require_learnable(self.source, training)
        prompt = self.adaptation.prompt(training.instance_prompt)
        self.training_settings = replace(training, instance_prompt=prompt)
        self.steps = self.training_settings.steps
        self.generation, self.augmentation, self.optimization = generation, augmentation, optimization
        self.faces = faces or Dlib()
        self.save_hyperparameters(logger=False)
        self.posterior: Posterior | None = None
        self.classes: Posterior | None = None
        self.prompts: Conditioning | None = None  # as the text encoder sees them, where it does not learn
        self.rows: list[dict[str, Any]] = []
        self.pictures: list[Tensor] = []

    def setup(self, stage: str) -> None:
        """Refuses a test in which each rank would wait for the others."""
        super().setup(stage)
        if stage == "test" and sharded(self.trainer.strategy):
            raise InputError("each rank of a test draws its own pictures: use --trainer.strategy ddp")

    def build(self) -> None:
        """Loads the backbone; makes it ready to train, or to be tested as it was trained."""
        super().build()
        training = self.training_settings
        if self.trainer.testing:
            self.adaptation.load(self.backbone, Path(self.trainer.default_root_dir) / self.adaptation.folder)
            return
        self.classes = self.class_posterior(self.backbone, self.fingerprint, training.prior, MICRO_BATCH)
        self.adaptation.apply(self.backbone, training, self.seed)
        self.note_untouched()

    def asks(self, backbone: Backbone, number: int) -> list[list[str]] | None:
        """What a fit trains on and draws before; a test draws with text encoders that it reads later."""
        if self.trainer.testing or self.adaptation.teaches_text(self.training_settings):
            return None
        return prompts_asked(self.training_settings, min(MICRO_BATCH, BATCH))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over what is trained, and a learning rate that follows the schedule step by step."""
        chosen, settings = self.optimization, self.training_settings
        optimizer = self._optimizer(self.backbone.learned())
        schedule = get_scheduler(
            chosen.schedule, optimizer, num_warmup_steps=chosen.warmup_steps, num_training_steps=settings.steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """The trained parts in training mode."""
        super().on_train_start()
        for part in (self.backbone.denoiser, *self.backbone.text_encoders.values()):
            part.train(any(p.requires_grad for p in part.parameters()))

    def training_step(self, batch: Tensor | list[Tensor], batch_idx: int) -> Tensor:
        """The DreamBooth loss of one batch of photos; ``batch`` holds all of them, in 8 bits, see ``_instances``."""
        settings, turn = self.training_settings, self.turn_of(batch_idx)
        assert settings.batch_size is not None  # completed in the constructor
        generator = turn.generator(self.device)
        (chosen,) = turn.batches(1, settings.batch_size, len(batch), self.device)
        classes = None
        if self.classes is not None:
            (others,) = turn.batches(1, settings.batch_size, len(self.classes.mean), self.device)
            classes = self.classes.rows(others)
        if self.prompts is None:  # the first time, or at every step where the text encoder learns
            self.prompts = still_prompts(self.backbone, settings, classes is not None)
        instances = self._instances(batch, chosen, generator)
        loss = dreambooth_loss(self.backbone, settings, instances, classes, generator, self.prompts)
        self.watch(loss, batch_idx)
        self.log("victim/loss", loss.detach(), prog_bar=True)
        return loss

    def whole(self) -> Backbone:
        """The backbone with all of its weights in one place; every rank has to ask."""
        if not sharded(self.trainer.strategy):
            return self.backbone
        weights = gathered(self.trainer.strategy, self.backbone)
        whole = load_backbone(self.source)
        self.adaptation.apply(whole, self.training_settings, self.seed)
        whole.load_state_dict(weights, strict=False)
        return whole

    def test_step(self, batch: list[tuple[str, Tensor]], batch_idx: int) -> None:
        """Generates this rank's share of the pictures and measures them against the reference photos."""
        with full_precision(self.device):
            known = reference(self.faces, [(name, self._as_drawn(photo)) for name, photo in batch])
        asked = self.generation
        measures = face_measures(self.faces, known, stability=self.hparams.stability).to(self.device)
        self._warn_of_strangers()
        mine = list(range(self.global_rank, asked.images, self.trainer.world_size))
        chunks = [
            (number, mine[start : start + asked.batch])
            for number in range(len(asked.prompts))
            for start in range(0, len(mine), asked.batch)
        ]
        for number, indices in tqdm(chunks, desc="pictures", unit="batch", disable=self.global_rank > 0):
            prompt = asked.prompts[number]
            noise = noise_of(self.backbone, self.resolution, indices, asked.seed)
            pictures = sample(
                self.backbone, self.prompt(prompt), noise, asked.guidance_scale, asked.sampling_steps
            ).cpu()
            columns = measures.forward_images(pictures)
            self.pictures += list(pictures)
            self.rows += [
                {"prompt": prompt, "index": index, "file": f"images/{number}-{index:03d}.png"}
                | {name: float(values[row]) for name, values in columns.items()}
                for row, index in enumerate(indices)
            ]
        self.log_dict({**measures.compute(), **self._blank()}, batch_size=1)

    def _blank(self) -> dict[str, Tensor]:
        """The share of pictures that show one colour and nothing else, where there are any: no face is no protection.

        Each row then says whether its picture is one of them.

        Raises:
            InputError: all of them, on all ranks, are.
        """
        mine = blank(torch.stack(self.pictures)) if self.pictures else torch.zeros(0, dtype=torch.bool)
        counts = torch.tensor([int(mine.sum()), len(mine)], device=self.device)
        if self.trainer.world_size > 1:
            dist.all_reduce(counts)
        found, drawn = counts.tolist()
        if found == drawn:
            raise InputError(
                f"all {drawn} pictures have one colour all over: this victim draws nothing, so nothing is measured, as "
                f"that would look like protection; train it again, with a lower {self.rate}"
            )
        if not found:
            return {}
        warnings.warn(
            f"{found} of {drawn} pictures have one colour all over: there the victim drew nothing, which is no "
            "protection, and counts as no face",
            stacklevel=2,
        )
        for row, one in zip(self.rows, mine.tolist(), strict=True):
            row["blank"] = float(one)
        return {"blank": counts[0] / counts[1]}

    def _as_drawn(self, photo: Tensor) -> Tensor:
        """A reference photo at the sharpness that the backbone can reach, where the backbone asks for that."""
        if not self.backbone.defaults.blurred_references:
            return photo
        seen = self.backbone.reconstruct(to_float(photo[None]))
        return to_8bit(seen, photo[None], budget=255.0)[0]

    def prompt(self, text: str) -> str:
        """A prompt as the adaptation writes it."""
        return self.adaptation.prompt(text)

    def memory_savers(self) -> list[str]:
        """Fewer pictures at a time in a test; checkpointing, one photo a step or a LoRA in a fit."""
        if self.trainer.testing:
            return ["--model.generation.batch 1"] if self.generation.batch > 1 else []
        settings = self.training_settings
        return [
            *([] if settings.gradient_checkpointing else ["--model.training.gradient_checkpointing true"]),
            *(["--model.training.batch_size 1"] if settings.batch_size != 1 else []),
            *(["--model.adaptation LoRA"] if isinstance(self.adaptation, Full) else []),
        ]

    def effective(self) -> dict[str, Any]:
        """Also what the backbone said where the user said nothing."""
        chosen = {"adaptation": self.adaptation, "training": self.training_settings, "faces": self.faces.name}
        return {**super().effective(), **chosen}

    def _instances(self, photos: Tensor | list[Tensor], chosen: Tensor, generator: torch.Generator) -> Posterior:
        """Latents of the chosen photos: computed once, unless each step changes the photos.

        Args:
            photos: n 3 s s; or a list of 3 h w, where each step cuts squares from them at random.
            chosen: which of them.
            generator: of the squares, and of what else each step changes.
        """
        if isinstance(photos, list):
            places = uniform(chosen.shape, generator).tolist()
            squares = [square_at(photos[one], place) for one, place in zip(chosen.tolist(), places, strict=True)]
            return self._encoded(self.augmentation(torch.stack(squares), generator))
        if self.augmentation.active:
            return self._encoded(self.augmentation(photos[chosen.to(photos.device)], generator))
        if self.posterior is None:
            self.posterior = self._encoded(photos)
        return self.posterior.rows(chosen)

    def _encoded(self, photos: Tensor) -> Posterior:
        return self.backbone.encode_all(to_float(photos), MICRO_BATCH)

    def _optimizer(self, parameters: list[torch.nn.Parameter]) -> Optimizer:
        settings = self.training_settings
        rate, decay = settings.learning_rate, settings.weight_decay
        assert rate is not None  # completed in the constructor
        assert decay is not None
        if not self.optimization.eight_bit:
            fused = not self.trainer.gradient_clip_val  # Lightning refuses to clip before a fused step
            return AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
        if self.device.type != "cuda":
            raise InputError("8-bit AdamW works on a GPU only: leave out --model.optimization.eight_bit")
        try:
            from bitsandbytes.optim import AdamW8bit
        except ModuleNotFoundError as error:
            raise InputError("8-bit AdamW needs bitsandbytes: pip install bitsandbytes") from error
        return AdamW8bit(parameters, lr=rate, weight_decay=decay)

    def _warn_of_strangers(self) -> None:
        """A prompt without the identifier asks for nobody in particular."""
        settings = self.hparams.training.completed(self.backbone.defaults, self.adaptation.role)
        words = {*re.findall(r"\w+", settings.instance_prompt)} - {*re.findall(r"\w+", settings.prior.class_prompt)}
        for prompt in self.generation.prompts:
            if words and not words & {*re.findall(r"\w+", prompt)}:
                warnings.warn(
                    f"the prompt {prompt!r} names nobody: the model was trained on {settings.instance_prompt!r} "
                    f"and knows the person as {' '.join(sorted(words))!r}",
                    stacklevel=2,
                )
