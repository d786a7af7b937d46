"""LoRAs as one: side by side, exactly, or by peft's own weighted methods, which approximate in a smaller rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from ..errors import DoesNotFit, UsageError
from ..sites.layers import Layer, find_module
from ..sites.parts import family_of
from ..tuners.configs import LoRAConfig
from ..tuners.peft_layers import ADAPTER, LoRA, standin

PEFT = (
    "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
"""peft's `combination_type`s; its `cat` is `concatenated` here, for ranks and layers that differ."""
SEED = 0
"""Of the weights that dare drops."""

Pair = tuple[Tensor, Tensor]
"""A (r, ...) and B (m, r, ...) of a layer."""


def concatenated(tuners: Sequence[LoRA], weights: Sequence[float], denoiser: nn.Module) -> LoRA:
    """sum_i w_i (alpha_i / r_i) B_i A_i as one LoRA, its rank the sum of theirs; layers and ranks may differ."""
    pairs: dict[Layer, list[Pair]] = {}
    for one, weight in zip(tuners, weights, strict=True):
        for site, layer in one.adapted.items():
            a, b = _pair(layer)
            pairs.setdefault(site, []).append((a, weight * layer.scaling[ADAPTER] * b))
    whole = {site: (torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], 1)) for site, own in pairs.items()}
    return _holding(whole, tuners, denoiser)


def by_peft(
    tuners: Sequence[LoRA], weights: Sequence[float], denoiser: nn.Module, rule: str, rank: int | None = None,
    density: float | None = None,
) -> LoRA:  # fmt: skip
    """peft's `add_weighted_adapter` with `combination_type=rule`, layer by layer.

    rank: that of the result, for rules with svd; the largest of a layer when not given. density: the share of weights
    that ties, dare and magnitude_prune keep. Raises `DoesNotFit` for what peft refuses, such as unequal ranks.
    """
    groups: dict[tuple[Any, ...], list[Layer]] = {}
    for site in dict.fromkeys(site for one in tuners for site in one.adapted):
        own = [(n, one.adapted[site]) for n, one in enumerate(tuners) if site in one.adapted]
        key = tuple((number, layer.r[ADAPTER], layer.scaling[ADAPTER]) for number, layer in own)
        groups.setdefault(key, []).append(site)
    options = {"svd_rank": rank if rule.endswith("svd") else None, "density": density}
    whole: dict[Layer, Pair] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for key, sites in groups.items():  # layers that have the same tuners and ranks are one call of peft
            parts = [(tuners[number], weights[number]) for number, *_ in key]
            try:
                whole |= _combined(denoiser, sites, parts, rule, options)
            except ValueError as error:
                raise DoesNotFit(f"--rule {rule}: {sites[0].name}: {error} --rule cat merges exactly.") from error
    return _holding({site: whole[site] for one in tuners for site in one.adapted}, tuners, denoiser)


def _pair(layer: Any) -> Pair:
    """Copies of A and B of one of peft's layers."""
    return tuple(part[ADAPTER].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))  # type: ignore[return-value]


def _combined(
    denoiser: nn.Module, sites: Sequence[Layer], parts: Sequence[tuple[LoRA, float]], rule: str,
    options: dict[str, Any],
) -> dict[Layer, Pair]:  # fmt: skip
    """A and B that peft makes of several tuners' layers at these sites, where each has one rank and scaling."""
    holder = nn.ModuleDict(
        {str(n): standin(find_module(denoiser, site.name), weights=False) for n, site in enumerate(sites)}
    )
    names, model = [f"tuner{number}" for number in range(len(parts))], None
    with torch.random.fork_rng(devices=[]):  # peft's initial values take none of the numbers that dare drops by
        for name, (one, _) in zip(names, parts, strict=True):
            own = one.adapted[sites[0]]
            config = LoraConfig(
                r=own.r[ADAPTER], lora_alpha=own.scaling[ADAPTER] * own.r[ADAPTER], target_modules=r"\d+"
            )
            if model is None:
                model = LoraModel(holder, config, name)
            else:
                model.peft_config[name] = config
                model.inject_adapter(holder, name)
            for number, site in enumerate(sites):
                wrapped: Any = holder[str(number)]
                for theirs, part in zip((wrapped.lora_A, wrapped.lora_B), _pair(one.adapted[site]), strict=True):
                    theirs[name].weight.data.copy_(part)
    assert model is not None
    model.add_weighted_adapter(names, [weight for _, weight in parts], "merged", rule, **options)
    made: dict[Layer, Pair] = {}
    for number, site in enumerate(sites):
        wrapped = holder[str(number)]
        a, b = (part["merged"].weight.detach().clone() for part in (wrapped.lora_A, wrapped.lora_B))
        made[site] = a, wrapped.scaling["merged"] * b
    return made


def _holding(pairs: dict[Layer, Pair], tuners: Sequence[LoRA], denoiser: nn.Module) -> LoRA:
    """A LoRA with these A and B and a scaling of 1."""
    family, configs = family_of(denoiser), [one.config for one in tuners]
    ranks = {site.name: len(a) for site, (a, _) in pairs.items()}
    if len(set(ranks.values())) == 1:
        [rank], ranks = set(ranks.values()), {}
    else:
        rank = max(ranks.values())
        ranks = {name: own for name, own in ranks.items() if own != rank}
    layers = tuple(dict.fromkeys(name for config in configs for name in config.layers or family.adapted))
    config = LoRAConfig(rank=rank, layers=layers, ranks=ranks)
    merged = LoRA.build(config, denoiser, (), tuners[0].vae_scale)
    if merged.adapted.keys() != pairs.keys():
        raise UsageError("the tuners' layers are not those that the base has under their names; give --base.")
    with torch.no_grad():
        for site, (a, b) in pairs.items():
            layer = merged.adapted[site]
            layer.lora_A[ADAPTER].weight.copy_(a)
            layer.lora_B[ADAPTER].weight.copy_(b)
    return merged
