"""T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): features of the map, added in the encoder, by diffusers' own model.

One `T2IAdapter` per condition reads the map alone, so it runs once per image and not once per step. Its features are
added where diffusers' U-Net adds `down_intrablock_additional_residuals`: at the end of every level's blocks. SDXL's
adapters are of another kind: they start at half the latents' sides, and the fourth level is the middle block.

Departure: the published adapter starts with random features. Here its first convolution and all biases start at zero,
so that training starts at the base; `start=random` is the original.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import T2IAdapter
from torch import Tensor, nn

from ..errors import DoesNotFit
from ..sites.modules import Output
from ..sites.site import Call, Features, Inputs
from ..sites.skips import Middle, middle
from .base import SiteTuner, check_maps, over_conditions
from .configs import T2IAdapterConfig
from .controlnet import check_u_net


class T2I(SiteTuner):
    """x + sum_m alpha_m F_m^i(map of m) at the end of level i (eq. 5 of the paper)."""

    method = "t2i-adapter"
    needs_autocast = True
    config: T2IAdapterConfig

    def __init__(
        self, config: T2IAdapterConfig, denoiser: nn.Module, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        check_u_net(denoiser, self.method)
        check_maps(self.method, conditions)
        kind, sites = fitting_kind(denoiser)
        super().__init__(config, sites, conditions, vae_scale)
        self.places = {site.name: place for place, site in enumerate(sites) if isinstance(site, Output)}
        widths = [site.width if isinstance(site, Output) else site.channels for site in sites]
        self.adapters = nn.ModuleDict({name: new_adapter(config, widths, vae_scale, kind) for name in conditions})

    def in_diffusers(self) -> dict[str, Any]:
        """The models by condition."""
        return dict(self.adapters.items())

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """Features (B, C_i, h_i, w_i) of each level, for each given hint."""
        dtype = next(self.parameters()).dtype
        return {name: self.adapters[name](self._read(hint).to(dtype)) for name, hint in hints.items()}

    def _read(self, hint: Tensor) -> Tensor:
        return hint.mean(1, keepdim=True) if self.config.channels == 1 else hint

    def delta(self, site: Output | Middle, x: Tensor, call: Call) -> Tensor | None:
        """The weighted sum over the conditions that have a hint; None without any."""
        place = self.places[site.name] if isinstance(site, Output) else -1
        return over_conditions(call, lambda name: call.features[name][place])


def fitting_kind(denoiser: Any) -> tuple[str, list[Any]]:
    """diffusers' kind of adapter whose features have the sides of the denoiser's levels, and their sites.

    Raises `DoesNotFit` where none has.
    """
    sites, halvings = levels(denoiser)
    if halvings == list(range(len(sites))):
        return "full_adapter", sites
    if halvings == [1, 1, 2] and denoiser.mid_block is not None:
        return "full_adapter_xl", [*sites, middle(denoiser)]
    raise DoesNotFit(
        f"t2i-adapter's features have the sides of Stable Diffusion's levels or of SDXL's; this U-Net's are halved "
        f"{', '.join(map(str, halvings))} times where they are added. Use --method controlnet or scedit."
    )


def levels(denoiser: Any) -> tuple[list[Any], list[int]]:
    """Where diffusers' U-Net adds an adapter's features, and how often the latents' sides are halved there.

    In a level with attention before its downsampling, in one without after it.
    """
    sites, halvings, before = [], [], 0
    for index, block in enumerate(denoiser.down_blocks):
        width = block.resnets[-1].out_channels
        attentions, downsamplers = getattr(block, "attentions", None), block.downsamplers
        if attentions:
            sites.append(Output(f"down_blocks.{index}.attentions.{len(attentions) - 1}", width))
        elif downsamplers:
            sites.append(Output(f"down_blocks.{index}.downsamplers.{len(downsamplers) - 1}", width))
        else:
            sites.append(Output(f"down_blocks.{index}.resnets.{len(block.resnets) - 1}", width))
        after = before + len(downsamplers or ())
        halvings.append(before if attentions else after)
        before = after
    return sites, halvings


def new_adapter(config: T2IAdapterConfig, widths: list[int], vae_scale: int, kind: str) -> Any:
    """A `T2IAdapter` of that kind for levels of these widths."""
    factor = 2 * vae_scale if kind == "full_adapter_xl" else vae_scale
    adapter = T2IAdapter(
        in_channels=config.channels,
        channels=widths,
        num_res_blocks=config.blocks,
        downscale_factor=factor,
        adapter_type=kind,
    )
    if config.start == "zero":
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if name.endswith("bias") or name == "adapter.conv_in.weight":
                    parameter.zero_()
    return adapter
