"""Uni-ControlNet's local adapter (Zhao et al. 2023, arXiv 2305.16322): one trained encoder copy for all condition maps.

The maps of all conditions are concatenated, those that are absent as zeros, and become features at every scale of the
encoder. A copy of the U-Net's encoder and middle block sees latents, timestep and text as the base does, and the
features in the norms of each level's first residual block. Its states go to the base's decoder through zero
convolutions. From the authors' code (ShihaoZhaoZSH/Uni-ControlNet); not from there: features narrower on narrow bases,
other autoencoder factors, and norms that start as the pretrained ones. The global adapter is not here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..sites.attaching import Removable
from ..sites.site import Call, Features, Inputs
from ..sites.skips import Middle, Skip, middle, skips
from .base import SiteTuner, Terms, check_maps, in_precision_of
from .configs import UniControlNetConfig
from .encoder_copy import check_encoder, encoder_states, inject, own_copy
from .fdn import FDN, Extractor, convolution, level_widths
from .scedit import keep_variance

TOGETHER = "(all conditions)"
"""The key of the features. All maps make one set of them, so there is no weight per condition."""
SD_WIDTH = 320
"""The first width of Stable Diffusion's U-Nets, for which the extractor's widths are."""


class LocalAdapter(SiteTuner):
    """What Uni-ControlNet and ELR-Diffusion's stage II share: all but the copied encoder.

    Raises `UsageError` without conditions, and `DoesNotFit` for a denoiser that is no U-Net.
    """

    reads_inputs = True
    config: Any

    def __init__(
        self, config: UniControlNetConfig, denoiser: Any, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        check_maps(self.method, conditions)
        check_encoder(denoiser, self.method)
        sites: list[Skip | Middle] = [*skips(denoiser)]
        sites += [middle(denoiser)] if denoiser.mid_block is not None else []
        super().__init__(config, sites, conditions, vae_scale)
        widen = config.width or min(1.0, max(0.25, denoiser.conv_in.out_channels / SD_WIDTH))
        blocks = denoiser.down_blocks
        self.widths = level_widths(len(blocks), widen)
        strides = [2 ** len(block.downsamplers or ()) for block in blocks[:-1]]
        self.extractor = Extractor(3 * len(conditions), self.widths, strides, vae_scale, widen, config.ratio)
        if config.features == "alive":
            keep_variance(self.extractor)
        self.zero = nn.ModuleList(
            convolution(site.channels, site.channels, 1, ratio=config.ratio, zero=True) for site in sites
        )

    def norms(self, denoiser: Any) -> list[list[FDN]]:
        """FDNs in the place of the two norms of each level's first residual block."""
        firsts = [block.resnets[0] for block in denoiser.down_blocks]
        return [
            [FDN(norm, width, self.config.fdn_start, self.config.ratio) for norm in (first.norm1, first.norm2)]
            for first, width in zip(firsts, self.widths, strict=True)
        ]

    def describe_sites(self) -> list[str]:
        """Where maps enter and leave the copy."""
        count, entered = len(self.sites), ", ".join(map(str, self.widths))
        return [f"{count} states of an encoder copy to the decoder, maps entering it {entered} wide"]

    def site_metadata(self) -> dict[str, Any]:
        """The states' widths, and those of the features."""
        return {"states": [site.channels for site in self.sites], "features": self.widths}

    def act(self, denoiser: nn.Module, terms: Terms) -> Removable:
        """As `SiteTuner.act`. Raises `UsageError` for the weight of one of its conditions."""
        weighted = [name for name, weight in (terms.weights or {}).items() if name in self.conditions and weight != 1]
        if weighted:
            raise UsageError(
                f"{self.method} shows all its maps to one encoder, so '{weighted[0]}' has no weight of its own; "
                "leave the weight out, and use the tuner's scale."
            )
        return super().act(denoiser, terms)

    def encoder(self) -> Any:
        """The copy."""
        raise NotImplementedError

    def precision(self, latents: Tensor) -> AbstractContextManager[Any]:
        """Within it the copy computes in the precision of the latents."""
        raise NotImplementedError

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """What is added to each site, in their order; nothing without any hint (B or 1, 3, H, W)."""
        if not hints:
            return {}
        assert inputs is not None
        features = self.extractor(self.joined(hints))
        with self.precision(inputs.latents):
            states, last = encoder_states(self.encoder(), inputs, features)
        states = states if last is None else [*states, last]
        return {TOGETHER: [zero(state) for zero, state in zip(self.zero, states, strict=True)]}

    def joined(self, hints: dict[str, Tensor]) -> Tensor:
        """The maps of all conditions in their order (B, 3 M, H, W), zeros for those without one."""
        some = max(hints.values(), key=len)
        absent = torch.zeros_like(some)
        return torch.cat([hints.get(name, absent).expand_as(some) for name in self.conditions], 1)

    def delta(self, site: Skip | Middle, x: Tensor, call: Call) -> Tensor | None:
        """The copy's state at the site, through its zero convolution."""
        states = call.features.get(TOGETHER)
        return None if states is None else states[site.index if isinstance(site, Skip) else -1]


class UniControlNet(LocalAdapter):
    """The adapter with a trained copy."""

    method = "uni-controlnet"
    config: UniControlNetConfig

    def __init__(
        self, config: UniControlNetConfig, denoiser: Any, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        super().__init__(config, denoiser, conditions, vae_scale)
        self.copy = own_copy(denoiser)
        inject(self.copy, self.norms(denoiser))

    def encoder(self) -> Any:
        """The trained copy."""
        return self.copy

    def precision(self, latents: Tensor) -> AbstractContextManager[Any]:
        """Autocast for the float32 copy, where the latents have less precision."""
        return in_precision_of(latents)

    def train(self, mode: bool = True) -> UniControlNet:
        """Leaves the copy in evaluation mode: dropout would draw what a resumed run cannot repeat."""
        super().train(mode)
        self.copy.eval()
        return self

    def recompute(self) -> None:
        """Gradient checkpointing in the copy."""
        self.copy.enable_gradient_checkpointing()
