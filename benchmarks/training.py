"""What a training step costs: SC-Tuner and CSC-Tuner against full fine-tuning, LoRA (peft) and ControlNet (diffusers).

All use one SD 1.5 U-Net with random weights and are paired in one run. FLOPs and saved activations are exact, counted
on fake tensors at 512 px. Time is process CPU time of forward and backward on one thread, without the optimizer; by
default frozen weights and activations are bfloat16, as in training on a GPU.

With `--base dit-xl-2`: DiffScaler and the other layer methods on DiT-XL/2 at 256 px, also with half of the tokens
masked; counted, not timed.

    python benchmarks/training.py --out docs/benchmarks-training.md
    python benchmarks/training.py --precision fp32 --side 32
    python benchmarks/training.py --no-time            # FLOPs and memory only: a minute, needs little memory
    python benchmarks/training.py --base dit-xl-2 --out docs/benchmarks-dit.md
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sctool.core.backbones.architectures import KNOWN, Architecture, architecture
from sctool.core.config import MemoryLevel
from sctool.core.devices import torch_dtype
from sctool.core.files import write_text
from sctool.core.measure import saved_bytes, without_storage
from sctool.core.sites.attaching import TunedBackbone
from sctool.core.sites.parts import family_of
from sctool.core.training.model import build_model
from sctool.core.tuners import method_config, tuner_class

ATTENTION = r"(to_q|to_k|to_v|to_out\.0)"
WITH_FF = r"(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"
LIMITS = {"FLOPs SC / full": 0.61, "CPU time SC / LoRA attention+FF": 0.75}

Inputs = dict[str, Any]
Step = Callable[[Inputs], Tensor]  # -> prediction (B, C, h, w)


class Method(nn.Module):
    """One way to train: its modules, and the prediction that enters the loss."""

    def __init__(self, net: nn.Module, predict: Step, *extra: nn.Module) -> None:
        super().__init__()
        self.parts, self.predict = nn.ModuleList([net, *extra]), predict

    def step(self, inputs: Inputs) -> None:
        """Forward and backward of the mean squared error."""
        self.predict(inputs).square().mean().backward()

    def trainable(self) -> int:
        """The number of parameters that receive gradients."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


Build = Callable[[Any], Method]


def full(masked: bool = False) -> Build:
    """Every weight of the denoiser; with `masked`, on half of the tokens."""

    def build(net: Any) -> Method:
        model = TunedBackbone(net)
        net.requires_grad_(True)
        return Method(model, lambda i: model(i["latents"], i["t"], i["rows"], None, i["kept"] if masked else None))

    return build


def lora(targets: str) -> Build:
    """peft's LoRA of rank 64 on the layers whose names match, weights in the denoiser's dtype: its fastest form."""

    def build(net: Any) -> Method:
        net.requires_grad_(False).add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=targets))
        return Method(net.to(net.dtype), lambda i: family_of(net).output(net, i["latents"], i["t"], i["rows"]))

    return build


def ours(
    method: str, *conditions: str, fold: bool = True, masked: bool = False, level: MemoryLevel = "plain",
    **settings: object,
) -> Build:  # fmt: skip
    """A method of this project as the trainer runs it: upsampling folded, with `masked` on half of the tokens."""

    def build(net: Any) -> Method:
        tuner = tuner_class(method).build(method_config(method, settings), net, conditions)
        model = build_model(net, tuner, level=level) if fold else TunedBackbone(net, tuner)

        def predict(i: Inputs) -> Tensor:
            hints = {name: i["hint"] for name in conditions} or None
            return model(i["latents"], i["t"], i["rows"], hints, i["kept"] if masked else None)

        return Method(model, predict)

    return build


def controlnet(net: Any) -> Method:
    """diffusers' ControlNet on a frozen U-Net, in the U-Net's dtype."""
    control = ControlNetModel.from_unet(net.requires_grad_(False)).to(net.dtype).requires_grad_(True)

    def predict(i: Inputs) -> Tensor:
        embeds = i["rows"]["prompt_embeds"]
        down, mid = control(i["latents"], i["t"], embeds, controlnet_cond=i["hint"], return_dict=False)
        return net(
            i["latents"],
            i["t"],
            embeds,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]

    return Method(net, predict, control)


