"""The noise law of a base model as one table: how noise is added, what is predicted, and the step back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn


class Noising(nn.Module):
    """A noise law as columns of T rows, the least noise first; diffusion and flow matching differ in the columns only.

    Row t mixes latents z and noise e to z_t = signal z + spread e. There the model is told ``times``, predicts
    toward_noise e + toward_clean z, and its loss counts ``weight``. One step back is z_{t-1} = keep z_t + pull z.

    Args:
        identity: what tells this law from others, for a fingerprint.
        columns: signal, spread, times, weight, toward_noise, toward_clean, keep and pull.
    """

    signal: Tensor
    spread: Tensor
    times: Tensor
    weight: Tensor

    def __init__(self, identity: Mapping[str, Tensor], **columns: Tensor) -> None:
        super().__init__()
        self.identity = dict(identity)
        for name, column in columns.items():
            self.register_buffer(name, column.clone(), persistent=False)

    @classmethod
    def diffusion(cls, config: Mapping[str, Any]) -> Noising:
        """DDPM (arXiv:2006.11239) with epsilon or v (arXiv:2202.00512); the step back is the posterior's mean.

        Args:
            config: of the scheduler.
        """
        abar = DDPMScheduler.from_config(dict(config)).alphas_cumprod
        signal, spread, one = abar.sqrt(), (1 - abar).sqrt(), torch.ones_like(abar)
        before = torch.cat([one[:1], abar[:-1]])
        fresh = 1 - abar / before  # beta_t
        epsilon = config.get("prediction_type", "epsilon") == "epsilon"
        return cls(
            {"alphas_cumprod": abar},
            signal=signal,
            spread=spread,
            times=torch.arange(len(abar)),
            weight=one,
            toward_noise=one if epsilon else signal,
            toward_clean=torch.zeros_like(one) if epsilon else -spread,
            keep=(1 - fresh).sqrt() * (1 - before) / (1 - abar),  # equation 7
            pull=before.sqrt() * fresh / (1 - abar),
        )

    @classmethod
    def flow(cls, config: Mapping[str, Any], power: int = 0) -> Noising:
        """Rectified flow (arXiv:2209.03003, arXiv:2403.03206): z_t = (1 - s) z + s e, target e - z, Euler's step back.

        The posterior's mean would forget z_t altogether at s = 1. A constant shift of s is in the table; one that
        depends on the picture's size is for sampling only, and training ignores it.

        Args:
            config: of the scheduler.
            power: the loss counts s^power.
        """
        if "flow_shift" in config:  # a DPM solver's name of the shift, which Euler's scheduler would ignore
            config = {"num_train_timesteps": config["num_train_timesteps"], "shift": config["flow_shift"]}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))  # a fresh one: sampling overwrites sigmas
        spread, times = scheduler.sigmas.flip(0), scheduler.timesteps.flip(0)
        one, before = torch.ones_like(spread), torch.cat([torch.zeros_like(spread[:1]), spread[:-1]])
        return cls(
            {"sigmas": spread},
            signal=1 - spread,
            spread=spread,
            times=times,
            weight=spread**power,
            toward_noise=one,
            toward_clean=-one,
            keep=before / spread,
            pull=1 - before / spread,
        )

    def __len__(self) -> int:
        """T, the number of rows."""
        return len(self.times)

    def add_noise(
        self, latents: Float[Tensor, "n c h w"], t: Int[Tensor, " n"], noise: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        """z_t = signal z + spread e (arXiv:2006.11239, equation 4; arXiv:2403.03206, equation 13)."""
        signal, spread = self._at(t, "signal", "spread")
        return signal * latents + spread * noise

    def target(
        self, latents: Float[Tensor, "n c h w"], t: Int[Tensor, " n"], noise: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        """What the model should predict: e; v = signal e - spread z (arXiv:2202.00512); or, of a flow, e - z."""
        toward_noise, toward_clean = self._at(t, "toward_noise", "toward_clean")
        return toward_noise * noise + toward_clean * latents

    def clean(
        self, noisy: Float[Tensor, "n c h w"], t: Int[Tensor, " n"], prediction: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        """Z out of z_t and a prediction, which are two linear equations in z and e."""
        signal, spread, toward_noise, toward_clean = self._at(t, "signal", "spread", "toward_noise", "toward_clean")
        return (toward_noise * noisy - spread * prediction) / (toward_noise * signal - spread * toward_clean)

    def noise(
        self, noisy: Float[Tensor, "n c h w"], t: Int[Tensor, " n"], prediction: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        """E out of the same two equations: a prediction converted to noise."""
        signal, spread, toward_noise, toward_clean = self._at(t, "signal", "spread", "toward_noise", "toward_clean")
        return (signal * prediction - toward_clean * noisy) / (toward_noise * signal - spread * toward_clean)

    def step_back(
        self, noisy: Float[Tensor, "n c h w"], t: Int[Tensor, " n"], prediction: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        """z_{t-1}: the mean of q(z_{t-1} | z_t, z) (arXiv:2006.11239, equation 7), or Euler's step of a flow."""
        keep, pull = self._at(t, "keep", "pull")
        return keep * noisy + pull * self.clean(noisy, t, prediction)

    def _at(self, t: Int[Tensor, " n"], *names: str) -> list[Tensor]:
        return [getattr(self, name)[t].view(-1, 1, 1, 1) for name in names]
