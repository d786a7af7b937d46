"""What a training step costs: SC-Tuner and CSC-Tuner against full fine-tuning, LoRA (peft) and ControlNet (diffusers).

All on one SD 1.5 U-Net with random weights, paired in one run. FLOPs and bytes saved for backward are exact, counted on
fake tensors at 512 px; time is process CPU time of forward and backward on one thread, without the optimizer, by
default with frozen weights and activations in bfloat16, as the trainer runs on a GPU.

    python benchmarks/training.py --out docs/benchmarks-training.md
    python benchmarks/training.py --precision fp32 --side 32
    python benchmarks/training.py --no-time            # FLOPs and bytes only: a minute, little memory
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sctool.core.backbones.architectures import KNOWN, Architecture
from sctool.core.backbones.upsampling import fold_upsampling
from sctool.core.config import SCEditConfig
from sctool.core.devices import torch_dtype
from sctool.core.files import write_text
from sctool.core.measure import saved_bytes
from sctool.core.sites.attaching import TunedBackbone
from sctool.core.tuners.scedit import SCEdit

ATTENTION = r"(to_q|to_k|to_v|to_out\.0)"
WITH_FF = r"(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"
LIMITS = {"FLOPs SC / full": 0.61, "CPU time SC / LoRA attention+FF": 0.75}

Inputs = dict[str, Tensor]
Step = Callable[[Inputs], Tensor]  # -> prediction (B, 4, h, w)


class Method(nn.Module):
    """One way to train: its modules, and the prediction that a loss is taken of."""

    def __init__(self, net: nn.Module, predict: Step, *extra: nn.Module) -> None:
        super().__init__()
        self.parts, self.predict = nn.ModuleList([net, *extra]), predict

    def step(self, inputs: Inputs) -> None:
        """Forward and backward of the mean squared error."""
        (self.predict(inputs) - inputs["latents"]).square().mean().backward()

    def trainable(self) -> int:
        """Parameters that get gradients."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def plain(net: UNet2DConditionModel) -> Step:
    """The U-Net's own forward pass."""
    return lambda i: net(i["latents"], i["t"], i["embeds"], return_dict=False)[0]


def full(net: UNet2DConditionModel) -> Method:
    """Every weight of the U-Net."""
    return Method(net.requires_grad_(True), plain(net))


def lora(targets: str) -> Callable[[UNet2DConditionModel], Method]:
    """Peft's LoRA of rank 64 on the layers whose names match, its weights in the U-Net's dtype: its fastest form."""

    def build(net: UNet2DConditionModel) -> Method:
        net.requires_grad_(False).add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=targets))
        return Method(net.to(net.dtype), plain(net))

    return build


def scedit(*conditions: str, fold: bool = True, **settings: object) -> Callable[[UNet2DConditionModel], Method]:
    """SC-Tuner, or CSC-Tuner with conditions, on a U-Net whose upsampling is folded as the trainer does it."""

    def build(net: UNet2DConditionModel) -> Method:
        tuner = SCEdit.build(SCEditConfig(**settings), net, conditions)
        model = TunedBackbone(net, tuner)
        if fold:
            fold_upsampling(net)
        names = dict.fromkeys(conditions)
        return Method(
            model,
            lambda i: model(
                i["latents"], i["t"], {"prompt_embeds": i["embeds"]}, {name: i["hint"] for name in names} or None
            ),
        )

    return build


def controlnet(net: UNet2DConditionModel) -> Method:
    """Diffusers' ControlNet on a frozen U-Net, in the U-Net's dtype."""
    control = ControlNetModel.from_unet(net.requires_grad_(False)).to(net.dtype).requires_grad_(True)

    def predict(i: Inputs) -> Tensor:
        down, mid = control(i["latents"], i["t"], i["embeds"], controlnet_cond=i["hint"], return_dict=False)
        return net(
            i["latents"],
            i["t"],
            i["embeds"],
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]

    return Method(net, predict, control)


METHODS: dict[str, Callable[[UNet2DConditionModel], Method]] = {
    "full": full,
    "LoRA r64 attention": lora(rf".*{ATTENTION}$"),
    "LoRA r64 attention+FF": lora(rf".*{WITH_FF}$"),
    "LoRA r64 attention+FF, up_blocks": lora(rf"up_blocks.*{WITH_FF}$"),
    "SC-Tuner": scedit(),
    "SC-Tuner, upsampling not folded": scedit(fold=False),
    "SC-Tuner 1/10": scedit(ratio=0.1),
    "CSC-Tuner k=1": scedit("hint"),
    "CSC-Tuner k=3": scedit("hint", kernel=3),
    "ControlNet": controlnet,
}
TUNER, FULL, LORA = "SC-Tuner", "full", "LoRA r64 attention+FF"


