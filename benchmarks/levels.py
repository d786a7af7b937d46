"""What each level of memory costs: SC-Tuner and CSC-Tuner on SD 1.5 with `memory=plain` to `memory=minimum`.

On a CPU: bytes saved for backward and at the peak, and FLOPs, counted on fake tensors at 512 px in bfloat16; and the
process CPU time of forward and backward, levels alternating with eager mode (`plain`) in one run.

With `--device cuda`: peak memory and time of a whole step with fused AdamW at batch 32, methods alternating, beside
full fine-tuning, LoRA (peft) and ControlNet (diffusers), with the goals that the project has set itself.

    python benchmarks/levels.py --out docs/benchmarks-memory.md
    python benchmarks/levels.py --device cuda --out docs/benchmarks-gpu.md
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))

from training import METHODS, Build, Method, example, ours, paired, processor

from sctool.core.backbones.architectures import KNOWN, Architecture
from sctool.core.config import LEVELS
from sctool.core.devices import torch_dtype
from sctool.core.files import write_text
from sctool.core.measure import LiveBytes, saved_bytes

OURS: dict[str, Build] = {
    f"{name}, {level}": ours("scedit", *conditions, level=level)
    for name, conditions in (("SC-Tuner", ()), ("CSC-Tuner k=1", ("hint",)))
    for level in LEVELS
}
LIMITS = {"normal": 330, "low": 220, "lower": 165, "minimum": 65}
"""MB that SC-Tuner may save for an image."""
PEERS = ("full", "LoRA r64 attention", "LoRA r64 attention+FF", "ControlNet")
GB_GOALS = {
    "SC-Tuner, normal": 16.0, "SC-Tuner, low": 12.0, "SC-Tuner, minimum": 9.0, "CSC-Tuner k=1, normal": 17.5,
}  # fmt: skip
"""Peak GB at batch 32."""
TIME_GOALS = [
    ("SC-Tuner, normal", "full", 0.68), ("SC-Tuner, normal", "LoRA r64 attention", 0.80),
    ("SC-Tuner, normal", "LoRA r64 attention+FF", 0.72), ("CSC-Tuner k=1, normal", "ControlNet", 0.72),
    ("SC-Tuner, low", "SC-Tuner, normal", 1.05), ("SC-Tuner, minimum", "SC-Tuner, normal", 1.35),
]  # fmt: skip
"""Time of one over that of the other, at most."""
IMAGES_PER_SECOND = 120.0
"""Of SC-Tuner with memory=normal, at least, on one H200."""


def eager_of(name: str) -> str:
    """The row that a level is compared to: the same method in plain eager mode."""
    return f"{name.rsplit(', ', 1)[0]}, plain"


# ----------------------------------------------------------------------------------------------- exact figures


def counted(base: Architecture, build: Build, side: int) -> dict[str, float]:
    """MB saved and MB at the peak for one more image (batch 2 minus batch 1), and GFLOP of a step on one image.

    Fake tensors; the denoiser in bfloat16, the tuner in float32.
    """
    with torch.device("meta"):
        method = build(base.denoiser().to(torch.bfloat16))
    with FakeTensorMode():
        twin: Any = fake_twins(method)
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        one, two = (example(base, side, batch, torch.bfloat16) for batch in (1, 2))
        saved, peaks = [], []
        for inputs in (one, two):
            saved.append(saved_bytes(twin, partial(twin.predict, inputs)))
            with LiveBytes() as live:
                twin.step(inputs)
            peaks.append(live.peak)
        with FlopCounterMode(display=False) as counter:
            twin.step(one)
    flops = counter.get_total_flops() / 1e9
    return {"saved_mb": (saved[1] - saved[0]) / 1e6, "peak_mb": (peaks[1] - peaks[0]) / 1e6, "gflop": flops}


def fake_twins(method: Method) -> Method:
    """The method with weights that have no storage; each keeps its precision."""
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    for module in method.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fakes.setdefault(p, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
                module._parameters[name] = fakes[p]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return method


# -------------------------------------------------------------------------------------------------------- time


def on_one_base(base: Architecture, builds: dict[str, Build], device: str, dtype: torch.dtype) -> dict[str, Method]:
    """The methods, each on a denoiser of its own that shares the storage of one set of frozen weights."""
    torch.manual_seed(0)
    source = {name: value.to(device) for name, value in base.denoiser("cpu").to(dtype).state_dict().items()}
    methods = {}
    for name, build in builds.items():
        net = base.denoiser("meta")
        net.load_state_dict(source, assign=True)
        methods[name] = build(net).to(device)
    return methods


def cpu_seconds(base: Architecture, side: int, repeats: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """CPU seconds of a step of each level in every repeat; levels alternate. The first round is a warm-up."""
    methods, inputs = on_one_base(base, OURS, "cpu", dtype), example(base, side, 1, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(-1, repeats):
        turn = max(repeat, 0) % len(methods)
        names = list(methods)
        for name in [*names[turn:], *names[:turn]]:
            start = time.process_time()
            methods[name].step(inputs)
            spent = time.process_time() - start
            methods[name].zero_grad(set_to_none=True)
            if repeat >= 0:
                seconds[name].append(spent)
    return seconds


class GpuStep:
    """Whole steps of one method on a GPU: forward, backward, fused AdamW."""

    def __init__(self, base: Architecture, build: Build, batch: int, side: int) -> None:
        torch.manual_seed(0)
        self.method = build(base.denoiser("cuda").to(torch.bfloat16)).to("cuda", memory_format=torch.channels_last)
        trained = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-5, fused=True)
        self.inputs: Any = moved(example(base, side, batch, torch.bfloat16))

    def __call__(self) -> float:
        """Seconds of one step."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.method.step(self.inputs)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def moved(value: Any) -> Any:
    """Tensors in any nesting of dicts, on the GPU."""
    return {key: moved(part) for key, part in value.items()} if isinstance(value, dict) else value.to("cuda")


