"""What every base model can do: encode, embed, add noise, predict, decode; and the formulas that tie these together."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from antidreambooth.diffusion.defaults import Defaults

Checkpointing = bool | Literal["vae"]  # of which activations are computed again in the backward pass


class Posterior(NamedTuple):
    """Latents of images before sampling: a diagonal Gaussian, already multiplied by the VAE's scaling factor."""

    mean: Float[Tensor, "n c h w"]
    std: Float[Tensor, "n c h w"]

    def sample(self, noise: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """One draw; ``noise`` is standard normal."""
        return self.mean + self.std * noise

    def rows(self, index: Tensor | slice) -> Posterior:
        """The posterior of some of the images."""
        return Posterior(self.mean[index], self.std[index])


class Backbone(nn.Module, ABC):
    """A latent diffusion model (arXiv:2112.10752): what every family of base models can do, and formulas they share.

    Weights are fp32 masters; run the methods under ``torch.autocast`` for speed. Losses are reduced in fp32.

    Args:
        unet: noise predictor.
        vae: image autoencoder; never trained here.
        text_encoder: turns tokens into embeddings.
        tokenizer: turns prompts into tokens.
        scheduler: noise schedule; its ``prediction_type`` is ``epsilon`` or ``v_prediction``.
        defaults: what this model wants where the user says nothing.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        defaults: Defaults | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.defaults = defaults or Defaults()
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of a latent."""

    @property
    @abstractmethod
    def downscale(self) -> int:
        """Pixels of an image per latent, along one side."""

    @abstractmethod
    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Posterior:
        """Images in [-1, 1] to the posterior of their latents."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Latents to images in [-1, 1]."""

    @abstractmethod
    def embed(self, prompts: list[str]) -> Float[Tensor, "p length width"]:
        """Prompts to what the denoiser is conditioned on."""

    @abstractmethod
    def predict(
        self,
        noisy: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        embeddings: Float[Tensor, "n length width"],
    ) -> Float[Tensor, "n c h w"]:
        """u(z_t, t, c) in fp32: the noise or v, whichever the model predicts."""

    @abstractmethod
    def checkpoint(self, which: Checkpointing) -> None:
        """Recomputes activations in the backward pass: less memory for about a third more time.

        Args:
            which: of none (False), of denoiser and autoencoder (True), or of the autoencoder alone (``vae``).
        """

    @abstractmethod
    def rest_decoder(self) -> None:
        """Keeps the decoder in main memory from now on; ``decode`` has it on the device while it is at work."""

    @abstractmethod
    def pipeline(self) -> Any:
        """The family's official diffusers pipeline around these very modules, without a progress bar."""

    @property
    def timesteps(self) -> int:
        """T, the length of the noise schedule."""
        return len(self.alphas_cumprod)

    @torch.no_grad()
    def encode_all(self, images: Float[Tensor, "n 3 h w"], micro_batch: int) -> Posterior:
        """As ``encode``, without gradients and with at most ``micro_batch`` images at a time."""
        parts = [self.encode(part) for part in torch.split(images, micro_batch)]
        return Posterior(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Images in [-1, 1] through the autoencoder and back: the most of them that this model could ever draw."""
        return self.decode(self.encode(images).mean)

    def add_noise(
        self, latents: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"], noise: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) e (arXiv:2006.11239, equation 4)."""
        signal, spread = self._levels(timesteps)
        return signal * latents + spread * noise

    def target(
        self, latents: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"], noise: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        """What the U-Net should predict: e, or v = sqrt(abar_t) e - sqrt(1 - abar_t) z (arXiv:2202.00512)."""
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        signal, spread = self._levels(timesteps)
        return signal * noise - spread * latents

    def denoising_loss(
        self,
        latents: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        noise: Float[Tensor, "n c h w"],
        embeddings: Float[Tensor, "n length width"],
    ) -> Float[Tensor, " n"]:
        """L(x; w, c) = || u(z_t, t, c) - target ||^2, the mean over each image's latent, in fp32."""
        prediction = self.predict(self.add_noise(latents, timesteps, noise), timesteps, embeddings)
        return squared_distance(prediction, self.target(latents, timesteps, noise))

    def denoise_once(
        self,
        noisy: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        prediction: Float[Tensor, "n c h w"],
    ) -> Float[Tensor, "n c h w"]:
        """The mean of q(z_{t-1} | z_t, z_0) with the predicted z_0, for t >= 1 (arXiv:2006.11239, equations 7, 15)."""
        signal, spread = self._levels(timesteps)
        if self.scheduler.config.prediction_type == "epsilon":
            clean = (noisy - spread * prediction) / signal
        else:
            clean = signal * noisy - spread * prediction
        before, _ = self._levels(timesteps - 1)
        alpha = (signal / before).square()
        return (before * (1 - alpha) * clean + alpha.sqrt() * (1 - before.square()) * noisy) / spread.square()

    def _levels(self, timesteps: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def learned(self) -> list[nn.Parameter]:
        """The weights that learn; none of an untouched model's do."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def fingerprint(self) -> str:
        """SHA-256 over all weights and the noise schedule: which model this is, whatever its folder is called."""
        return sha256({**self.state_dict(), "alphas_cumprod": self.alphas_cumprod})

    def learned_fingerprint(self) -> str:
        """The same over the weights that learn: whether they have learned anything."""
        return sha256({name: weight for name, weight in self.named_parameters() if weight.requires_grad})


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, whatever the order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def precise(values: Tensor) -> Tensor:
    """In fp32, or better where they are: autocast computes in less."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def squared_distance(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """|| a - b ||^2 as a mean over each image's latent."""
    return (a - b).square().mean(dim=(1, 2, 3))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradient reaches the module's weights inside: PGD needs the pixels' only (a third of the backward pass)."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