def example(side: int, batch: int, width: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random inputs for latents (batch, 4, side, side) and their hint of eight times the side."""
    return {
        "latents": torch.randn(batch, 4, side, side, dtype=dtype),
        "t": torch.randint(0, 1000, (batch,)),
        "embeds": torch.randn(batch, 77, width, dtype=dtype),
        "hint": torch.rand(batch, 3, 8 * side, 8 * side, dtype=dtype),
    }


# ----------------------------------------------------------------------------------------------- exact figures


def counted(
    base: Architecture, build: Callable[[UNet2DConditionModel], Method], side: int, memory: bool = True
) -> dict[str, float]:
    """Trainable parameters, GFLOP of a step (batch 1), MB saved for backward per sample (batch 2 minus 1)

    `memory` off leaves the last out. On fake tensors (shapes without storage), float32, eager; weights are not
    counted as saved.
    """
    with torch.device("meta"):
        method = build(base.denoiser())
    with FakeTensorMode():
        for module in method.modules():  # meta weights would take attention's slow path, fake CPU ones the real one
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(p.shape), p.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        one, two = (example(side, batch, base.config["cross_attention_dim"]) for batch in (1, 2))
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
    """CPU seconds of each method's step in every repeat; the methods take turns, so that load falls on all alike.

    All share the storage of one set of frozen weights. A first, unmeasured round warms up.
    """
    torch.manual_seed(0)
    source = base.denoiser("cpu").to(dtype).state_dict()
    methods = {}
    for name in names:
        net = base.denoiser("meta")
        net.load_state_dict(source, assign=True)
        methods[name] = METHODS[name](net)
    inputs = example(side, 1, base.config["cross_attention_dim"], dtype)
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
    """The median over repeats of one method's time over another's in the same repeat."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


# ------------------------------------------------------------------------------------------------------- report


def report(figures: dict[str, dict[str, float]], seconds: dict[str, list[float]], protocol: str) -> str:
    """The figures as a Markdown page."""
    head = ["method", "trainable", "GFLOP per step", "vs full", "saved MB per sample", "vs full"]
    head += ["CPU s per step", "vs full", "vs LoRA attention+FF"] if seconds else []
    lines = ["# What a training step costs", "", protocol, ""]
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
    return "\n".join(lines) + "\n"


def verdicts(figures: dict[str, dict[str, float]], seconds: dict[str, list[float]]) -> list[str]:
    """One line a limit: what was measured, and whether it holds."""
    found = {"FLOPs SC / full": figures[TUNER]["gflop"] / figures[FULL]["gflop"]}
    if seconds:
        found["CPU time SC / LoRA attention+FF"] = paired(seconds, TUNER, LORA)
    return [
        f"{name}: {value:.3f}, limit {LIMITS[name]}: {'met' if value <= LIMITS[name] else 'MISSED'}"
        for name, value in found.items()
    ]


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; gives 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the page")
    parser.add_argument("--no-time", action="store_true", help="FLOPs and bytes only")
    parser.add_argument("--repeats", type=int, default=5, help="paired repeats")
    parser.add_argument("--side", type=int, default=64, help="latent side for the timed part (64 is 512 px)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the timed part")
    parser.add_argument("--tiny", action="store_true", help="a tiny U-Net, to try the benchmark itself")
    given = parser.parse_args(arguments)

    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    small = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "attention_head_dim": 4}
    base = Architecture("sd15", {**KNOWN["sd15"], **(small if given.tiny else {})}, 8)
    figures = {name: counted(base, build, 64) for name, build in METHODS.items()}
    seconds = (
        {} if given.no_time else timed(base, list(METHODS), given.side, given.repeats, torch_dtype(given.precision))
    )
    protocol = (
        f"SD 1.5 U-Net{' (TINY: figures mean nothing)' if given.tiny else ''}, random weights, eager. FLOPs "
        "and bytes: float32, 64x64 latents (512 px), batch 1, counted on fake tensors (2 FLOPs a multiply-add; "
        "convolutions, linear layers and attention). Backward as autograd really runs it: frozen weights get no "
        "gradients."
    )
    if seconds:
        protocol += (
            f" Time: {given.precision}, {given.side}x{given.side} latents, batch 1, process CPU time of forward and "
            f"backward, one thread of {processor()}, methods in turn, median of {given.repeats} paired ratios. All "
            "weights in that precision, but for SCEdit, which keeps its own in float32 and casts them."
        )
    protocol += " SCEdit runs on a decoder whose upsampling is folded, as `sctool train` does it; one row is without."
    protocol += f" torch {torch.__version__}."
    page = report(figures, seconds, protocol)
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
