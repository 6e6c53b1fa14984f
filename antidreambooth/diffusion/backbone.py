"""What every base model can do: encode, embed, add noise, predict, decode; and the formulas that tie these together."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.family import Family
from antidreambooth.diffusion.noising import Noising
from antidreambooth.diffusion.precision import borrowing, made_on_cpu, precise
from antidreambooth.diffusion.recording import uncounted

Checkpointing = bool | Literal["vae"]  # of which activations are computed again in the backward pass


class Posterior(NamedTuple):
    """Latents of images before sampling: a diagonal Gaussian, in the units that the denoiser sees."""

    mean: Float[Tensor, "n c h w"]
    std: Float[Tensor, "n c h w"]

    def sample(self, noise: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """One draw; ``noise`` is standard normal."""
        return self.mean + self.std * noise

    def rows(self, index: Tensor | slice) -> Posterior:
        """The posterior of some of the images."""
        return Posterior(self.mean[index], self.std[index])


class Conditioning(tuple[Tensor, ...]):
    """What the denoiser is told about prompts: a row of each part belongs to a prompt.

    Only a base model's family knows what the parts are; everybody else passes them on.
    """

    def repeated(self, count: int) -> Conditioning:
        """Each row ``count`` times, one after the other."""
        return Conditioning(part.repeat_interleave(count, dim=0) for part in self)

    def expanded(self, count: int) -> Conditioning:
        """Of one prompt, for ``count`` images."""
        return Conditioning(part.expand(count, *part.shape[1:]) for part in self)


class Backbone(nn.Module, Family):
    """A latent diffusion model (arXiv:2112.10752): what every family of base models can do, and what they share.

    The components are attributes under the names that the family's official pipeline has for them. What learns is held
    in fp32; run the methods under ``torch.autocast`` for speed. Losses are reduced in fp32.

    Args:
        defaults: what this model wants where the user says nothing; the family's when not given.
        parts: the components.
    """

    scheduler: Any  # these and some of the others each family has
    vae: Any
    unet: Any
    transformer: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(self, *, defaults: Defaults | None = None, **parts: Any) -> None:
        super().__init__()
        for name, part in {**self.switches, **parts}.items():
            setattr(self, name, part)
        self.defaults = defaults or self.published
        self.reschedule(self.scheduler)
        self.decoder_rests, self.encodes_twice = False, False
        self.text_rests, self.text_present = False, True  # see rest_text_encoders
        self.remembered: dict[Hashable, Conditioning] = {}  # what the text encoders have said, once they rest
        self.requires_grad_(False)
        self.eval()

    # What a family does in its own way.

    @abstractmethod
    def encode_text(self, prompts: list[str]) -> Conditioning:
        """Prompts through tokenizers and text encoders."""

    @abstractmethod
    def denoise(
        self,
        noisy: Float[Tensor, "n c h w"],
        times: Shaped[Tensor, " n"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "n c h w"]:
        """What the denoiser says, in the sense of ``Noising.target``.

        Args:
            noisy: z_t.
            times: of ``Noising.times``, in the scheduler's unit: about 0 (clean) to 1000 (noise).
            conditioning: a row for each image.
        """

    def law(self, config: Mapping[str, Any]) -> Noising:
        """The noise law, from the scheduler's config."""
        return Noising.flow(config)

    def negative(self, count: int) -> Conditioning:
        """What classifier-free guidance leads away from."""
        return self.embed([""] * count)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def downscale(self) -> int:
        """Pixels of an image per latent, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def to_latents(self, images: Float[Tensor, "n 3 h w"]) -> Posterior:
        """What the autoencoder's encoder makes of images."""
        latent, scale, shift = self.vae.encode(images).latent_dist, self.vae.config.scaling_factor, self._shift()
        return Posterior((precise(latent.mean) - shift) * scale, precise(latent.std) * scale)

    def from_latents(self, latents: Float[Tensor, "n c h w"]) -> Tensor:
        """What the autoencoder's decoder makes of latents."""
        pictures: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor + self._shift()).sample
        return pictures

    def sampler(self) -> Any:
        """A fresh scheduler to draw pictures with."""
        return type(self.scheduler).from_config(self.scheduler.config)

    def kept_scheduler(self) -> Any:
        """What is saved with the model: the one that it came with."""
        return self.scheduler

    def pack(self, latents: Float[Tensor, "n c h w"]) -> Tensor:
        """Latents in the form that the pipeline takes."""
        return latents

    def unpack(self, packed: Tensor, like: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Latents out of the form that the pipeline gives."""
        return packed

    def given(self, conditioning: Conditioning, prefix: str = "") -> dict[str, Any]:
        """Conditioning as arguments of the pipeline."""
        return {prefix + name: part for name, part in zip(self.arguments, conditioning, strict=True)}

    # What all share.

    def reschedule(self, scheduler: Any) -> None:
        """Takes a scheduler, and with it the noise law."""
        self.scheduler = scheduler
        with made_on_cpu():
            self.noising = self.law(dict(scheduler.config))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.noising.signal.device

    @property
    def lora_layers(self) -> list[str]:
        """Names of the denoiser's layers that the usual LoRA changes."""
        return [*self.lora_targets]

    @property
    def distilled(self) -> bool:
        """Whether it draws in a few steps, which fine-tuning takes from it: its base model is the better surrogate."""
        return False

    @property
    def advice(self) -> str:
        """A line for whoever is about to fit it; empty where there is nothing to say."""
        if self.denoiser is None or not self.distilled:
            return ""
        return (
            f"this {self.family} model is distilled: it draws in a few steps, which fine-tuning takes from it, so that "
            "the base model that it was made of is the better surrogate, and the better victim"
        )

    @property
    def denoiser(self) -> Any:
        """The network that predicts: a U-Net or a transformer; None where the autoencoder alone was loaded."""
        return getattr(self, self.denoiser_name(), None)

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders by name, as far as they were loaded."""
        names = [name for name in self.networks if name.startswith("text_encoder") and hasattr(self, name)]
        return {name: getattr(self, name) for name in names}

    @property
    def attacked(self) -> dict[str, nn.Module]:
        """The networks that an attack's gradient goes through, as far as they were loaded."""
        return {**({"denoiser": self.denoiser} if self.denoiser is not None else {}), "encoder": self.vae.encoder}

    @property
    def pixels_said(self) -> int:
        """Pixels per latent that the pipeline is told of; it draws what the latents' shape asks for."""
        return self.downscale

    def guides(self, scale: float) -> bool:
        """Whether a scale of classifier-free guidance asks for predictions without the prompt, too."""
        return scale > self.guidance[1]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Of an image of so many pixels: channels, height, width."""
        return self.latent_channels, height // self.downscale, width // self.downscale

    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Posterior:
        """Images in [-1, 1] to the posterior of their latents."""
        if not (self.encodes_twice and images.requires_grad):
            return self.to_latents(images)
        return checkpoint(
            self.to_latents,
            images,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), uncounted(self.vae.encoder)),
        )

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Latents to images in [-1, 1]."""
        with borrowing(self.vae.decoder, latents.device) if self.decoder_rests else nullcontext():
            return self.from_latents(latents).float().clamp(-1, 1)

    def embed(self, prompts: list[str]) -> Conditioning:
        """Prompts to what the denoiser is told about them."""
        return self.told(tuple(prompts), lambda: self.encode_text(prompts))

    def told(self, asked: Hashable, encode: Callable[[], Conditioning]) -> Conditioning:
        """What the text encoders say; once they rest what they have said before or, asked anew, say now.

        Args:
            asked: tells what is the same.
            encode: asks them.
        """
        if not self.text_rests:
            return encode()
        if asked not in self.remembered:
            # What a test asks for may be trained on later.
            with self._text_encoders_present(), torch.inference_mode(False), torch.no_grad():
                self.remembered[asked] = encode()
        return self.remembered[asked]

    def predict(
        self, noisy: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"], conditioning: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """u(z_t, t, c) in fp32, in the sense of ``Noising.target``."""
        return precise(self.denoise(noisy, self.noising.times[timesteps], conditioning))

    def checkpoint(self, which: Checkpointing) -> None:
        """Recomputes activations in the backward pass: less memory for about a third more time.

        Args:
            which: of none (False), of denoiser and autoencoder (True), or of the autoencoder alone (``vae``). Text
                encoders' are small.
        """
        if which:
            # Some autoencoders refuse: of these the whole encoder is run again.
            self.encodes_twice = not getattr(self.vae, "_supports_gradient_checkpointing", False)
            if not self.encodes_twice:
                self.vae.enable_gradient_checkpointing()
        if which is True and self.denoiser is not None:
            self.denoiser.enable_gradient_checkpointing()

    def rest_decoder(self) -> None:
        """Keeps the decoder in main memory from now on; ``decode`` has it on the device while it is at work."""
        self.decoder_rests = True
        self.vae.decoder.to("cpu")

    def rest_text_encoders(self, device: torch.device, prompts: Iterable[Sequence[str]]) -> None:
        """Keeps the text encoders in main memory from now on, where ``to`` does not find them.

        They are on the device while it embeds these prompts, and whenever another one is asked for. Call it before the
        other networks are moved there: large text encoders need the room. They must not learn.

        Args:
            device: where the model will be.
            prompts: lists of prompts as they will be asked for; also what guidance leads away from, for as many.
        """
        self.noising.to(device)
        for name, encoder in self.text_encoders.items():
            del self._modules[name]
            self.__dict__[name] = encoder.to("cpu")  # an attribute still, but no submodule any more
        self.text_rests, self.text_present = True, False
        with self._text_encoders_present():
            for asked in prompts:
                self.embed(list(asked))
                if self.guides(self.defaults.guidance_scale):
                    self.negative(len(asked))

    @contextmanager
    def _text_encoders_present(self) -> Iterator[None]:
        if self.text_present:
            yield
            return
        with ExitStack() as present:
            for encoder in self.text_encoders.values():
                present.enter_context(borrowing(encoder, self.device))
            self.text_present = True
            try:
                yield
            finally:
                self.text_present = False

    def pipeline(self, scheduler: Any = None, texts: bool = True) -> Any:
        """The family's official pipeline around these very modules, without a progress bar.

        Args:
            scheduler: of the pipeline; the sampler when not given.
            texts: whether with tokenizers and text encoders.
        """
        if scheduler is None:
            with made_on_cpu():
                scheduler = self.sampler()
        parts = {name: getattr(self, name) for name in (*self.networks, *self.tokenizers, *self.switches)}
        if not texts:
            parts |= dict.fromkeys([*self.text_encoders, *self.tokenizers])
        pipeline = self.official(**parts, scheduler=scheduler, **self.left_out)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(
        self,
        noise: Float[Tensor, "n c h w"],
        told: Conditioning,
        against: Conditioning | None,
        steps: int,
        guidance_scale: float,
    ) -> Float[Tensor, "n c h w"]:
        """Latents of pictures, by the official pipeline from given noise.

        Args:
            noise: standard normal.
            told: what the pictures should show, a row for each.
            against: what guidance leads away from; None without guidance.
            steps: of the sampler.
            guidance_scale: classifier-free guidance, in the family's own scale.
        """
        height, width = (side * self.pixels_said for side in noise.shape[-2:])
        latents = self.pipeline(texts=False)(
            **self.given(told),
            **(self.given(against, "negative_") if against else {}),
            **{self.guidance[0]: guidance_scale},
            **self.options,
            latents=self.pack(noise),
            height=height,
            width=width,
            num_inference_steps=steps,
            output_type="latent",
        ).images
        return self.unpack(latents, noise)

    @torch.no_grad()
    def encode_all(self, images: Float[Tensor, "n 3 h w"], micro_batch: int) -> Posterior:
        """As ``encode``, without gradients and with at most ``micro_batch`` images at a time."""
        parts = [self.encode(part) for part in torch.split(images, micro_batch)]
        return Posterior(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Images in [-1, 1] through the autoencoder and back: the most of them that this model could ever draw."""
        return self.decode(self.encode(images).mean)

    def denoising_loss(
        self,
        latents: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        noise: Float[Tensor, "n c h w"],
        conditioning: Conditioning,
    ) -> Float[Tensor, " n"]:
        """L(x; w, c) = weight_t || u(z_t, t, c) - target ||^2, the mean over each image's latent, in fp32."""
        noisy = self.noising.add_noise(latents, timesteps, noise)
        return self.distance(self.predict(noisy, timesteps, conditioning), latents, timesteps, noise)

    def distance(
        self,
        prediction: Float[Tensor, "n c h w"],
        latents: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        noise: Float[Tensor, "n c h w"],
    ) -> Float[Tensor, " n"]:
        """The loss of a prediction that is there already."""
        target = self.noising.target(latents, timesteps, noise)
        return self.noising.weight[timesteps] * squared_distance(prediction, target)

    def _shift(self) -> float:
        """What the newer autoencoders take from a latent before they scale it."""
        return float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    def learned(self) -> list[nn.Parameter]:
        """The weights that learn; none of an untouched model's do."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def fingerprint(self) -> str:
        """SHA-256 over all weights and the noise schedule: which model this is, whatever its folder is called."""
        resting = self.text_encoders if self.text_rests else {}
        texts = {f"{name}.{key}": value for name, part in resting.items() for key, value in part.state_dict().items()}
        return sha256({**self.state_dict(), **texts, **self.noising.identity})

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
