"""ControlLoRA, version 1 (Wu 2023, github.com/HighCWu/ControlLoRA): LoRA on attention that also sees a condition map.

As the original: a small encoder turns the map into control states c of every attention's width and grid; all four
layers of every attention have a LoRA without alpha; the one of the queries reads h + c + U D c in the place of h, with
U D another LoRA, one an attention. Widths, norms, strides and starts are the original's, whose layers these are not.

Not from there: several conditions, an encoder each, whose states are summed with weights; no states of a black map,
which the original's norms turn into amplified rounding errors; encoders for autoencoder factors other than 8, and for
U-Nets with other levels or narrower norms; states that repeat their last row or column where the U-Net rounds an odd
side up; without any map the base is unchanged. The original's options (post-add, concatenation with h,
version 2) are not here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DoesNotFit, SctoolError, UsageError
from ..sites.layers import Layer
from ..sites.parts import chosen_layers
from ..sites.site import Call, Features, Inputs
from ..sites.skips import skips
from .base import SiteTuner, check_maps, known_conditions
from .configs import ControlLoRAConfig
from .scedit import conv

WIDTHS = (32, 64, 128, 256)
"""Widths of the encoder's blocks down to the latent's grid; the last is kept from there on."""
GROUPS, EPS = 32, 1e-6
QUERY = "to_q"


class LowRank(nn.Module):
    """U D x without biases; D ~ N(0, 1 / rank^2), U starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, inputs) to (B, N, outputs), in x's precision."""
        return F.linear(F.linear(x, self.down.weight.to(x.dtype)), self.up.weight.to(x.dtype))


class Block(nn.Module):
    """Norm, SiLU, convolution, norm, SiLU; then, with `halve`, a convolution of stride 2 that rounds down."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, halve: bool = False, groups: int = GROUPS) -> None:
        super().__init__()
        self.before = nn.GroupNorm(GROUPS, inputs, EPS)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.after = nn.GroupNorm(math.gcd(groups, outputs), outputs, EPS)
        self.halving = nn.Conv2d(outputs, outputs, 3, stride=2) if halve else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h, w), or (B, C', h // 2, w // 2)."""
        x = F.silu(normed(conv(F.silu(normed(x, self.before)), self.conv), self.after))
        return x if self.halving is None else conv(F.pad(x, (0, 1, 0, 1)), self.halving)


