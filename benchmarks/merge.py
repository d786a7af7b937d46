"""Time and error of merging on SD 1.5's shapes: sctool's exact rules, and peft's and sd-mecha's where they do the same.

Three tuners with random weights become one. The error is that of the U-Net's output against the three side by side,
on one noisy image, relative to the change that they make; the time is that of merging alone, one thread, median of
`--repeats`. peft's rows are its own `add_weighted_adapter` on a `PeftModel`; ours call peft layer by layer.

Two fully trained U-Nets become one by task arithmetic, base + sum_i w_i (W_i - base), in sctool and, where it is
installed (`pip install sd-mecha`), in sd-mecha on the same tensors in memory; their error is against that formula,
written out. sd-mecha 1.1.8 takes LoRA files of kohya's form as well, but on SD 1.5 its conversion ends with a
TypeError, so there is no such row.

    OMP_NUM_THREADS=1 python benchmarks/merge.py
    OMP_NUM_THREADS=1 python benchmarks/merge.py --base mini --rank 4
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from sctool.core.backbones.architectures import Architecture, architecture
from sctool.core.exchange.ldm import ldm_name
from sctool.core.exchange.lora import factors_of
from sctool.core.merging.table import find_rule, merged
from sctool.core.sites.attaching import channel, tuned
from sctool.core.tuners import method_config, tuner_class
from sctool.core.tuners.base import Tuner

WEIGHTS = (0.7, 0.5, -0.3)
LINE = "| {} | {} | {} | {:.2f} | {:.1e} | {:.1e} |"


def tuners(
    base: Architecture, method: str, config: dict[str, Any], conditions: Sequence[str] = (), count: int = len(WEIGHTS)
) -> list[Any]:
    """`count` tuners with random weights; with conditions, one for each of them."""
    made, groups = [], [(name,) for name in conditions] or [()] * count
    for seed, own in enumerate(groups):
        torch.manual_seed(seed)
        one = tuner_class(method).build(method_config(method, config), base.denoiser("cpu"), own, base.vae_scale)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(0.05 * parameter.std().nan_to_num().clamp(min=0.1) * torch.randn_like(parameter))
        made.append(one)
    return made


def output(base: Architecture, net: nn.Module, parts: Sequence[Tuner], weights: Sequence[float], side: int) -> Tensor:
    """The U-Net's output for one noisy image, with every condition's map."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, base.config.get("in_channels", 4), side, side, generator=generator)
    rows = base.family.dummy_rows({**net.config}, 1, "cpu")  # type: ignore[dict-item]
    rows = {name: torch.randn(value.shape, generator=generator) for name, value in rows.items()}
    names = {name for part in parts for name in part.conditions}
    pixels = side * base.vae_scale
    hints = {name: torch.rand(1, 3, pixels, pixels, generator=generator) for name in sorted(names)}
    with torch.no_grad(), tuned(net, *parts, scales=list(weights)):
        return base.family.output(net, latents, torch.tensor([500]), rows, channel(hints or None))


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What the work returns, and the median of its seconds."""
    seconds, result = [], None
    for _ in range(repeats):
        result = None  # the last one's memory is free before the next is made
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return result, statistics.median(seconds)


def with_peft(net: nn.Module, loras: Sequence[Any]) -> PeftModel:
    """The U-Net with peft's own adapters, which have the tuners' weights."""
    model: Any = None
    for number, one in enumerate(loras):
        layers = factors_of(one)
        rank = max(own.rank for own in layers.values())
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(layers))
        if model is None:
            model = get_peft_model(net, config, adapter_name="0")  # type: ignore[arg-type]
        else:
            model.add_adapter(str(number), config)
        for name, own in layers.items():
            layer = model.get_base_model().get_submodule(name)
            layer.lora_A[str(number)].weight.data.copy_(own.a)
            layer.lora_B[str(number)].weight.data.copy_(own.b)
    return model.eval()


def by_peft(model: Any, rule: str, rank: int) -> None:
    """peft's own merge of all adapters, which is then the active one."""
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    options = {"svd_rank": rank} if rule.endswith("svd") else {"density": 0.5} if rule == "ties" else {}
    names = [str(number) for number in range(len(WEIGHTS))]
    model.add_weighted_adapter(names, list(WEIGHTS), "merged", combination_type=rule, **options)
    model.set_adapter("merged")


def by_mecha(net: nn.Module, parts: Sequence[Tuner], weights: Sequence[float]) -> dict[str, Tensor]:
    """sd-mecha's base + sum_i w_i (W_i - base) over the original code's names, in memory, as diffusers names it."""
    sd_mecha: Any = import_module("sd_mecha")
    names = {key: f"model.diffusion_model.{_original(key, net)}" for key in net.state_dict()}

    def model(state: Mapping[str, Tensor]) -> Any:
        return sd_mecha.model({names[key]: value for key, value in state.items()}, config="sd1-ldm")

    base = model(net.state_dict())
    recipe = base
    for one, weight in zip(parts, weights, strict=True):
        recipe = recipe + sd_mecha.subtract(model(standins(one, net)), base) * weight
    single = {"threads": 0, "merge_dtype": torch.float32, "output_dtype": torch.float32}
    merged = sd_mecha.merge(recipe, tqdm=partial(tqdm, disable=True), **single)
    return {key: merged[name] for key, name in names.items()}