METHODS: dict[str, Build] = {
    "full": full(),
    "LoRA r64 attention": lora(rf".*{ATTENTION}$"),
    "LoRA r64 attention+FF": lora(rf".*{WITH_FF}$"),
    "LoRA r64 attention+FF, up_blocks": lora(rf"up_blocks.*{WITH_FF}$"),
    "SC-Tuner": ours("scedit"),
    "SC-Tuner, upsampling not folded": ours("scedit", fold=False),
    "SC-Tuner 1/10": ours("scedit", ratio=0.1),
    "CSC-Tuner k=1": ours("scedit", "hint"),
    "CSC-Tuner k=3": ours("scedit", "hint", kernel=3),
    "ControlNet": controlnet,
}
TUNER, FULL, LORA = "SC-Tuner", "full", "LoRA r64 attention+FF"

DIFFSCALER, HALF = "DiffScaler", "DiffScaler, half of the tokens"
TRANSFORMER_LIMITS = {  # of full fine-tuning's
    DIFFSCALER: {"saved_mb": 1.06, "gflop": 0.75},
    HALF: {"saved_mb": 0.53, "gflop": 0.37},
}
TRANSFORMER_METHODS: dict[str, Build] = {
    "full": full(),
    "full, half of the tokens": full(masked=True),
    DIFFSCALER: ours("diffscaler"),
    HALF: ours("diffscaler", masked=True),
    "DiffScaler, separate q, k and v": ours("diffscaler", qkv="separate"),
    "LoRA r64 attention": ours("lora", rank=64),
    "LoRA r64 attention and MLP": ours("lora", rank=64, layers=["attention", r"ff\."]),
    "LoRA r64, DiffScaler's layers": ours("lora", rank=64, layers=["blocks", "final_norm"]),
    "DiffFit": ours("difffit"),
    "BitFit": ours("bitfit"),
}


