"""What every run on a base model shares: loading it, the seed, the settings that its checkpoints belong to."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from lightning import LightningModule
from torch import Tensor
from tqdm import tqdm

from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.diffusion.class_images import class_images
from antidreambooth.diffusion.layout import resolution_of
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import has_own_memory
from antidreambooth.diffusion.reuse import remembered
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError, require
from antidreambooth.finetuning.dreambooth import PriorPreservation
from antidreambooth.photos.decoding import to_float
from antidreambooth.provenance import describe, differences, without
from lightning_modules.running.preemption import Preemption
from lightning_modules.running.sharding import shard, sharded, whole_at_birth
from lightning_modules.running.strategies import check, replicates

log = logging.getLogger("antidreambooth")
PRECISIONS = ("32-true", "bf16-mixed")
FORMAT = 3  # of checkpoints: raised whenever older ones cannot be resumed any more
FREE = (  # settings that a resumed run may change
    *("micro_batch", "gradient_checkpointing", "offload", "execution"),  # the result differs by rounding at most
    *("generation", "faces", "stability"),  # of a test, which a fit does not depend on
)


class BackboneModule(LightningModule):
    """A run that trains or uses a base model; what learns has fp32 weights.

    Args:
        source: the base model.
        resolution: side of the pictures in pixels; what the backbone was made for when not given.
        frozen_weights: how weights are held that do not learn: fp32, bf16 or nf4; see ``Source``.
    """

    backbone: Backbone
    hparams: Any  # the constructor's arguments by name; Lightning declares a mapping without attributes
    buffers_kept: tuple[str, ...] = ()  # in checkpoints, beside what is trained

    def __init__(self, *, source: Source, resolution: int | None) -> None:
        super().__init__()
        require("resolution", resolution, 1, unit="in pixels")
        self.strict_loading = False  # frozen weights are not in checkpoints; on_load_checkpoint checks the rest
        self.source = source
        self.resolution = resolution_of(self.source, resolution)
        self.preemption = Preemption()
        self.draw: Callable[..., UInt8[Tensor, "n 3 h w"]] = class_images  # a dry run draws less

    def setup(self, stage: str) -> None:
        """Refuses half-true precision, and a run without a step, before any weight is loaded."""
        check(self.trainer.strategy)
        if self.trainer.precision not in PRECISIONS:
            raise InputError(
                f"{type(self).__name__} keeps fp32 weights: use --trainer.precision {' or '.join(PRECISIONS)}, "
                f"got {self.trainer.precision}"
            )
        low = [source.frozen_weights for source in self.sources if source.frozen_weights != "fp32"]
        if low and self.trainer.precision != "bf16-mixed":
            raise InputError(
                f"frozen_weights {low[0]} needs --trainer.precision bf16-mixed, got {self.trainer.precision}: use it, "
                "or leave out --model.frozen_weights"
            )
        fitting = stage == "fit"
        batches = self.trainer.limit_train_batches if fitting else self.trainer.limit_test_batches
        if batches == 0 or (fitting and self.trainer.max_steps == 0):
            raise InputError("--trainer.max_steps 0, limit_train_batches 0 or limit_test_batches 0 leave nothing to do")

    def configure_model(self) -> None:
        """Builds what is trained or attacked, and splits it over the ranks where the strategy does that."""
        if hasattr(self, "backbone"):
            return
        with whole_at_birth(self.trainer.strategy):
            self.build()
        for backbone in self.backbones:
            shard(self.trainer.strategy, backbone)

    def build(self) -> None:
        """Loads the backbone onto the device that will run it."""
        self.backbone, self.fingerprint = self.load(0)

    def on_train_start(self) -> None:
        """Ready to be told to go."""
        self.preemption.arm()

    def teardown(self, stage: str) -> None:
        """Not ready any more; after an error Lightning itself puts the handlers back."""
        self.preemption.disarm()

    @property
    def encoder_only(self) -> bool:
        """Whether nothing is loaded but the autoencoder."""
        return False

    @property
    def sources(self) -> list[Source]:
        """The base models that are loaded; one, here."""
        return [self.source]

    @property
    def backbones(self) -> list[Backbone]:
        """The base models, as loaded."""
        return [self.backbone]

    def asks(self, backbone: Backbone, number: int) -> list[list[str]] | None:
        """The lists of prompts that a run will ask text encoders for; None where one learns, or nobody knows.

        Args:
            backbone: the base model, as loaded.
            number: which of ``sources`` it is.
        """
        return None

    def load(self, number: int) -> tuple[Backbone, str]:
        """A base model, on the device, and its fingerprint; both are made once for several runs of a process.

        Text encoders of which all is known that they will be asked for rest in main memory.
        """
        source = self.sources[number]

        def loaded() -> tuple[Backbone, str]:
            backbone = load_backbone(source, self.encoder_only)
            return backbone, backbone.fingerprint()

        alone = Path(source.name).is_relative_to(self.trainer.default_root_dir)  # trained for this run
        backbone, fingerprint = loaded() if alone else remembered(lambda: (source, self.encoder_only), loaded)
        if backbone.advice and not alone and not self.trainer.testing and self.global_rank == 0:
            log.warning("%s: %s", source, backbone.advice)
        asked = self.asks(backbone, number)
        if asked and has_own_memory(self.place) and replicates(self.trainer.strategy):
            shown = [prompts for one in getattr(self.trainer, "callbacks", ()) for prompts in _asks(one, self)]
            with self.trainer.precision_plugin.forward_context():
                backbone.rest_text_encoders(self.place, [*asked, *shown])
        return backbone.to(self.place), fingerprint

    @property
    def place(self) -> torch.device:
        """The device of this process; Lightning moves the module there only after ``configure_model``."""
        return self.trainer.strategy.root_device

    def require_vital(self) -> None:
        """Ends a run that does not work before something is drawn of it; a cloaking round does so by itself."""

    def prompt(self, text: str) -> str:
        """A prompt as the model in training knows it."""
        return text

    def memory_savers(self) -> list[str]:
        """What on the command line makes a run need less memory on a GPU, and is not used yet."""
        return []

    @property
    def together(self) -> bool:
        """Whether every rank has to take part in every forward pass, since none has all weights."""
        return sharded(self.trainer.strategy)

    @property
    def seed(self) -> int:
        """The run's seed, where ``seed_everything`` leaves it."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def turn_of(self, number: int) -> Turn:
        """This rank's source of randomness for a round or a step."""
        return Turn(number, self.seed, self.global_rank, self.trainer.world_size)

    def effective(self) -> dict[str, Any]:
        """Settings whose values are found out at run time."""
        return {"resolution": self.resolution, "backbone_sha256": self.fingerprint}

    def record(self) -> dict[str, Any]:
        """What determines the result, as plain values: for the manifest, and to refuse to go on with other settings."""
        model = {"class": type(self).__name__, **describe({**self.hparams, **self.effective()})}
        settings = {"model": model, "precision": self.trainer.precision}
        data = getattr(self.trainer, "datamodule", None)
        return {"seed": self.seed, "settings": settings, **(data.record() if data is not None else {})}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was trained, and the settings that it belongs to."""
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad} | {*self.buffers_kept}
        checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name in kept}
        checkpoint.pop(self.CHECKPOINT_HYPER_PARAMS_KEY, None)
        checkpoint["format"] = FORMAT
        checkpoint["record"] = self.record()
        checkpoint["threads"] = torch.get_num_threads()  # see begin_fit

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another version of this project, or of other settings."""
        if checkpoint.get("format") != FORMAT:
            raise InputError(
                f"the checkpoint has format {checkpoint.get('format', 1)}, this version resumes format {FORMAT}: "
                "resume it with the version that wrote it, or start anew without --ckpt_path"
            )
        changed = differences(without(checkpoint.get("record", {}), FREE), without(self.record(), FREE))
        if changed:
            raise InputError(
                "the checkpoint was made with other settings: "
                + "; ".join(changed)
                + ". Go on with the same ones, or start anew without --ckpt_path"
            )

    def class_posterior(
        self, backbone: Backbone, fingerprint: str, prior: PriorPreservation, micro_batch: int
    ) -> Posterior | None:
        """Latents of the class images, for prior preservation; call it while the backbone is untouched."""
        if not prior.weight:
            return None
        prompt, count = prior.class_prompt, prior.images
        assert prompt is not None

        def encoded() -> Posterior:
            bar = self._progress("class images")
            with self.trainer.precision_plugin.forward_context():
                pictures = self.draw(
                    backbone, prompt, count, self.resolution, batch=micro_batch, progress=bar, fingerprint=fingerprint
                )
            return backbone.encode_all(to_float(pictures).to(self.place), micro_batch)

        how = (prompt, count, self.resolution, micro_batch, str(self.trainer.precision), self.place)
        return remembered(lambda: (fingerprint, *how), encoded)

    def _progress(self, what: str) -> Any:
        def bar(batches: Iterable[int]) -> Iterable[int]:
            return tqdm(batches, desc=what, disable=self.global_rank > 0 or not batches)

        return bar


def _asks(callback: Any, module: BackboneModule) -> list[list[str]]:
    """What a callback will draw."""
    return callback.asks(module) if hasattr(callback, "asks") else []