def gpu_figures(
    base: Architecture, builds: dict[str, Build], batch: int, side: int, repeats: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Peak GB of each method alone, and seconds of a step in every repeat.

    Methods alternate on weights of their own, two at a time on the card: each is paired with the one that it is
    compared to, so that both meet the same clock.
    """
    peaks: dict[str, float] = {}
    for name, build in builds.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = GpuStep(base, build, batch, side)
        for _ in range(3):
            step()
        peaks[name] = torch.cuda.max_memory_allocated() / 1e9
        del step
    seconds: dict[str, list[float]] = {}
    for one, other in {*[(a, b) for a, b, _ in TIME_GOALS], *[(name, eager_of(name)) for name in OURS]}:
        if one == other or one not in builds or other not in builds:
            continue
        torch.cuda.empty_cache()
        steps = {name: GpuStep(base, builds[name], batch, side) for name in (one, other)}
        for repeat in range(-2, repeats):
            for name in (one, other) if repeat % 2 else (other, one):
                spent = steps[name]()
                if repeat >= 0:
                    seconds.setdefault(f"{name} | {one} / {other}", []).append(spent)
        del steps
    return peaks, seconds


def gpu_ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """The median ratio of the two methods' times in the same repeat."""
    pair = (seconds[f"{name} | {one} / {other}"] for name in (one, other))
    return statistics.median(a / b for a, b in zip(*pair, strict=True))


# ------------------------------------------------------------------------------------------------------- pages


def page(title: str, arguments: list[str], protocol: str, table: list[list[str]], verdicts: list[str]) -> str:
    """A Markdown page: the command, the protocol, the table, a line for each limit."""
    lines = [f"# {title}", "", f"    python benchmarks/levels.py {shlex.join(arguments)}", "", protocol, ""]
    lines += ["| " + " | ".join(table[0]) + " |", "| --- |" + " ---: |" * (len(table[0]) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in table[1:]]
    return "\n".join([*lines, "", *(f"* {line}" for line in verdicts)]) + "\n"


def verdict(name: str, value: float, limit: float, unit: str = "", at_least: bool = False) -> str:
    """A measured value, its limit, and whether it is met."""
    met = value >= limit if at_least else value <= limit
    bound = "at least" if at_least else "limit"
    return f"{name}: {value:.3g}{unit}, {bound} {limit:g}{unit}: {'met' if met else 'MISSED'}"


def cpu_page(given: argparse.Namespace, arguments: list[str], base: Architecture) -> tuple[str, list[str], Any]:
    """The page of counts and CPU times, its verdicts and its figures."""
    figures = {name: counted(base, build, 64) for name, build in OURS.items()}
    dtype = torch_dtype(given.precision)
    seconds = {} if given.no_time else cpu_seconds(base, given.side, given.repeats, dtype)
    head = ["method and level", "saved per image (MB)", "at the peak (MB)", "GFLOP per step", "vs plain"]
    table = [head + (["CPU s per step", "vs plain"] if seconds else [])]
    for name, row in figures.items():
        cells = [name, f"{row['saved_mb']:.0f}", f"{row['peak_mb']:.0f}", f"{row['gflop']:,.1f}"]
        cells.append(f"{row['gflop'] / figures[eager_of(name)]['gflop']:.3f}")
        if seconds:
            cells += [f"{statistics.median(seconds[name]):.2f}", f"{paired(seconds, name, eager_of(name)):.3f}"]
        table.append(cells)
    lines = [
        verdict(f"saved by SC-Tuner, {level}", figures[f"SC-Tuner, {level}"]["saved_mb"], limit, " MB")
        for level, limit in LIMITS.items()
    ]
    protocol = (
        "SD 1.5 U-Net, random weights, eager; `plain` is what autograd keeps. Bytes and FLOPs: 64x64 latents (512 px), "
        "frozen weights and activations in bfloat16, counted on fake tensors; bytes for one more image in the batch."
    )
    if seconds:
        protocol += (
            f" Time: {given.precision}, {given.side}x{given.side} latents, batch 1, process CPU time of forward and "
            f"backward, one thread of {processor()}, levels alternating, median of {given.repeats} paired ratios."
        )
    text = page("What the levels of memory cost", arguments, f"{protocol} torch {torch.__version__}.", table, lines)
    return text, lines, {"figures": figures, "seconds": seconds}


def gpu_page(given: argparse.Namespace, arguments: list[str], base: Architecture) -> tuple[str, list[str], Any]:
    """The page of a GPU, its verdicts and its figures."""
    builds = {**{name: METHODS[name] for name in PEERS}, **OURS}
    peaks, seconds = gpu_figures(base, builds, given.batch, given.side, given.repeats)
    table = [["method", "peak (GB)", "goal (GB)", "s per step", "vs plain"]]
    for name, peak in peaks.items():
        own = [value for key, values in seconds.items() if key.startswith(f"{name} | ") for value in values]
        ratio = "" if name not in OURS or name == eager_of(name) else f"{gpu_ratio(seconds, name, eager_of(name)):.3f}"
        goal = f"{GB_GOALS[name]:g}" if name in GB_GOALS else ""
        table.append([name, f"{peak:.2f}", goal, f"{statistics.median(own):.4f}" if own else "", ratio])
    lines = [verdict(f"peak, {name}", peaks[name], goal, " GB") for name, goal in GB_GOALS.items()]
    lines += [verdict(f"time, {a} / {b}", gpu_ratio(seconds, a, b), limit) for a, b, limit in TIME_GOALS]
    normal = next(values for key, values in seconds.items() if key.startswith("SC-Tuner, normal | "))
    rate = given.batch / statistics.median(normal)
    lines.append(verdict("images per second, SC-Tuner, normal", rate, IMAGES_PER_SECOND, at_least=True))
    protocol = (
        f"SD 1.5 U-Net, random weights, eager, {given.side}x{given.side} latents, batch {given.batch}, bfloat16 "
        f"(SCEdit's own weights in float32), on {torch.cuda.get_device_name()}. A step is forward, backward and "
        "fused AdamW on latents and text that are encoded already. Peak: torch.cuda.max_memory_allocated, each method "
        f"alone. Time: two methods in turns, median of {given.repeats} paired ratios. Goals are for one H200 at batch "
        f"32. torch {torch.__version__}."
    )
    return page("Training on a GPU", arguments, protocol, table, lines), lines, {"peaks_gb": peaks, "seconds": seconds}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the page")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=32, help="images per step on the GPU")
    parser.add_argument("--no-time", action="store_true", help="counts only (on a CPU)")
    parser.add_argument("--repeats", type=int, default=5, help="number of paired repeats")
    parser.add_argument("--side", type=int, default=64, help="latent side for the timing (64 is 512 px)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="precision for the CPU's timing")
    parser.add_argument("--tiny", action="store_true", help="use a tiny U-Net, to test the benchmark itself")
    given = parser.parse_args(arguments)
    diffusers_logging.set_verbosity_error()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use.")
    small = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "attention_head_dim": 4}
    base = Architecture("sd15", {**KNOWN["sd15"], **(small if given.tiny else {})}, 8)
    words = sys.argv[1:] if arguments is None else arguments
    if given.device == "cpu":
        torch.set_num_threads(1)
    text, lines, figures = (gpu_page if given.device == "cuda" else cpu_page)(given, words, base)
    print(json.dumps({**figures, "verdicts": lines}) if given.json else text)
    if given.out:
        write_text(given.out, text)
    return int(any("MISSED" in line for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
