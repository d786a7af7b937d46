"""The diffusion loss as pure functions: forward process, target, weighting.

The noise schedule and q(x_t | x_0) are diffusers' `DDPMScheduler`; here stands what a trainer adds.
"""

from __future__ import annotations

import hashlib

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by its parts (run seed, step, ...): the same parts give the same draws anywhere."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def target(scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the denoiser should predict at step `t`: noise, velocity (Salimans & Ho 2022, eq. in app. D) or x_0."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, t)
    return latents


def snr_weights(scheduler: DDPMScheduler, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR-gamma loss weights (Hang et al. 2023, arXiv 2303.09556, eq. 5 and 6), (B,).

    min(SNR, gamma) is the weight in terms of x_0; it is divided by SNR for noise and by SNR + 1 for velocity.
    """
    snr = compute_snr(scheduler, t)
    clipped = snr.clamp(max=gamma)
    divisor = {"epsilon": snr, "v_prediction": snr + 1}.get(scheduler.config.prediction_type, torch.ones_like(snr))
    return clipped / divisor


def loss(
    prediction: torch.Tensor,
    wanted: torch.Tensor,
    scheduler: DDPMScheduler,
    t: torch.Tensor,
    snr_gamma: float | None,
) -> torch.Tensor:
    """Mean squared error per sample in float32, (B,), weighted by min-SNR where `snr_gamma` is given."""
    per_sample = (prediction.float() - wanted.float()).square().flatten(1).mean(1)
    return per_sample if snr_gamma is None else per_sample * snr_weights(scheduler, t, snr_gamma)
