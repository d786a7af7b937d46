"""SCEdit: efficient and controllable generation by editing skip connections (Jiang et al. 2023, arXiv 2312.11392).

SC-Tuner edits every skip for text-to-image tuning; CSC-Tuner also feeds condition maps into them. Equation numbers are
the paper's. Where the paper is silent, the authors' code decides (modelscope/scepter); what neither settles was
inferred from the printed parameter counts and is marked so. The hint path sees neither timestep nor text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DoesNotFit, SctoolError, UsageError
from ..lean.functions import gelu_conv2d
from ..lean.recomputing import again
from ..sites.site import Call, Features, Inputs
from ..sites.skips import Skip, skips
from .base import SiteTuner, known_conditions
from .configs import SCEditConfig


def conv(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A Linear or Conv2d layer on x (B, C, h, w), its float32 weights cast to x's dtype.

    A Linear over channels is a 1x1 convolution: the same sum without copying x to (B, hw, C) and back.
    """
    weight, bias = layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype)
    if isinstance(layer, nn.Linear):
        return F.conv2d(x, weight[:, :, None, None], bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding)


def activated(z: Tensor, layer: nn.Linear | nn.Conv2d, lean: bool) -> Tensor:
    """conv(gelu(z)) for z (B, C, h, w); `lean` keeps z alone for backward, and not gelu(z)."""
    if not lean:
        return conv(F.gelu(z), layer)
    weight, bias = layer.weight.to(z.dtype), None if layer.bias is None else layer.bias.to(z.dtype)
    if isinstance(layer, nn.Linear):
        return gelu_conv2d(z, weight[:, :, None, None], bias)
    return gelu_conv2d(z, weight, bias, layer.padding)  # type: ignore[arg-type]


def zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer with weight and bias zero, so that a new tuner changes nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


SILU_ENERGY = 0.3557  # the mean of silu(z)^2 for z ~ N(0, 1)


def keep_variance(layers: nn.Module) -> None:
    """Draws the weights of every convolution in `layers` so that SiLU between them keeps the variance; biases zero.

    PyTorch's own start multiplies it by SILU_ENERGY / 3 a layer; after the stem's seven, two maps hardly differ.
    """
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=(SILU_ENERGY * layer.weight[0].numel()) ** -0.5)
            nn.init.zeros_(layer.bias)


# ------------------------------------------------------------------------------------------- the tuner operation


class Adapter(nn.Module):
    """Eq. 6: T(x) = W_up gelu(W_down x), with biases, for x (B, C, h, w)."""

    lean = False

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, rank), zeroed(nn.Linear(rank, channels))

    def forward(self, x: Tensor) -> Tensor:
        """T(x), (B, C, h, w)."""
        return activated(conv(x, self.down), self.up, self.lean)


