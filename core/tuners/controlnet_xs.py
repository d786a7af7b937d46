"""ControlNet-XS (Zavadski et al. 2023, arXiv 2312.06573): a small encoder beside the base's, with diffusers' adapter.

One `ControlNetXSAdapter` per condition. After every part of the base's encoder the adapter's own part runs on its own
stream joined with the base's, and adds to the base's through a zero convolution; its states also add to the decoder.
diffusers merges the two into one model, in which the base's norms have another epsilon (1e-6) than in Stable Diffusion.
Here the same adapter acts through hooks on the base, which stays as it is. A scale or weight here also scales what its
time embedding changes, so that 0 is the base; diffusers' `conditioning_scale` leaves that out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetXSAdapter
from torch import Tensor, nn

from ..errors import DoesNotFit
from ..sites.modules import Entry, Output
from ..sites.site import Call, Features, Inputs
from .base import SiteTuner, check_maps, in_precision_of, over_conditions
from .configs import ControlNetXSConfig
from .controlnet import check_u_net, encoder_widths

Site = Entry | Output
LATENT_CHANNELS = 4
"""Those that diffusers' adapter reads."""


@dataclass(frozen=True)
class Part:
    """One part of the base's encoder and the adapter's counterpart: where it begins and ends in the base.

    `block` is a level of the encoder, or None for the first convolution and the middle block; `place` is the part's
    within the level, None for the downsampler. `width` is that of its output.
    """

    begin: str
    end: str
    width: int
    block: int | None = None
    place: int | None = None


def encoder_parts(denoiser: Any) -> list[Part]:
    """The parts after the first convolution, in order; the last is the middle block."""
    parts = []
    for index, block in enumerate(denoiser.down_blocks):
        attentions, width = getattr(block, "attentions", None), block.resnets[-1].out_channels
        for place in range(len(block.resnets)):
            begin = f"down_blocks.{index}.resnets.{place}"
            end = f"down_blocks.{index}.attentions.{place}" if attentions else begin
            parts.append(Part(begin, end, width, index, place))
        if block.downsamplers:
            name = f"down_blocks.{index}.downsamplers.0"
            parts.append(Part(name, name, width, index))
    return [*parts, Part("mid_block", "mid_block", denoiser.mid_block.resnets[-1].out_channels)]


