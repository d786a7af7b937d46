"""SC-Tuner and CSC-Tuner (SCEdit, arXiv 2312.11392): what they add to the skips of ComfyUI's U-Net.

The formulas are those of sctool's core/tuners/scedit.py, read off the names and shapes of the file's weights.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
from typing import Any

import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tuner import KEY, Hints, Options, Tuner, apply

STRIDED = (2, 4, 6, 1, 3, 5, 0)
"""The layers of the hint's stem in the order in which they take a stride: as many as the autoencoder halves images."""


class SCEdit(Tuner):
    """SC-Tuner, T(x), where the file has weights `sc`; CSC-Tuner, T(x + c) + c, where it has `csc` and a hint."""

    def fit(self, unet: nn.Module, config: dict[str, Any], hints: Hints) -> None:
        """Also takes the hints."""
        widths = skip_connections(config)
        for index, width in sorted((int(index), width) for index, width in self.meta["skips"].items()):
            here = widths[index][0] if index < len(widths) else "absent"
            if here != width:
                raise self.misfit(f"skip {index}", width, here)
        edited = sorted({int(name.split(".")[3]) for name in self.weights if ".dense." in name})
        before = zip([-1, *edited], edited, strict=False)
        self.strides = {i: math.prod(stride for _, stride in widths[last + 1 : i + 1]) for last, i in before}
        self.last, self.hints = len(widths) - 1, self.named(hints)
        self.encoded: dict[Any, dict[str, dict[int, Tensor]]] = {}

    def named(self, hints: Hints) -> Hints:
        """The hints by the file's conditions: one without a name is that of the only condition."""
        known = self.meta["conditions"]
        if len(known) == 1:
            hints = {name or known[0]: hint for name, hint in hints.items()}
        if wrong := [name for name in hints if name not in known]:
            raise ValueError(f"hint '{wrong[0]}': {self.name} has the conditions: {', '.join(known) or 'none'}.")
        if known and not hints and not any(name.startswith("sc.") for name in self.weights):
            raise ValueError(f"{self.name} needs a condition image ({', '.join(known)}); connect a node 'sctool hint'.")
        return hints

    def to(self, device: Any) -> Tuner:
        """Moves the weights; the encoded hints are forgotten when they would stay behind."""
        if isinstance(device, torch.device) and any(made != device for *_, made in self.encoded):
            self.encoded = {}
        return super().to(device)

    def delta(self, x: Tensor, alphas: dict[str, float], options: Options) -> Tensor | None:
        """What it adds to the skip x (B, C, h, w) of the output block under way (eq. 5 and 7); None for nothing."""
        index = self.last - options["block"][1]  # the first output block takes in the last skip
        total = self.operation(f"sc.{index}", x) if any(k.startswith(f"sc.{index}.") for k in self.weights) else None
        for name, levels in self.features(x, options).items():
            alpha = alphas[name] * self.config("gains", {}).get(name, 1.0)
            if alpha != 0 and index in levels:
                c = self.for_batch(levels[index], x, options)
                part = alpha * (self.operation(f"csc.{name}.tuner.{index}", x + c) + c)
                total = part if total is None else total + part
        return total

    def config(self, key: str, default: Any) -> Any:
        """A setting that the tuner was made with."""
        return self.meta["config"].get(key, default)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """The layer of that name on x."""
        return apply(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"), stride)

    def operation(self, name: str, x: Tensor) -> Tensor:
        """Eq. 6: T(x) = W_up gelu(W_down x), by 1x1 or 3x3; or the attention of the ablation's ResPrefix."""
        if f"{name}.key" not in self.weights:
            return self.conv(f"{name}.up", F.gelu(self.conv(f"{name}.down", x)))
        share = apply(self.conv(f"{name}.query", x), self.weights[f"{name}.key"]) * x.shape[1] ** -0.5
        return self.conv(f"{name}.out", apply(share.softmax(1), self.weights[f"{name}.value"].T))

    def features(self, x: Tensor, options: Options) -> dict[str, dict[int, Tensor]]:
        """c of eq. 7 by condition and skip, encoded once for a size; images are scaled to it as ControlNets' are."""
        size = tuple(side * self.meta["vae_scale"] for side in options["original_shape"][-2:])
        key = (size, x.dtype, x.device)
        if key not in self.encoded:
            levels = {}
            for name, (image, _) in self.hints.items():
                hint = image[..., :3].movedim(-1, 1)
                if hint.shape[-2:] != size:
                    hint = comfy.utils.common_upscale(hint, size[1], size[0], "nearest-exact", "center")
                levels[name] = self.encode(f"csc.{name}", hint.to(x))
            self.encoded[key] = levels
        return self.encoded[key]

    def encode(self, branch: str, c: Tensor) -> dict[int, Tensor]:
        """The stem, then the cascade of dense modules, each level from the one before (Fig. 4c)."""
        levels, strided = {}, STRIDED[: self.meta["vae_scale"].bit_length() - 1]
        for layer in range(len(STRIDED)):
            c = self.conv(f"{branch}.stem.{layer}", F.silu(c) if layer else c, 2 if layer in strided else 1)
        for index, stride in self.strides.items():
            dense, head = f"{branch}.dense.{index}.convs", f"{branch}.heads.{index}"
            c = self.conv(f"{dense}.0", F.silu(c), stride)
            c = self.conv(f"{dense}.1", c) if f"{dense}.1.weight" in self.weights else c
            levels[index] = self.conv(head, c) if f"{head}.weight" in self.weights else c
        return levels

    def for_batch(self, c: Tensor, x: Tensor, options: Options) -> Tensor:
        """Features of b hints for the batch x, which holds the latents once for each prompt that is run beside."""
        latents = len(x) // len(options.get("cond_or_uncond") or (0,))
        if latents % len(c):
            raise ValueError(f"{len(c)} hint images for {latents} latents; connect one, or one for each latent.")
        if c.shape[-2:] != x.shape[-2:]:
            raise ValueError(
                "another node resizes the U-Net (as Deep Shrink does), which sctool's hints do not follow."
            )
        return c if len(c) == 1 else c.repeat(len(x) // len(c), 1, 1, 1)


def skip_connections(config: dict[str, Any]) -> list[tuple[int, int]]:
    """Width of every skip of a U-Net in encoder order, and its stride from the skip before."""
    widths = [config["model_channels"] * factor for factor in config["channel_mult"]]
    skips = [(config["model_channels"], 1)]
    for level, width in enumerate(widths):
        skips += [(width, 1)] * config["num_res_blocks"][level] + [(width, 2)] * (level + 1 < len(widths))
    return skips


def shares(tuners: list[SCEdit]) -> list[dict[str, float]]:
    """alpha of every hint: they sum to 1 over all tuners on the model, unless one was made otherwise (eq. 7)."""
    own = [{n: w * one.config("weights", {}).get(n, 1.0) for n, (_, w) in one.hints.items()} for one in tuners]
    if not any(own) or not all(one.config("normalize", True) for one in tuners if one.meta["conditions"]):
        return own
    total = sum(weight for weights in own for weight in weights.values())
    if abs(total) < 1e-6:
        raise ValueError("the weights of the sctool hints sum to 0; change them.")
    return [{name: weight / total for name, weight in weights.items()} for weights in own]


def edit_skip(h: Tensor, x: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """ComfyUI's output-block patch: the skip x (B, C, h, w), on its way into the block, plus every tuner's delta."""
    tuners, out = [one for one in options["patches"][KEY] if isinstance(one, SCEdit)], x
    for one, alphas in zip(tuners, shares(tuners), strict=True):
        delta = one.delta(x, alphas, options)
        out = out if delta is None else out + one.strength * delta
    return h, out