class ConvAdapter(nn.Module):
    """The ablation's Conv operation (Tab. 5): 3x3 convolutions over C / 8 channels (inferred from its count)."""

    lean = False

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, rank, 3, padding=1)
        self.up = zeroed(nn.Conv2d(rank, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """T(x), (B, C, h, w)."""
        return activated(conv(x, self.down), self.up, self.lean)


class ResPrefix(nn.Module):
    """The ablation's ResPrefix operation (Tab. 5): T(x) = W_out softmax(W_q x K^T / sqrt(C)) V + b.

    K and V are (C / 10, C). The paper gives no formula. This is the prefix branch of the same group's Res-Tuning
    (arXiv 2310.19859) with a choice of widths and biases that meets the printed count of 21.64M; others meet it too.
    """

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(channels, channels, bias=False), zeroed(nn.Linear(channels, channels))
        self.key = nn.Parameter(torch.randn(length, channels) * channels**-0.5)
        self.value = nn.Parameter(torch.randn(length, channels) * channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """T(x), (B, C, h, w): every place of x attends to the learnt prefix."""
        query = conv(x, self.query)
        key, value = self.key.to(x.dtype), self.value.to(x.dtype)
        share = (F.conv2d(query, key[:, :, None, None]) * x.shape[1] ** -0.5).softmax(1)  # (B, l, h, w)
        return conv(F.conv2d(share.to(query.dtype), value.T[:, :, None, None]), self.out)


OPERATORS = {"linear": (Adapter, 1), "conv": (ConvAdapter, 8), "resprefix": (ResPrefix, 10)}
"""The operations, and the divisor of the width that `ratio` multiplies."""


def operators(config: SCEditConfig, sites: list[Skip], ranks: Mapping[int, int] | None = None) -> nn.ModuleDict:
    """One tuner operation a skip, by the skip's index; of the width that `ranks` gives, or the ratio."""
    operator, divisor = OPERATORS[config.operator]
    widths = ranks or {site.index: max(1, int(site.channels * config.ratio / divisor)) for site in sites}
    return nn.ModuleDict(
        {str(site.index): operator(site.channels, widths[site.index]) for site in sites if site.index in widths}
    )


# ------------------------------------------------------------------------------------------------ the hint cascade


class Stem(nn.ModuleList):
    """The multi-layer hint block (Fig. 4c): RGB in 0..1 (B, 3, H, W) to (B, out, H / f, W / f).

    f is the autoencoder's factor. Seven 3x3 convolutions with SiLU between, three of stride 2 for f = 8. Another
    factor drops the last strides or adds some elsewhere, so that the chain always ends on the latent's grid.
    `lean` computes it again in backward: 0.5 % of a step's FLOPs for 85 MB less per image (SD 1.5, 512 px, bfloat16).
    """

    lean = False

    def __init__(self, out: int, widen: float, vae_scale: int) -> None:
        halvings = round(math.log2(vae_scale))
        if 2**halvings != vae_scale or halvings > 7:
            raise UsageError(f"the autoencoder's factor is {vae_scale}; a hint can be reduced by 1, 2, 4 … 128.")
        strided = (2, 4, 6, 1, 3, 5, 0)[:halvings]
        widths = [3, *(int(w * widen) for w in (16, 16, 32, 32, 96, 96)), out]
        pairs = enumerate(pairwise(widths))
        super().__init__(nn.Conv2d(a, b, 3, stride=2 if i in strided else 1, padding=1) for i, (a, b) in pairs)

    def forward(self, hint: Tensor) -> Tensor:
        """The encoded hint (B, out, H / f, W / f)."""
        return again(self._encoded, hint) if self.lean and torch.is_grad_enabled() else self._encoded(hint)

    def _encoded(self, hint: Tensor) -> Tensor:
        for index, layer in enumerate(self):
            hint = conv(F.silu(hint) if index else hint, layer)
        return hint


class Dense(nn.Module):
    """One dense module of the cascade (Fig. 4c): SiLU, then a zero convolution from level i - 1 to level i.

    `dual` (ablation, inferred from its count) is a 3x3 to a fifth of the width, then a 1x1; only the last is zero, for
    two zero layers in a row would never learn.
    """

    def __init__(self, before: int, after: int, stride: int, kernel: int, dual: bool) -> None:
        super().__init__()
        if dual:
            narrow = max(1, after // 5)
            layers = [nn.Conv2d(before, narrow, 3, stride, padding=1), zeroed(nn.Conv2d(narrow, after, 1))]
        else:
            layers = [zeroed(nn.Conv2d(before, after, kernel, stride, padding=kernel // 2))]
        self.convs = nn.ModuleList(layers)

    def forward(self, c: Tensor) -> Tensor:
        """c of the next level."""
        c = F.silu(c)
        for layer in self.convs:
            c = conv(c, layer)
        return c


class Branch(nn.Module):
    """All that CSC-Tuner owns for one condition: the stem, the chain of dense modules, a tuner a skip."""

    def __init__(self, config: SCEditConfig, sites: list[Skip], strides: list[int], sdxl: bool, vae_scale: int) -> None:
        super().__init__()
        out = config.hint_channels or (320 if sdxl else 256)
        self.stem = Stem(out, 2.0 if sdxl else 1.0, vae_scale)
        widths = [out, *(site.channels for site in sites)]
        self.dense = nn.ModuleDict(
            {
                str(site.index): Dense(before, site.channels, stride, config.kernel, config.dual)
                for site, before, stride in zip(sites, widths, strides, strict=False)
            }
        )
        self.tuner = operators(config, sites)
        self.heads = nn.ModuleDict()
        if config.cascade == "zero-heads":
            keep_variance(self.stem)
            keep_variance(self.dense)
            self.heads.update({str(site.index): zeroed(nn.Conv2d(site.channels, site.channels, 1)) for site in sites})

    def encode(self, hint: Tensor) -> dict[int, Tensor]:
        """c_i (B, C_i, h_i, w_i) of every edited skip, by its index; each level is made from the one before.

        The paper's chain of zero convolutions feeds c_i itself to level i + 1, so level i sees no map before step
        i + 1. With heads (not in the paper) the chain starts alive, and a zero convolution leads off each level.
        """
        c, levels = self.stem(hint), {}
        for index, dense in self.dense.items():
            c = dense(c)
            levels[int(index)] = conv(c, self.heads[index]) if self.heads else c
        return levels

    def delta(self, site: Skip, x: Tensor, c: Tensor) -> Tensor:
        """Eq. 7 inside the sum: T(x + c) + c."""
        if c.shape[-2:] != x.shape[-2:]:  # unpadded downsamplers round odd sides down, the cascade rounds up
            c = c[..., : x.shape[-2], : x.shape[-1]]
        c = c.to(x.dtype)
        return self.tuner[str(site.index)](x + c) + c


# ---------------------------------------------------------------------------------------------------- the methods


class SCEdit(SiteTuner):
    """SC-Tuner (eq. 5) without conditions; CSC-Tuner (eq. 7) with them, one branch a condition.

    A merged one may be both: an SC-Tuner of the widths in `ranks` beside the conditions' branches.
    """

    method = "scedit"
    config: SCEditConfig

    def __init__(
        self, config: SCEditConfig, denoiser: nn.Module, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        every = known_skips(denoiser)
        cascade = select(every, config.skips) if conditions or config.ranks is None else []
        alone = select(every, tuple(config.ranks)) if config.ranks else [] if conditions else cascade
        sites = [site for site in every if site in cascade or site in alone]
        super().__init__(config, sites, conditions, vae_scale)
        self.weights, self.normalize = config.weights, config.normalize
        known_conditions({**config.weights, **config.gains}, self.conditions)
        self.sc = operators(config, alone, config.ranks)
        strides = cascade_strides(denoiser, cascade)
        sdxl = denoiser.config.get("addition_embed_type") == "text_time"  # the authors' code widens its hint block
        self.csc = nn.ModuleDict({name: Branch(config, cascade, strides, sdxl, vae_scale) for name in self.conditions})
        self.recomputed = False

    def keep_less(self) -> None:
        """The operations keep x and W_down x, the stems the map."""
        for module in self.modules():
            if isinstance(module, Adapter | ConvAdapter | Stem):
                module.lean = True

    def recompute(self) -> None:
        """All that a skip is given is computed again: x and c are kept."""
        self.recomputed = True

    def site_metadata(self) -> dict[str, Any]:
        """The edited skips and their widths."""
        return {"skips": {str(site.index): site.channels for site in self.sites}}

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """c of eq. 7 for each given hint (B, 3, H, W) in 0..1."""
        return {name: self.csc[name].encode(hint) for name, hint in hints.items()}

    def delta(self, site: Skip, x: Tensor, call: Call) -> Tensor | None:
        """T(x) of eq. 5 and the sum of eq. 7 over the conditions that have a hint; None where there is neither."""
        key = str(site.index)
        total = self._run(self.sc[key], x) if key in self.sc else None
        for name, levels in call.features.items():
            weight = call.alphas[name] * self.config.gains.get(name, 1.0)
            if weight != 0 and site.index in levels:
                part = weight * self._run(self.csc[name].delta, site, x, levels[site.index])
                total = part if total is None else total + part
        return total

    def _run(self, part: Callable[..., Tensor], *args: Any) -> Tensor:
        return again(part, *args) if self.recomputed and torch.is_grad_enabled() else part(*args)


def known_skips(denoiser: nn.Module) -> list[Skip]:
    """All skips of the denoiser. Raises `DoesNotFit` where it has none, as transformers."""
    try:
        return skips(denoiser)
    except SctoolError as error:
        raise DoesNotFit(
            f"scedit edits skip connections, and a {type(denoiser).__name__} has none that can be edited. "
            "Methods for every denoiser are diffscaler and lora."
        ) from error


def select(sites: list[Skip], chosen: tuple[int, ...] | None) -> list[Skip]:
    """The chosen skips in encoder order; all for None. Raises `DoesNotFit` for an index that is not there."""
    if chosen is None:
        return sites
    wrong = [index for index in chosen if not 0 <= index < len(sites)]
    if wrong or not chosen or len(set(chosen)) != len(chosen):
        raise DoesNotFit(f"skips={list(chosen)}: choose distinct skips out of 0..{len(sites) - 1}, in encoder order.")
    return [sites[index] for index in sorted(chosen)]


def cascade_strides(denoiser: nn.Module, sites: list[Skip]) -> list[int]:
    """The stride of each dense module: 2 for every halving since the edited skip before."""
    every, strides, previous = skips(denoiser), [], -1
    for site in sites:
        between = every[previous + 1 : site.index + 1]
        strides.append(2 ** sum(skip.stride2 for skip in between))
        previous = site.index
    return strides
