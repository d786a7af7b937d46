"""Costs of a run's tuner compared with its base alone: parameters, step times, peak memory, measured alternately.

Both models get the same random latents, prompts and hints. A training step is one forward and backward pass without the
optimizer; for the base alone it covers all weights, as in full fine-tuning. A sampling step is one prediction of a
batch doubled for guidance, with the hint already encoded, as in every step after the first.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from ..core.measure import PATIENCE, PeakMemory, in_turns
from ..core.runs import Run

STEPS = 2


class Bench:
    """Base and tuned model on the same inputs; without a tuner, the base alone."""

    def __init__(self, backbone: Any, tuner: Any | None, size: int, batch: int) -> None:
        g = torch.Generator().manual_seed(0)
        side, channels = size // backbone.vae_scale, backbone.latent_channels
        self.backbone, self.tuner, self.denoiser = backbone, tuner, backbone.denoiser
        device = backbone.device
        self.latents = torch.randn((batch, channels, side, side), generator=g).to(device)
        self.t = torch.full((batch,), 500, device=device)
        sizes = backbone.family.size_rows(batch, size, device)
        self.text = {**backbone.encode_prompts([""] * batch), **sizes}
        edges = (torch.rand((batch, 3, size, size), generator=g) > 0.9).float().to(device)
        self.hints = {name: edges for name in tuner.conditions} if tuner and tuner.conditions else None
        # Doubled tensors are created once: the hint is encoded again only for a different tensor.
        self.doubled = torch.cat([self.latents] * 2), torch.cat([self.t] * 2)
        self.doubled_text = {key: torch.cat([value] * 2) for key, value in self.text.items()}

    def train(self, tuned: bool) -> float:
        """Seconds of one forward and backward pass."""
        model = self._model(tuned)
        if not tuned:
            self.denoiser.requires_grad_(True)
        try:
            start = self._now()
            out = model(self.latents, self.t, self.text, self.hints if tuned else None)
            out.float().square().mean().backward()
            return self._now() - start
        finally:
            model.zero_grad(set_to_none=True)
            model.attachment.detach()
            self.denoiser.requires_grad_(False)

    @torch.no_grad()
    def sample(self, tuned: bool) -> float:
        """Seconds per prediction, averaged over `STEPS` in a row."""
        model = self._model(tuned).eval()
        inputs = (*self.doubled, self.doubled_text, self.hints if tuned else None)
        try:
            model(*inputs)  # encodes the hint
            start = self._now()
            for _ in range(STEPS):
                model(*inputs)
            return (self._now() - start) / STEPS
        finally:
            model.attachment.detach()

    def _now(self) -> float:
        if self.denoiser.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _model(self, tuned: bool) -> Any:
        from ..core.sites.attaching import TunedBackbone

        return TunedBackbone(self.denoiser, *([self.tuner] if tuned else []))


def profile(
    run: Run, *, batch: int = 4, device: str = "cpu", offline: bool = False, patience: float = PATIENCE
) -> dict[str, Any]:
    """Costs of the run's tuner and of its base alone, and their ratios, as one JSON value.

    {"parameters": {"trainable", "stored", "total", "base"}, "base"/"tuned": {"train_step_s", "sample_step_s",
    "train_peak_bytes", "sample_peak_bytes"}, "ratio": tuned over base, "protocol"}. Times are medians.
    """
    from ..core.backbones.loading import load_backbone
    from ..core.checkpoint import load_tuner

    config = run.config
    backbone = load_backbone(config.base, device=device, offline=offline)
    tuner = load_tuner(run.tuner, backbone)
    size = config.size or backbone.resolution
    bench = Bench(backbone, tuner, size, batch)
    models = {"base": False, "tuned": True}
    trains = {name: partial(bench.train, tuned) for name, tuned in models.items()}
    samplings = {name: partial(bench.sample, tuned) for name, tuned in models.items()}
    costs: dict[str, dict[str, Any]] = {name: {} for name in models}
    for name, seconds in in_turns(trains, patience=patience).items():
        costs[name]["train_step_s"] = seconds
    for name, seconds in in_turns(samplings, patience=patience).items():
        costs[name]["sample_step_s"] = seconds
    memory = PeakMemory(device)
    for name in models:
        costs[name]["train_peak_bytes"] = memory.of(trains[name])
        costs[name]["sample_peak_bytes"] = memory.of(samplings[name])
    base, tuned = costs["base"], costs["tuned"]
    ratio = {key: tuned[key] / base[key] for key in base if base[key] and tuned[key]}
    return {
        "method": tuner.method,
        "parameters": parameters(backbone.denoiser, tuner),
        **costs,
        "ratio": ratio,
        "protocol": {
            "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "dtype": str(backbone.denoiser.dtype).removeprefix("torch."),
            "size": size,
            "batch": batch,
            "memory": memory.kind,
            "train_step": "forward and backward, no optimizer; base: all its weights",
            "sample_step": "one prediction, batch doubled for guidance, hint already encoded",
            "base_hash": backbone.hash,
        },
    }


def parameters(denoiser: torch.nn.Module, tuner: Any) -> dict[str, int]:
    """Counts: the tuner's "trainable" and "stored" (its file's numbers), "base", and "total" of both together."""
    own = sum(p.numel() for p in tuner.parameters())
    base = sum(p.numel() for p in denoiser.parameters())
    return {
        "trainable": own,
        "stored": sum(value.numel() for value in tuner.state_dict().values()),
        "base": base,
        "total": base + own - tuner.replaced(),
    }