class ControlNetXS(SiteTuner):
    """h_base + Z(h_ctrl) after every part, where the adapter's part reads h_ctrl and a 1x1 of what the base's read."""

    method = "controlnet-xs"
    needs_autocast = True
    reads_inputs = True
    config: ControlNetXSConfig

    def __init__(
        self, config: ControlNetXSConfig, denoiser: nn.Module, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        check_u_net(denoiser, self.method, whole=True)
        check_maps(self.method, conditions)
        if any(len(block.resnets) != 2 for block in denoiser.down_blocks):  # type: ignore[union-attr]
            raise DoesNotFit("diffusers' ControlNet-XS is for U-Nets with two layers per block, and this has others.")
        self.parts = encoder_parts(denoiser)
        decoder = [
            Entry(f"up_blocks.{index}.resnets.{place}")
            for index, block in enumerate(denoiser.up_blocks)  # type: ignore[arg-type]
            for place in range(len(block.resnets))
        ]
        self.decoder = {site.name: place for place, site in enumerate(decoder)}
        self.ends = {part.end: place for place, part in enumerate(self.parts)}
        width: int = denoiser.config["block_out_channels"][0]  # type: ignore[index]
        sites: list[Site] = [Output("conv_in", width)]
        if config.time_embedding:
            sites += [Entry("time_embedding"), Output("time_embedding", 4 * width)]
        sites += [Entry(part.begin) for part in self.parts]
        sites += [Output(part.end, part.width) for part in self.parts]
        super().__init__(config, [*sites, *decoder], conditions, vae_scale)
        self.adapters = nn.ModuleDict({name: new_adapter(config, denoiser, vae_scale) for name in conditions})

    def in_diffusers(self) -> dict[str, Any]:
        """The models by condition; {} on a base that diffusers' adapter cannot say it is for."""
        models: dict[str, Any] = dict(self.adapters.items())
        return models if all(model.conv_in.in_channels == LATENT_CHANNELS for model in models.values()) else {}

    def describe_sites(self) -> list[str]:
        """The parts of the encoder and the decoder's layers."""
        return [f"{len(self.parts) + 1} parts of the encoder and {len(self.decoder)} layers of the decoder"]

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """What every condition's stream starts with, and the text; everything else is computed with the base."""
        assert inputs is not None
        text = inputs.conditioning.get("encoder_hidden_states")
        features: dict[str, Any] = {}
        with in_precision_of(inputs.latents):
            for name, hint in hints.items():
                adapter: Any = self.adapters[name]
                start = adapter.conv_in(self._cast(inputs.latents)) + adapter.controlnet_cond_embedding(
                    self._cast(hint)
                )
                features[name] = {"start": start, "text": None if text is None else self._cast(text)}
        return features

    def _cast(self, x: Tensor) -> Tensor:
        """x in the weights' precision, unless `in_precision_of` takes care of it."""
        return x if x.dtype in (torch.float16, torch.bfloat16) else x.to(next(self.parameters()).dtype)

    def delta(self, site: Site, x: Tensor, call: Call) -> Tensor | None:
        """What the conditions that have a hint add; where the base's parts begin only their input is noted."""
        if not call.features:
            return None
        if isinstance(site, Entry) and site.name not in self.decoder:
            call.scratch[site.name] = self._cast(x)
            if call.given is not None:
                call.scratch["emb"] = self._cast(call.given)
            return None
        with in_precision_of(x):
            return over_conditions(call, lambda name: self._added(site, x, call, name))

    def _added(self, site: Site, x: Tensor, call: Call, name: str) -> Tensor:
        adapter: Any = self.adapters[name]
        states = call.scratch.setdefault("states", {}).setdefault(name, {})
        if site.name in self.decoder and isinstance(site, Entry):
            return self._to_decoder(adapter, states, self.decoder[site.name], x)
        if site.name == "conv_in":
            states[-1] = call.features[name]["start"]
            return adapter.control_to_base_for_conv_in(states[-1])
        if site.name == "time_embedding":
            mix = adapter.config.time_embedding_mix**0.3
            return mix * (adapter.time_embedding(call.scratch["time_embedding"]) - x)
        return self._step(adapter, states, self.ends[site.name], call, call.features[name]["text"])

    def _step(self, adapter: Any, states: dict[int, Tensor], place: int, call: Call, text: Any) -> Tensor:
        """The adapter's own part; states are kept by place, since checkpointing computes some of them again."""
        part = self.parts[place]
        base, emb = call.scratch[part.begin], call.scratch["emb"]
        own = adapter.mid_block if part.block is None else adapter.down_blocks[part.block]
        if part.block is None:
            joined = torch.cat([states[place - 1], own.base_to_ctrl(base)], 1)
            states[place] = own.midblock(joined, emb, encoder_hidden_states=text)
            return own.ctrl_to_base(states[place])
        index = -1 if part.place is None else part.place
        joined = torch.cat([states[place - 1], own.base_to_ctrl[index](base)], 1)
        if part.place is None:
            states[place] = own.downsamplers(joined)
        else:
            h = own.resnets[index](joined, emb)
            if own.attentions is not None and own.attentions[index] is not None:
                h = own.attentions[index](h, encoder_hidden_states=text, return_dict=False)[0]
            states[place] = h
        return own.ctrl_to_base[index](states[place])

    @staticmethod
    def _to_decoder(adapter: Any, states: dict[int, Tensor], place: int, x: Tensor) -> Tensor:
        """What is added to the decoder's own part of a layer's input (B, hidden + skip, h, w); zeros for the skip."""
        layers = [c2b for block in adapter.up_connections for c2b in block.ctrl_to_base]
        # states[-1] is the first convolution's; the last one, the middle block's, is no skip
        added = layers[place](states[len(layers) - 2 - place])
        rest = x.shape[1] - added.shape[1]
        return torch.cat([added, added.new_zeros(len(added), rest, *added.shape[2:])], 1)


def new_adapter(config: ControlNetXSConfig, denoiser: Any, vae_scale: int) -> Any:
    """A new adapter, its time embedding a copy of the base's, so that training starts at the base."""
    adapter = ControlNetXSAdapter.from_unet(
        denoiser,
        size_ratio=config.ratio,
        num_attention_heads=heads(config, denoiser),
        learn_time_embedding=config.time_embedding,
        time_embedding_mix=config.time_mix,  # type: ignore[arg-type]
        conditioning_embedding_out_channels=encoder_widths(vae_scale),
    ).to(torch.float32)  # type: ignore[arg-type]
    if denoiser.conv_in.in_channels != adapter.conv_in.in_channels:
        width = adapter.conv_in.out_channels
        adapter.conv_in = nn.Conv2d(denoiser.conv_in.in_channels, width, 3, padding=1)
    if config.time_embedding and not denoiser.conv_in.weight.is_meta:
        with torch.no_grad():
            for name, parameter in adapter.time_embedding.named_parameters():
                path, _, leaf = name.rpartition(".")
                parameter.copy_(getattr(denoiser.time_embedding.get_submodule(path), leaf))
    return adapter


def heads(config: ControlNetXSConfig, denoiser: Any) -> list[int]:
    """Attention heads per level: as given, or the base's times the ratio, at least one and a divisor of the width."""
    widths = [int(width * config.ratio) for width in denoiser.config["block_out_channels"]]
    if config.heads is not None:
        return list(config.heads)
    theirs = denoiser.config["attention_head_dim"]
    counts = [theirs] * len(widths) if isinstance(theirs, int) else theirs
    return [
        max(n for n in range(1, max(1, round(config.ratio * count)) + 1) if width % n == 0)
        for width, count in zip(widths, counts, strict=True)
    ]