def example(base: Architecture, side: int, batch: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random latents (batch, 4, side, side), timesteps, conditioning, a hint at eight times the side, kept tokens."""
    rows = base.family.dummy_rows(base.config, batch, "cpu")
    tokens = side * side // 4
    return {
        "latents": torch.randn(batch, 4, side, side, dtype=dtype),
        "t": torch.randint(0, 1000, (batch,)),
        "rows": {
            name: torch.randn_like(row).to(dtype) if row.is_floating_point() else row for name, row in rows.items()
        },
        "hint": torch.rand(batch, 3, 8 * side, 8 * side, dtype=dtype),
        "kept": torch.arange(tokens // 2).expand(batch, -1),
    }


# ----------------------------------------------------------------------------------------------- exact figures


def counted(base: Architecture, build: Build, side: int, memory: bool = True) -> dict[str, float]:
    """Trainable parameters, GFLOP per step (batch 1), saved activations per sample in MB (batch 2 minus batch 1).

    `memory=False` skips the last. Counted on fake tensors (shapes without storage), float32, eager; weights do not
    count as saved activations.
    """
    with torch.device("meta"):
        method = build(base.denoiser())
    with FakeTensorMode():
        without_storage(method)
        one, two = (example(base, side, batch) for batch in (1, 2))
        saved = [saved_bytes(method, partial(method.predict, inputs)) for inputs in (one, two)] if memory else [0, 0]
        with FlopCounterMode(display=False) as counter:
            method.step(one)
    return {
        "trainable": method.trainable(),
        "gflop": counter.get_total_flops() / 1e9,
        "saved_mb": (saved[1] - saved[0]) / 1e6,
    }


# -------------------------------------------------------------------------------------------------------- time


def timed(base: Architecture, names: list[str], side: int, repeats: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """CPU seconds per step of each method in every repeat; methods alternate, so that load affects them equally.

    All share the storage of one set of frozen weights. The first round is a warm-up and is not measured.
    """
    torch.manual_seed(0)
    source = base.denoiser("cpu").to(dtype).state_dict()
    methods = {}
    for name in names:
        net = base.denoiser("meta")
        net.load_state_dict(source, assign=True)
        methods[name] = METHODS[name](net)
    inputs = example(base, side, 1, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-1, repeats):
        turn = max(repeat, 0) % len(names)
        for name in [*names[turn:], *names[:turn]]:
            start = time.process_time()
            methods[name].step(inputs)
            spent = time.process_time() - start
            methods[name].zero_grad(set_to_none=True)
            if repeat >= 0:
                seconds[name].append(spent)
    return seconds


def paired(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """The median over repeats of the ratio of two methods' times in the same repeat."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


# ------------------------------------------------------------------------------------------------------- report


LORA_NOTE = """
LoRA is measured in its fastest form; it could use a folded decoder too. The [log](log.md) shows how the last ratio
depends on LoRA's precision.
"""


def report(
    figures: dict[str, dict[str, float]], seconds: dict[str, list[float]], protocol: str, arguments: list[str]
) -> str:
    """The figures as a Markdown page, with the command line `arguments` that produced them."""
    head = ["method", "trainable", "GFLOP per step", "vs full", "saved activations per sample (MB)", "vs full"]
    head += ["CPU s per step", "vs full", "vs LoRA attention+FF"] if seconds else []
    lines = ["# What a training step costs", "", f"    python benchmarks/training.py {shlex.join(arguments)}", ""]
    lines += [protocol, ""]
    lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, row in figures.items():
        cells = [name, f"{row['trainable']:,.0f}"]
        for key, form in (("gflop", ",.1f"), ("saved_mb", ",.0f")):
            cells += [format(row[key], form), f"{row[key] / figures[FULL][key]:.3f}"]
        if seconds:
            cells += [f"{statistics.median(seconds[name]):.2f}"]
            cells += [f"{paired(seconds, name, reference):.3f}" for reference in (FULL, LORA)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"* {line}" for line in verdicts(figures, seconds))]
    return "\n".join(lines) + "\n" + (LORA_NOTE if seconds else "")


def verdicts(figures: dict[str, dict[str, float]], seconds: dict[str, list[float]]) -> list[str]:
    """One line per limit: the measured ratio, and whether the limit is met."""
    ratios = {"FLOPs SC / full": figures[TUNER]["gflop"] / figures[FULL]["gflop"]}
    if seconds:
        ratios["CPU time SC / LoRA attention+FF"] = paired(seconds, TUNER, LORA)
    return [
        f"{name}: {value:.3f}, limit {LIMITS[name]}: {'met' if value <= LIMITS[name] else 'MISSED'}"
        for name, value in ratios.items()
    ]