def _original(key: str, net: nn.Module) -> str:
    layer, _, leaf = key.rpartition(".")
    return f"{ldm_name(layer, net)}.{leaf}"


def standins(one: Any, net: nn.Module) -> dict[str, Tensor]:
    """The U-Net's weights with the tuner's in their place."""
    return {**net.state_dict(), **{name: value.detach() for name, value in one.standins().items()}}


def full_rows(base: Architecture, side: int, repeats: int) -> list[dict[str, Any]]:
    """Task arithmetic over two fully trained U-Nets, by sctool and by sd-mecha."""
    weights, net = WEIGHTS[::2], base.denoiser("cpu")
    parts = tuners(base, "full", {}, count=len(weights))
    alone, wanted = output(base, net, [], [], side), copy.deepcopy(net)
    with torch.no_grad():
        for name, value in wanted.named_parameters():
            value.add_(sum(w * (one.standins()[name] - value) for one, w in zip(parts, weights, strict=True)))
    expected = output(base, wanted, [], [], side)
    effect, rows = (expected - alone).abs().mean().item(), []

    def add(tool: str, state: Mapping[str, Tensor], seconds: float) -> None:
        wanted.load_state_dict(state)
        off = (output(base, wanted, [], [], side) - expected).abs() / effect
        rows.append(
            {"method": f"full, {len(parts)} tuners", "rule": "linear", "tool": tool, "seconds": seconds,
             "largest": off.max().item(), "mean": off.mean().item()}
        )  # fmt: skip

    _, rule = find_rule("full", "linear")
    whole, seconds = timed(lambda: merged(parts, weights, net, rule), repeats)
    add("sctool", standins(whole, net), seconds)
    del whole
    if find_spec("sd_mecha") and base.name == "sd15":
        logging.getLogger().setLevel(logging.ERROR)  # it warns of every key of the text encoder and the autoencoder
        add("sd-mecha", *timed(lambda: by_mecha(net, parts, weights), repeats))
    return rows


def rows_of(base: Architecture, side: int, rank: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each method, rule and tool."""
    cases: list[tuple[str, dict[str, Any], Sequence[str], Sequence[str]]] = [
        ("scedit", {}, (), ("stack",)),
        ("scedit", {}, ("canny", "color"), ("stack",)),
        ("diffscaler", {}, (), ("stack",)),
        ("lora", {"rank": rank, "layers": ["attention"]}, (), ("cat", "svd", "linear", "ties")),
    ]
    rows = []
    for method, config, conditions, rules in cases:
        parts, net = tuners(base, method, config, conditions), base.denoiser("cpu")
        weights = [1.0] * len(parts) if conditions else list(WEIGHTS)
        label = f"{method}, {' and '.join(conditions)}" if conditions else f"{method}, {len(parts)} tuners"
        expected, alone = output(base, net, parts, weights, side), output(base, net, [], [], side)
        effect = (expected - alone).abs().mean().item()

        def add(tool: str, rule: str, found: Tensor, seconds: float) -> None:
            off = (found - expected).abs()  # noqa: B023 - called in this turn of the loop
            rows.append(
                {"method": label, "rule": rule, "tool": tool, "seconds": seconds,  # noqa: B023
                 "largest": off.max().item() / effect, "mean": off.mean().item() / effect}  # noqa: B023
            )  # fmt: skip

        for name in rules:
            _, rule = find_rule(method, name)
            options = {"rank": rank} if name == "svd" else {"density": 0.5} if name == "ties" else {}
            torch.manual_seed(0)
            whole, seconds = timed(lambda: merged(parts, weights, net, rule, **options), repeats)  # noqa: B023
            add("sctool", name, output(base, net, [whole], [1.0], side), seconds)
        if method == "lora":
            model = with_peft(copy.deepcopy(net), parts)
            for name in rules:
                torch.manual_seed(0)
                _, seconds = timed(lambda: by_peft(model, name, rank), repeats)  # noqa: B023
                add("peft", name, output(base, model.get_base_model(), [], [], side), seconds)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and prints a Markdown table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="sd15", help="sd15, sd21, sdxl, mini or a folder; its weights are random")
    parser.add_argument("--side", type=int, default=16, help="latent side of the outputs that are compared")
    parser.add_argument("--rank", type=int, default=16, help="rank of each LoRA, and of svd's result")
    parser.add_argument("--repeats", type=int, default=3, help="merges of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    given = parser.parse_args(arguments)
    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = architecture(given.base)
    rows = rows_of(base, given.side, given.rank, given.repeats) + full_rows(base, given.side, given.repeats)
    if given.json:
        print(json.dumps(rows))
        return 0
    print("| tuners | rule | tool | seconds | largest error | mean error |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for row in rows:
        print(LINE.format(*(row[key] for key in ("method", "rule", "tool", "seconds", "largest", "mean"))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
