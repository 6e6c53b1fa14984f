"""Another base model: a U-Net and a text encoder from scratch, around a given model's autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextModel

from antidreambooth.diffusion.backbone import Posterior
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.families.stable_diffusion import StableDiffusion, flows
from antidreambooth.diffusion.precision import made_on_cpu
from antidreambooth.diffusion.source import Source
from antidreambooth.errors import InputError, require
from antidreambooth.files import write_atomically
from antidreambooth.finetuning.full import Full
from antidreambooth.photos.captioned import Pictures
from antidreambooth.photos.decoding import to_float
from lightning_modules.running.strategies import replicates
from lightning_modules.training import Training

ENCODED = 64  # pictures at a time
FLOW = {  # of a scheduler; of these the last is what the pipeline expects and makes no difference
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 1.0,
    "steps_offset": 1,
}
GAMMA = 5.0  # of min-SNR weighting, as its paper recommends


class Pretraining(Training):
    """Trains a sibling of a base model: same autoencoder, tokenizer and noise schedule, other widths, other seed.

    The loss is the denoising loss with min-SNR weights (arXiv:2303.09556, equation 8); what is saved are weights
    averaged over the steps. Latents are computed once and kept as ``latents.safetensors`` in the run's folder.

    Args:
        backbone: the model that is taken apart: ``embedded``, a folder in diffusers layout, a hub id, or one
            file (``components``).
        revision: branch, tag or commit of a hub id.
        variant: variant of the weights' files, such as ``fp16``; computed in fp32 all the same.
        components: where backbone is one ``.safetensors`` file, a folder in diffusers layout of the same kind of model:
            its config files, tokenizers and scheduler are used, and its weights of networks that the file lacks.
        resolution: side of the pictures in pixels; what the backbone was made for when not given.
        widths: of the U-Net's levels; the backbone's own when not given.
        flow: whether it learns to flow from noise to pictures (rectified flow, arXiv:2209.03003), and not what the
            backbone predicts.
        anew: whether the U-Net and the text encoder start from random weights, and not from the backbone's.
        learning_rate: of AdamW; a cosine takes it to 0.
        warmup_steps: in which it rises.
        steps: optimizer steps.
        batch_size: pictures in a step.
        generic: share of captions that are replaced by the backbone's class prompt.
        empty: share of captions that are left out, for guidance.
        averaging: how much of the averaged weights stays in each step.
    """

    rate, length = "--model.learning_rate", "--model.steps"

    def __init__(
        self,
        *,
        backbone: str = "embedded",
        revision: str | None = None,
        variant: str | None = None,
        components: str | None = None,
        resolution: int | None = None,
        widths: list[int] | None = None,
        flow: bool = False,
        anew: bool = True,
        learning_rate: float = 6e-4,
        warmup_steps: int = 200,
        steps: int = 6000,
        batch_size: int = 64,
        generic: float = 0.35,
        empty: float = 0.1,
        averaging: float = 0.9992,
    ) -> None:
        for width in widths or []:
            require("widths", width, 1)
        if widths and not anew:
            raise InputError("--model.widths are of new weights: leave out --model.anew false")
        require("learning_rate", learning_rate, above=0)
        require("warmup_steps", warmup_steps, 0)
        require("steps", steps, 1)
        require("batch_size", batch_size, 1)
        require("generic", generic, 0, 1)
        require("empty", empty, 0, 1 - generic)
        require("averaging", averaging, 0, below=1)
        super().__init__(source=Source(backbone, revision, variant, components=components), resolution=resolution)
        self.save_hyperparameters(logger=False)
        self.adaptation, self.steps = Full(), steps
        self.latents: Posterior | None = None

    def setup(self, stage: str) -> None:
        """Refuses what would split the averaged weights."""
        super().setup(stage)
        if not replicates(self.trainer.strategy):
            raise InputError("a base model is trained on one device or with --trainer.strategy ddp")

    def build(self) -> None:
        """Loads the backbone and gives it a noise law, a U-Net and a text encoder of its own."""
        super().build()
        if not isinstance(self.backbone, StableDiffusion):
            raise InputError(f"only siblings of {StableDiffusion.family} are trained here: --model.backbone embedded")
        if self.hparams.flow:
            steps = len(self.backbone.noising)
            self.backbone.reschedule(DPMSolverMultistepScheduler(num_train_timesteps=steps, **FLOW))
        if self.hparams.anew:
            self._renew()
        self.backbone.to(self.place)
        self.adaptation.prepare(self.backbone, train_text_encoder=True)
        parts = nn.ModuleList([self.backbone.unet, self.backbone.text_encoder])
        self.averaged = AveragedModel(parts, multi_avg_fn=get_ema_multi_avg_fn(self.hparams.averaging))
        self.averaged.requires_grad_(False)
        self.note_untouched()
        self.buffers_kept = tuple(f"averaged.{name}" for name in self.averaged.state_dict())

    def _renew(self) -> None:
        """Random weights."""
        config = dict(self.backbone.unet.config)
        if self.hparams.widths is not None:
            config["block_out_channels"] = tuple(self.hparams.widths)
        with torch.random.fork_rng(devices=[]), made_on_cpu():
            torch.manual_seed(self.seed)
            try:
                self.backbone.unet = UNet2DConditionModel.from_config(config)
            except ValueError as error:
                raise InputError(f"--model.widths {self.hparams.widths} make no U-Net: {error}") from error
            self.backbone.text_encoder = CLIPTextModel(self.backbone.text_encoder.config)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a cosine."""
        chosen = self.hparams
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = AdamW(trained, lr=chosen.learning_rate, betas=(0.9, 0.99))  # Lightning clips no fused one
        schedule = get_scheduler(
            "cosine", optimizer, num_warmup_steps=chosen.warmup_steps, num_training_steps=chosen.steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Trained parts in training mode; latents computed, or read."""
        super().on_train_start()
        self.backbone.unet.train()
        self.backbone.text_encoder.train()
        self.latents = self._encoded(self.trainer.datamodule.pictures)  # type: ignore[attr-defined]

    def training_step(self, batch: Pictures, batch_idx: int) -> Tensor:
        """The weighted loss of some pictures; which, under what caption, follows from seed, rank and step."""
        assert self.latents is not None
        generator, chosen = self.turn_of(batch_idx).generator(self.device), self.hparams
        size = (chosen.batch_size,)
        rows = torch.randint(len(batch), size, generator=generator, device=self.device).cpu()
        part = Posterior(*(values.to(self.device).float() for values in self.latents.rows(rows)))
        kept = torch.rand(size, generator=generator, device=self.device).tolist()
        usual, captions = self.backbone.defaults.class_prompt, [batch.captions[row] for row in rows.tolist()]
        asked = [
            "" if share < chosen.empty else usual if share < chosen.empty + chosen.generic else caption
            for share, caption in zip(kept, captions, strict=True)
        ]
        draw = Draw.sample(self.backbone, part.mean.shape, generator)
        latents = part.sample(draw.posterior_noise)
        losses = self.backbone.denoising_loss(latents, draw.timesteps, draw.noise, self.backbone.embed(asked))
        loss = (self._weights(draw.timesteps) * losses).mean()
        self.watch(loss, batch_idx)
        self.log("pretraining/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The average goes on, before anybody writes a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        self.averaged.update_parameters(nn.ModuleList([self.backbone.unet, self.backbone.text_encoder]))

    def weight_norm(self) -> Tensor:
        """Of the averaged weights, too."""
        return super().weight_norm() + get_total_norm(list(self.averaged.parameters()))

    def memory_savers(self) -> list[str]:
        """Fewer pictures in a step."""
        return ["a smaller --model.batch_size"] if self.hparams.batch_size > 1 else []

    def on_train_end(self) -> None:
        """The averaged weights are the result."""
        super().on_train_end()
        unet, text_encoder = cast(nn.ModuleList, self.averaged.module)
        self.backbone.unet.load_state_dict(unet.state_dict())
        self.backbone.text_encoder.load_state_dict(text_encoder.state_dict())
        self.backbone.eval()

    def _weights(self, timesteps: Tensor) -> Tensor:
        """min(SNR, gamma) / SNR, for a model that predicts noise; / (SNR + 1) for one that predicts v; 1 for a flow."""
        noising = self.backbone.noising
        if self.hparams.flow or flows(self.backbone.scheduler.config):
            return noising.weight[timesteps]
        snr = (noising.signal[timesteps] / noising.spread[timesteps]).square()
        return snr.clamp(max=GAMMA) / (snr if self.backbone.scheduler.config.prediction_type == "epsilon" else snr + 1)

    def _encoded(self, pictures: Pictures) -> Posterior:
        """Latents of all pictures, in half precision and main memory."""
        file = Path(self.trainer.default_root_dir) / "latents.safetensors"
        made_of = {"backbone": self.fingerprint, "pictures": pictures.sha256}
        if file.is_file():
            with safe_open(file, "pt") as kept:
                if kept.metadata() == made_of:
                    return Posterior(kept.get_tensor("mean"), kept.get_tensor("std"))
        starts = tqdm(range(0, len(pictures), ENCODED), desc="latents", disable=self.global_rank > 0)
        with self.trainer.precision_plugin.forward_context():
            parts = [
                self.backbone.encode_all(to_float(pictures.rows(start, start + ENCODED)).to(self.device), ENCODED)
                for start in starts
            ]
        mean, std = (torch.cat([part[i].half().cpu() for part in parts]).contiguous() for i in (0, 1))
        if self.global_rank == 0:
            write_atomically(file, save({"mean": mean, "std": std}, made_of))
        return Posterior(mean, std)