def processor() -> str:
    """The processor's model name, or its architecture where the system does not name it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def measured_how(tiny: bool, precision: str, side: int, repeats: int) -> str:
    """The protocol in words; `precision` is "" when no time was measured."""
    text = (
        f"SD 1.5 U-Net{' (TINY: figures mean nothing)' if tiny else ''}, random weights, eager. FLOPs and saved "
        "activations: float32, 64x64 latents (512 px), batch 1, counted on fake tensors (2 FLOPs per multiply-add; "
        "convolutions, linear layers and attention). The backward pass is the one that autograd runs: no gradients are "
        "computed for frozen weights."
    )
    if precision:
        text += (
            f" Time: {precision}, {side}x{side} latents, batch 1, process CPU time of forward and backward, one thread "
            f"of {processor()}, methods alternating, median of {repeats} paired ratios. All weights have that "
            "precision, except SCEdit's own, which stay in float32 and are cast."
        )
    text += (
        " SCEdit runs on a decoder with folded upsampling, as in `sctool train`, and keeps what autograd keeps "
        "(`memory=plain`); one row is without folding."
    )
    return f"{text} torch {torch.__version__}."


def transformer_page(figures: dict[str, dict[str, float]], arguments: list[str]) -> str:
    """DiT-XL/2's figures as a Markdown page, with the command line `arguments` that produced them."""
    lines = [
        "# What a training step costs on DiT-XL/2",
        "",
        f"    python benchmarks/training.py {shlex.join(arguments)}",
    ]
    lines += ["", TRANSFORMER_PROTOCOL + f" torch {torch.__version__}.", ""]
    lines += ["| method | trainable | GFLOP per step | vs full | saved activations per sample (MB) | vs full |"]
    lines += ["| --- |" + " ---: |" * 5]
    whole = figures[FULL]
    for name, row in figures.items():
        cells = [name, f"{row['trainable']:,.0f}", f"{row['gflop']:,.1f}", f"{row['gflop'] / whole['gflop']:.3f}"]
        cells += [f"{row['saved_mb']:,.0f}", f"{row['saved_mb'] / whole['saved_mb']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"* {line}" for line in transformer_verdicts(figures))]) + "\n"


TRANSFORMER_PROTOCOL = (
    "DiT-XL/2 in diffusers' layout, timestep and class embedders tied, eager. FLOPs and saved activations: float32, "
    "32x32 latents (256 px), 256 tokens, counted on fake tensors (2 FLOPs per multiply-add; convolutions, linear "
    "layers and attention). The backward pass is the one that autograd runs: no gradients are computed for frozen "
    "weights. DiffScaler keeps each layer's input, output and the branch's activations; the rest is recomputed."
)


def transformer_verdicts(figures: dict[str, dict[str, float]]) -> list[str]:
    """One line per limit: the counted ratio to full fine-tuning in two digits, and whether the limit is met."""
    lines = []
    for name, limits in TRANSFORMER_LIMITS.items():
        for key, limit in limits.items():
            value = round(figures[name][key] / figures[FULL][key], 2)
            what = {"saved_mb": "saved activations", "gflop": "FLOPs"}[key]
            lines.append(f"{what}, {name} / full: {value:.2f}, limit {limit}: {'met' if value <= limit else 'MISSED'}")
    return lines


def transformer_main(given: argparse.Namespace, arguments: list[str]) -> int:
    """The benchmark on DiT-XL/2; returns 1 when a limit is missed."""
    base = architecture("dit-xl-2")
    figures = {name: counted(base, build, 32) for name, build in TRANSFORMER_METHODS.items()}
    lines, page = transformer_verdicts(figures), transformer_page(figures, arguments)
    print(json.dumps({"figures": figures, "verdicts": lines}) if given.json else page)
    if given.out:
        write_text(given.out, page)
    return int(any("MISSED" in line for line in lines))


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the page")
    parser.add_argument("--no-time", action="store_true", help="FLOPs and memory only")
    parser.add_argument("--repeats", type=int, default=5, help="number of paired repeats")
    parser.add_argument("--side", type=int, default=64, help="latent side for the timing (64 is 512 px)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="precision for the timing")
    parser.add_argument("--tiny", action="store_true", help="use a tiny U-Net, to test the benchmark itself")
    parser.add_argument("--base", choices=("sd15", "dit-xl-2"), default="sd15")
    given = parser.parse_args(arguments)

    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    if given.base == "dit-xl-2":
        return transformer_main(given, sys.argv[1:] if arguments is None else arguments)
    small = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "attention_head_dim": 4}
    base = Architecture("sd15", {**KNOWN["sd15"], **(small if given.tiny else {})}, 8)
    figures = {name: counted(base, build, 64) for name, build in METHODS.items()}
    seconds = (
        {} if given.no_time else timed(base, list(METHODS), given.side, given.repeats, torch_dtype(given.precision))
    )
    protocol = measured_how(given.tiny, "" if given.no_time else given.precision, given.side, given.repeats)
    page = report(figures, seconds, protocol, sys.argv[1:] if arguments is None else arguments)
    print(
        json.dumps({"figures": figures, "seconds": seconds, "verdicts": verdicts(figures, seconds)})
        if given.json
        else page
    )
    if given.out:
        write_text(given.out, page)
    return int(any("MISSED" in line for line in verdicts(figures, seconds)))


if __name__ == "__main__":
    raise SystemExit(main())