def normed(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """A `GroupNorm` whose float32 weights follow x's precision."""
    return F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


class Level:
    """A level of a U-Net as its encoder comes to it: by halving the sides or not, odd ones rounded up or down."""

    def __init__(self, before: Any = None) -> None:
        """`before` is the down block before it; None for the first level."""
        samplers = getattr(before, "downsamplers", None) or ()
        self.halves, self.up = bool(samplers), any(sampler.padding for sampler in samplers)

    def fitted(self, c: Tensor, before: Tensor) -> Tensor:
        """c, made from `before` by rounding down, on the level's own grid: its last row and column repeated."""
        odd = [side % 2 if self.halves and self.up else 0 for side in before.shape[-2:]]
        return F.pad(c, (0, odd[1], 0, odd[0]), mode="replicate") if any(odd) else c


class Encoder(nn.Module):
    """One condition's map (B, 3, H, W) in 0..1 to control states of each level.

    `halvings` is log2 of the autoencoder's factor; `levels` are those of the U-Net down to the last with attention;
    `widths` has the width of those with attention, `groups` is that of the U-Net's norms: on a narrow one 32 groups
    would have a channel each, which leaves nothing of a grid of one place.
    """

    def __init__(self, halvings: int, levels: Sequence[Level], widths: dict[int, int], groups: int) -> None:
        super().__init__()
        self.plan = levels
        self.conv_in = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        pairs = enumerate(zip((WIDTHS[0], *WIDTHS[:-1]), WIDTHS, strict=True))
        self.pre = nn.ModuleList(Block(a, b, halve=i < halvings) for i, (a, b) in pairs)
        self.levels = nn.ModuleList(Block(WIDTHS[-1], WIDTHS[-1], halve=level.halves) for level in levels[1:])
        self.heads = nn.ModuleDict({str(i): Block(WIDTHS[-1], width, 1, groups=groups) for i, width in widths.items()})

    def forward(self, hint: Tensor) -> dict[int, Tensor]:
        """c (B, h_i w_i, C_i) of each level i with attention; zeros for a black map.

        Of a black map every layer makes constants, and the norms, dividing by their spread, blow up rounding errors.
        """
        shown = hint.flatten(1).any(1).view(-1, 1, 1)
        c = conv(hint, self.conv_in)
        for block in self.pre:
            c = block(c)
        found = {}
        for number, level in enumerate(self.plan):
            if number:
                c = level.fitted(self.levels[number - 1](c), c)
            if str(number) in self.heads:
                found[number] = self.heads[str(number)](c).flatten(2).transpose(1, 2) * shown
        return found


class ControlLoRA(SiteTuner):
    """y + U D x at every layer of attention, where the queries' x is h + c + U_c D_c c.

    Raises `UsageError` without conditions, and `DoesNotFit` for a denoiser that is no U-Net with attention.
    """

    method = "controllora"
    config: ControlLoRAConfig

    def __init__(
        self, config: ControlLoRAConfig, denoiser: Any, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        check_maps(self.method, conditions)
        super().__init__(config, attention(denoiser), conditions, vae_scale)
        self.weights, self.normalize = config.weights, config.normalize
        known_conditions(config.weights, self.conditions)
        count = len(denoiser.down_blocks)
        self.level_of = {site.name: level(site.name, count) for site in self.sites if QUERY in site.name}
        widths = {self.level_of[site.name]: site.inputs for site in self.sites if QUERY in site.name}
        levels = [Level(), *map(Level, denoiser.down_blocks)][: max(widths) + 1]
        halvings = round(math.log2(vae_scale))
        if 2**halvings != vae_scale or halvings > len(WIDTHS):
            raise UsageError(f"the autoencoder's factor is {vae_scale}; ControlLoRA's encoder reduces by 1, 2, 4 … 16.")
        groups = denoiser.config.get("norm_num_groups") or GROUPS
        self.encoders = nn.ModuleDict({name: Encoder(halvings, levels, widths, groups) for name in self.conditions})
        self.loras = nn.ModuleDict({key(one): LowRank(one.inputs, one.outputs, config.rank) for one in self.sites})
        self.controls = nn.ModuleDict(
            {key(one): LowRank(one.inputs, one.inputs, config.rank) for one in self.sites if QUERY in one.name}
        )

    def describe_sites(self) -> list[str]:
        """How many layers, and how many of them see the map."""
        return [f"{len(self.sites)} layers of attention, {len(self.controls)} of which see the map"]

    def site_metadata(self) -> dict[str, Any]:
        """The layers' number and widths."""
        widths = {"inputs": sum(one.inputs for one in self.sites), "outputs": sum(one.outputs for one in self.sites)}
        return {"sites": {"layers": len(self.sites), **widths}}

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """c of each level for each given hint (B, 3, H, W) in 0..1."""
        return {name: self.encoders[name](hint) for name, hint in hints.items()}

    def delta(self, site: Layer, x: Tensor, call: Call) -> Tensor | None:
        """U D x of the layer's input; None without any hint."""
        if not call.features:
            return None
        given: Any = call.given
        if site.name in self.level_of:
            given = given + self._control(site, call).to(given.dtype)
        return self.loras[key(site)](given)

    def _control(self, site: Layer, call: Call) -> Tensor:
        """c + U_c D_c c, (B or 1, N, C), of the weighted sum c of all conditions, which a level's attentions share."""
        number = self.level_of[site.name]
        if number not in call.scratch:
            parts = [call.alphas[name] * own[number] for name, own in call.features.items()]
            call.scratch[number] = torch.stack(torch.broadcast_tensors(*parts)).sum(0)
        c = call.scratch[number]
        return c + self.controls[key(site)](c)


def attention(denoiser: Any) -> list[Layer]:
    """All layers of attention. Raises `DoesNotFit` for a denoiser that is no U-Net, or has none."""
    try:
        skips(denoiser)
    except SctoolError as error:
        raise DoesNotFit(
            f"controllora brings maps to a U-Net's attention, and a {type(denoiser).__name__} is none. "
            "Methods for every denoiser are diffscaler and lora."
        ) from error
    return chosen_layers(denoiser, ["attention"])


def level(name: str, count: int) -> int:
    """The level, of `count`, of the layer of that name: the middle block is on the last, up blocks come back up."""
    found = re.match(r"(down|up)_blocks\.(\d+)\.", name)
    if found is None:
        return count - 1
    return int(found[2]) if found[1] == "down" else count - 1 - int(found[2])


def key(site: Layer) -> str:
    """A layer's name as that of a submodule, which may have no dots."""
    return site.name.replace(".", "/")
