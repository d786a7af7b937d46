"""What drawing an image costs: with tuners, ControlNet and T2I-Adapter, with `--fast`, and with DeepCache.

All use one U-Net with random weights and guidance (two samples a call) and are paired in one run. FLOPs are exact,
counted on fake tensors; those of an image are sums over its steps, the hint encoded once, text and autoencoder left
out. Times of single calls and of whole images alternate; images are drawn by diffusers' own pipelines. DeepCache
(`pip install DeepCache`) is optional. "between" is a call that reuses the encoder of an earlier one.

    python benchmarks/sampling.py --no-time                      # FLOPs only: two minutes
    python benchmarks/sampling.py --no-images --side 32          # and single calls, on a CPU
    python benchmarks/sampling.py --base mini                    # and whole images, on a CPU
    python benchmarks/sampling.py --device cuda --out docs/benchmarks-sampling.md
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sctool.core.backbones.architectures import KNOWN, Architecture, architecture
from sctool.core.devices import torch_dtype
from sctool.core.fast import STEPS, key_steps
from sctool.core.files import write_text
from sctool.core.measure import without_storage
from sctool.core.sites.attaching import attach, channel
from sctool.core.sites.reuse import reusing
from sctool.core.tuners import method_config, tuner_class
from sctool.core.tuners.controlnet import encoder_widths

INTERVAL = 3
"""DeepCache's: it computes all at every third step."""
SCHEDULERS = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}
CLASSIC, FEW = ("DDIM", 50), ("DPM-Solver++", STEPS)


class Step(int):
    """A timestep that is a number, also where a peer asks a tensor for its item."""

    def item(self) -> int:
        """The number."""
        return int(self)


@dataclass
class Method:
    """A U-Net with what is attached to it. `peer` is diffusers' ControlNet, `helper` DeepCache's."""

    net: Any
    tuner: nn.Module | None = None
    hinted: bool = False
    peer: Any = None
    helper: Any = None

    def modules(self) -> list[nn.Module]:
        """All that has weights."""
        return [module for module in (self.net, self.tuner, self.peer) if module is not None]

    @torch.no_grad()
    def call(self, inputs: dict[str, Tensor], t: Any) -> Tensor:
        """One call for latents (2, C, h, w)."""
        latents, text, more = inputs["latents"], inputs["text"], {}
        if self.hinted:
            more["cross_attention_kwargs"] = channel({"hint": inputs["hint"]})
        if self.peer is not None:
            down, middle = self.peer(latents, t, text, controlnet_cond=inputs["hint"].expand(2, -1, -1, -1), **PLAIN)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.net(latents, t, encoder_hidden_states=text, **PLAIN, **more)[0]


PLAIN = {"return_dict": False}


def ours(method: str | None, *conditions: str) -> Callable[[Architecture, Any], Method]:
    """The base, or a tuner of this project on it."""

    def build(base: Architecture, net: Any) -> Method:
        if method is None:
            return Method(net)
        tuner = tuner_class(method).build(method_config(method, {}), net, conditions, base.vae_scale).eval()
        attach(net, tuner.to(net.dtype))
        return Method(net, tuner, bool(conditions))

    return build


def controlnet(base: Architecture, net: Any) -> Method:
    """diffusers' ControlNet beside the U-Net, as its pipeline calls it."""
    peer = ControlNetModel.from_unet(net, conditioning_embedding_out_channels=encoder_widths(base.vae_scale))
    return Method(net, peer=peer.to(net.device, net.dtype).eval())


def deepcache(base: Architecture, net: Any) -> Method:
    """DeepCache's hooks on the U-Net. Raises `ImportError` where it is not installed."""
    from DeepCache.extension.deepcache import DeepCacheSDHelper  # type: ignore[import-not-found]

    helper = DeepCacheSDHelper(SimpleNamespace(unet=net, scheduler=SimpleNamespace(timesteps=[])))
    helper.set_params(cache_interval=INTERVAL, cache_branch_id=0)
    return Method(net, helper=helper)


