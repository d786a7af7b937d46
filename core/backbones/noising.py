"""The forward process of a base and what its denoiser is trained to predict.

q(x_t | x_0) is diffusers' `DDPMScheduler` over the base's own noise schedule; here stands what a trainer adds. A
flow-matching family brings a class of its own with `timesteps`, `add_noise`, `target` and `snr_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor


class Noising:
    """A noise schedule with `levels` discrete timesteps and a prediction type (epsilon, v_prediction or sample)."""

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        self.scheduler = DDPMScheduler.from_config(scheduler_config)
        self.levels: int = self.scheduler.config.num_train_timesteps
        self.prediction_type: str = self.scheduler.config.prediction_type
        self._posterior = _posterior(self.scheduler.betas.double())

    def timesteps(self, count: int, generator: torch.Generator, part: int = 0, of: int = 1) -> Tensor:
        """`count` timesteps (B,), uniform over part number `part` of the schedule cut into `of` equal parts."""
        low, high = part * self.levels // of, (part + 1) * self.levels // of
        return torch.randint(low, high, (count,), generator=generator)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A draw of q(x_t | x_0): latents (B, C, h, w) noised to timesteps (B,)."""
        return self.scheduler.add_noise(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should predict: noise, velocity (Salimans & Ho 2022, app. D) or x_0; (B, C, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, t)
        return latents

    def clean(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The estimate of x_0 (B, C, h, w) that a prediction means."""
        kept = self.scheduler.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        signal, noise = kept.sqrt(), (1 - kept).sqrt()
        if self.prediction_type == "epsilon":
            return (noisy - noise * prediction) / signal
        if self.prediction_type == "v_prediction":
            return signal * noisy - noise * prediction
        return prediction

    def variance_bound(self, latents: Tensor, noisy: Tensor, t: Tensor, prediction: Tensor, values: Tensor) -> Tensor:
        """The variational bound by which a learned variance is trained, in bits per place, (B, C, h, w).

        Nichol & Dhariwal 2021 (arXiv 2102.09672), eqs. 15 and 16, as DiT trains with it: `values` interpolate between
        the logarithms of the smallest and the largest variance, and no gradient goes into the mean.
        """
        smallest, largest = self._at(t, "smallest"), self._at(t, "largest")
        share = (values + 1) / 2
        log_variance = share * largest + (1 - share) * smallest
        mean = self._posterior_mean(self.clean(noisy, prediction.detach(), t), noisy, t)
        true_mean = self._posterior_mean(latents, noisy, t)
        ratio = (smallest - log_variance).exp() + (true_mean - mean).square() * (-log_variance).exp()
        divergence = (log_variance - smallest - 1 + ratio) / 2
        last = -_bin_log_likelihood(latents, mean, log_variance / 2)
        return torch.where(t.view(-1, 1, 1, 1) == 0, last, divergence) / math.log(2)

    def _at(self, t: Tensor, name: str) -> Tensor:
        """A row of the posterior's table at timesteps (B,), as (B, 1, 1, 1)."""
        return self._posterior[name].to(t.device)[t].view(-1, 1, 1, 1)

    def _posterior_mean(self, clean: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, arXiv 2006.11239, eq. 7)."""
        return self._at(t, "clean") * clean + self._at(t, "noisy") * noisy

    def snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR-gamma loss weights (Hang et al. 2023, arXiv 2303.09556, eqs. 5 and 6), (B,).

        min(SNR, gamma) is the weight in terms of x_0; it is divided by SNR for noise and by SNR + 1 for velocity.
        """
        snr = compute_snr(self.scheduler, t)
        divisor = {"epsilon": snr, "v_prediction": snr + 1}.get(self.prediction_type, torch.ones_like(snr))
        return snr.clamp(max=gamma) / divisor


def _posterior(betas: Tensor) -> dict[str, Tensor]:
    """q(x_{t-1} | x_t, x_0) by timestep, float32: the mean's factors of x_0 and x_t, and the log variances' range.

    The smallest variance is the posterior's; at t = 0, where it is 0, that of t = 1. Double precision until the end:
    at t = 0 the factor of x_0 is a ratio of numbers around 1e-4.
    """
    kept = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
    variance = betas * (1 - before) / (1 - kept)
    table = {
        "clean": before.sqrt() * betas / (1 - kept),
        "noisy": (1 - betas).sqrt() * (1 - before) / (1 - kept),
        "smallest": torch.cat([variance[1:2], variance[1:]]).log(),
        "largest": betas.log(),
    }
    return {name: values.float() for name, values in table.items()}


def _bin_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """The log likelihood of x under a Gaussian cut into 255 bins over -1..1 (Ho et al. 2020, eq. 13).

    The cumulative distribution is the tanh approximation that DiT's own code uses.
    """

    def below(z: Tensor) -> Tensor:
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    scale = (-log_scale).exp()
    upper, lower = below((x - mean + 1 / 255) * scale), below((x - mean - 1 / 255) * scale)
    likelihood = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return likelihood.clamp(min=1e-12).log()