DEEPCACHE = f"DeepCache, interval {INTERVAL}"
METHODS: dict[str, Callable[[Architecture, Any], Method]] = {
    "base": ours(None),
    "SC-Tuner": ours("scedit"),
    "CSC-Tuner": ours("scedit", "hint"),
    "ControlNet (diffusers)": controlnet,
    "T2I-Adapter": ours("t2i-adapter", "hint"),
    "ControlNet": ours("controlnet", "hint"),
    DEEPCACHE: deepcache,
}
REUSING = ("base", "SC-Tuner", "CSC-Tuner", "T2I-Adapter", "ControlNet")
"""Those that are also drawn with `--fast`."""


@dataclass(frozen=True)
class Way:
    """One way of drawing an image."""

    method: str
    scheduler: str
    steps: int
    fast: bool = False

    @property
    def keys(self) -> int:
        """The steps at which the encoder runs, their number."""
        if self.method == DEEPCACHE:
            return -(-self.steps // INTERVAL)
        return len(key_steps(self.steps)) if self.fast else self.steps

    def __str__(self) -> str:
        return f"{self.method}{', --fast' if self.fast else ''}: {self.scheduler}, {self.steps} steps"


WAYS = [
    *(Way(name, *how) for name in METHODS if name != "ControlNet" for how in (CLASSIC, FEW)),
    *(Way(name, *FEW, fast=True) for name in REUSING),
]
FIRST = WAYS[0]


def inputs(base: Architecture, side: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Latents and text for guidance of one image, and its hint."""
    config, width = base.config, {"device": device, "dtype": dtype}
    return {
        "latents": torch.zeros(2, config.get("in_channels", 4), side, side, **width),
        "text": torch.zeros(2, 77, config["cross_attention_dim"], **width),
        "hint": torch.ones(1, 3, base.vae_scale * side, base.vae_scale * side, **width),
    }


def reused(method: Method, fast: bool, keys: Sequence[int]) -> AbstractContextManager[Any]:
    """Encoder reuse, for ways that have it."""
    return reusing(method.net, keys) if fast else nullcontext()


# ----------------------------------------------------------------------------------------------------------- FLOPs


@dataclass
class Cost:
    """GFLOP of the first call (which encodes the hint), of a later one, and of one that reuses features."""

    first: float = 0.0
    step: float = 0.0
    between: float | None = None

    def image(self, way: Way) -> float:
        """GFLOP of an image, with guidance."""
        more = way.steps - way.keys
        return self.first + (way.keys - 1) * self.step + (more * self.between if more and self.between else 0)


def counted(base: Architecture, build: Callable[[Architecture, Any], Method], reuses: bool, side: int) -> Cost:
    """GFLOP of the method's calls for two samples."""
    with torch.device("meta"):
        method = build(base, base.denoiser().requires_grad_(False))
    with FakeTensorMode():
        for module in method.modules():
            without_storage(module)
        given = inputs(base, side, "cpu", torch.float32)
        if method.helper:
            method.helper.pipe.scheduler.timesteps = [800, 600]
            method.helper.enable()
            whole, between = (flops(method, given, t) for t in (800, 600))
            return Cost(whole, whole, between)
        cost = Cost(*(flops(method, given, t) for t in (900, 800)))
        if reuses:
            with reusing(method.net, (0,)):
                _, cost.between = (flops(method, given, t) for t in (700, 600))
    return cost


def flops(method: Method, given: dict[str, Tensor], t: int) -> float:
    """GFLOP of one call."""
    with FlopCounterMode(display=False) as counter:
        method.call(given, Step(t))
    return counter.get_total_flops() / 1e9


# ------------------------------------------------------------------------------------------------------------ time


@dataclass
class Bench:
    """All methods with one set of weights, and a pipeline for each."""

    base: Architecture
    side: int
    device: str
    dtype: torch.dtype
    methods: dict[str, Method] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        source = self.base.denoiser("cpu").to(self.device, self.dtype).state_dict()
        for name, build in METHODS.items():
            net: Any = self.base.denoiser("meta")
            net.load_state_dict(source, assign=True)
            try:
                self.methods[name] = build(self.base, net.requires_grad_(False))
            except ImportError:
                continue
        self.inputs = inputs(self.base, self.side, self.device, self.dtype)

    def now(self) -> float:
        """Seconds: of the process on a CPU, of the wall when the GPU is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def calls(self, name: str, reuses: bool) -> float:
        """Seconds of a call; with `reuses`, of one that reuses the encoder."""
        method = self.methods[name]
        with reused(method, reuses, (0,)):
            method.call(self.inputs, 900)
            start = self.now()
            method.call(self.inputs, 800)
            return self.now() - start

    def image(self, way: Way) -> float:
        """Seconds of an image by diffusers' pipeline, as latents."""
        method = self.methods[way.method]
        parts = {name: None for name in ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")}
        scheduler = SCHEDULERS[way.scheduler](steps_offset=1)
        kinds = {"requires_safety_checker": False, "unet": method.net, "scheduler": scheduler}
        if method.peer is not None:
            pipe: Any = StableDiffusionControlNetPipeline(**parts, **kinds, controlnet=method.peer)
        else:
            pipe = StableDiffusionPipeline(**parts, **kinds)
        pipe.vae_scale_factor = self.base.vae_scale
        pipe.set_progress_bar_config(disable=True)
        text, size = self.inputs["text"], self.side * self.base.vae_scale
        given = {"image": self.inputs["hint"]} if method.peer is not None else {}
        given |= {"cross_attention_kwargs": channel({"hint": self.inputs["hint"].clone()})} if method.hinted else {}
        if method.helper:
            method.helper.pipe = pipe
            method.helper.enable()
        start = self.now()
        with reused(method, way.fast, key_steps(way.steps)):
            pipe(
                prompt_embeds=text[:1], negative_prompt_embeds=text[1:], num_inference_steps=way.steps, height=size,
                width=size, output_type="latent", **given,
            )  # fmt: skip
        spent = self.now() - start
        if method.helper:
            method.helper.disable()
        return spent


def in_turns(works: dict[Any, Callable[[], float]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of each piece of work in every repeat, each repeat beginning with another. A warm-up is first."""
    seconds: dict[Any, list[float]] = {name: [] for name in works}
    names = list(works)
    for repeat in range(-1, repeats):
        turn = max(repeat, 0) % len(names)
        for name in [*names[turn:], *names[:turn]]:
            spent = works[name]()
            if repeat >= 0:
                seconds[name].append(spent)
    return seconds


def ratio(seconds: dict[Any, list[float]], name: Any, first: Any) -> float:
    """The median over repeats of a time over the first's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True))


# ---------------------------------------------------------------------------------------------------------- report


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(head) - 1), *lines[1:]])


def steps_table(costs: dict[str, Cost], seconds: dict[tuple[str, bool], list[float]]) -> str:
    """A row a method: one call, and one that reuses the encoder."""
    head, rows, plain = ["call", "GFLOP", "over the base's"], [], ("base", False)
    head += ["s", "over the base's"] if seconds else []
    for name, cost in costs.items():
        for reuses, value in ((False, cost.step), (True, cost.between)):
            if value is not None:
                cells = [f"{name}{', between' if reuses else ''}", f"{value:,.1f}", f"{value / costs['base'].step:.3f}"]
                own = (name, reuses)
                if own in seconds:
                    cells += [f"{statistics.median(seconds[own]):.3g}", f"{ratio(seconds, own, plain):.3f}"]
                rows.append(cells + ["–"] * (len(head) - len(cells)))
    return table(head, rows)


def images_table(costs: dict[str, Cost], seconds: dict[Way, list[float]]) -> str:
    """A row a way: one image."""
    head, rows = ["image", "GFLOP", f"fewer than {FIRST}"], []
    head += ["s", "faster"] if seconds else []
    for way in WAYS:
        if way.method not in costs:
            rows.append([str(way), "not installed", *["–"] * (len(head) - 2)])
            continue
        own = costs[way.method].image(way)
        cells = [str(way), f"{own:,.0f}", f"{costs[FIRST.method].image(FIRST) / own:.2f}x"]
        if seconds:
            cells += [f"{statistics.median(seconds[way]):.3g}", f"{1 / ratio(seconds, way, FIRST):.2f}x"]
        rows.append(cells)
    return table(head, rows)


def protocol(given: argparse.Namespace, base: Architecture, side: int) -> str:
    """How it was measured, in words."""
    text = f"{base.name}{' (TINY: figures mean nothing)' if given.tiny else ''}, random weights, "
    text += f"{side * base.vae_scale} px, guidance. FLOPs: 2 per multiply-add. "
    if not given.no_time:
        gpu = given.device == "cuda"
        where = torch.cuda.get_device_name() if gpu else f"process CPU time, one thread, {platform.machine()}"
        text += f"Time: {given.precision}, {where}, alternating, medians and median paired ratios of {given.repeats}. "
    return text + f"torch {torch.__version__}."


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and prints Markdown, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="sd15", help="sd15, sd21, mini or a folder of their family")
    parser.add_argument("--side", type=int, help="latent side; the base's own when not given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="for times")
    parser.add_argument("--repeats", type=int, default=5, help="number of paired repeats")
    parser.add_argument("--no-time", action="store_true", help="FLOPs only")
    parser.add_argument("--no-images", action="store_true", help="times of single calls only")
    parser.add_argument("--tiny", action="store_true", help="use a tiny U-Net, to test the benchmark itself")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    given = parser.parse_args(arguments)
    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    small = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "attention_head_dim": 4}
    base = Architecture("sd15", {**KNOWN["sd15"], **small}, 8) if given.tiny else architecture(given.base)
    if base.family.name != "sd":
        parser.error(f"--base {given.base}: this compares pipelines of Stable Diffusion 1 and 2.")
    side = given.side or base.family.latent_size(base.config)
    costs: dict[str, Cost] = {}
    for name, build in METHODS.items():
        try:
            costs[name] = counted(base, build, name in REUSING, side)
        except ImportError:
            print(f"{name}: not installed", file=sys.stderr)
    calls: dict[tuple[str, bool], list[float]] = {}
    images: dict[Way, list[float]] = {}
    if not given.no_time:
        bench = Bench(base, side, given.device, torch_dtype(given.precision))
        kinds = [(name, reuses) for name in costs for reuses in (False, True)[: 1 + (name in REUSING)]]
        works = {kind: (lambda kind=kind: bench.calls(*kind)) for kind in kinds if kind[0] != DEEPCACHE}
        calls = in_turns(works, given.repeats)
        if not given.no_images:
            ways = [way for way in WAYS if way.method in costs]
            images = in_turns({way: (lambda way=way: bench.image(way)) for way in ways}, given.repeats)
    arguments = sys.argv[1:] if arguments is None else arguments
    page = f"# What drawing an image costs\n\n    python benchmarks/sampling.py {shlex.join(arguments)}\n\n"
    page += f"{protocol(given, base, side)}\n\n{steps_table(costs, calls)}\n\n{images_table(costs, images)}\n"
    if given.json:
        gflop = {str(way): costs[way.method].image(way) for way in WAYS if way.method in costs}
        print(json.dumps({"gflop": gflop, "seconds": {str(way): spent for way, spent in images.items()}}))
    else:
        print(page)
    if given.out:
        write_text(given.out, page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
