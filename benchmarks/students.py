"""What a call of a student's denoiser costs, against its teacher's: low-rank layers thin, multiplied out, and mixed.

The rows alternate in one run. "fastest" has each layer in the form that is faster here, as `sctool distill --fastest`
writes it. Weights do not matter for time: they are random, and the ranks those of `--ratio 0.4225`, but for the row
"budget", whose ranks come from an embedded base's weights. A batch of n images with guidance is a call for 2 n.

    OMP_NUM_THREADS=1 python benchmarks/students.py
    OMP_NUM_THREADS=1 python benchmarks/students.py --base sd15 --batch 1 --repeats 5
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from functools import partial
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sctool.core.backbones.architectures import KNOWN, Architecture, architecture
from sctool.core.backbones.thin import make_dense, make_thin
from sctool.core.config import StudentConfig
from sctool.core.distilling.counting import RATIO
from sctool.core.distilling.factorising import layers_to_divide
from sctool.core.distilling.fastest import fastest
from sctool.core.distilling.pruning import pruned
from sctool.core.distilling.ranks import by_ratio
from sctool.core.errors import DoesNotFit


def students(base: Architecture) -> dict[str, nn.Module]:
    """The teacher first, then its students, by the names of the rows. Low-rank ones are thin."""
    rows = {"the base": base.denoiser("cpu")}
    ranks = by_ratio(layers_to_divide(base.denoiser()), RATIO)
    rows[f"ratio {RATIO}"] = make_thin(base.denoiser("cpu"), ranks)
    rows[f"ratio {RATIO}, spatial"] = make_thin(
        base.denoiser("cpu"), by_ratio(layers_to_divide(base.denoiser()), RATIO, "spatial"), "spatial"
    )
    if base.name not in KNOWN:
        from sctool.core.backbones.loading import load_backbone
        from sctool.core.distilling.making import plan

        own = plan(load_backbone(base.name), StudentConfig(budget=RATIO, start="whitened"))
        rows[f"budget {RATIO}, whitened"] = make_thin(base.denoiser("cpu"), own.ranks)
    for size in ("base", "small", "tiny"):
        try:
            rows[f"blocks removed: {size}"] = pruned(base.denoiser("cpu"), base.family, size)
        except DoesNotFit:
            continue
    return rows


def with_forms(base: Architecture, batch: int) -> dict[str, nn.Module]:
    """`students`, each low-rank one also multiplied out and with the faster form of each layer."""
    rows: dict[str, nn.Module] = {}
    for name, denoiser in students(base).items():
        rows[name] = denoiser
        if name.startswith(("ratio", "budget")):
            rows[f"{name}, multiplied out"] = make_dense(copy.deepcopy(denoiser))
            rows[f"{name}, fastest"] = fastest(denoiser, partial(call, base, batch))
    return rows


@torch.no_grad()
def call(base: Architecture, batch: int, denoiser: nn.Module, device: str = "cpu") -> Tensor:
    """One call of a denoiser for a batch with guidance."""
    config: Any = denoiser.config
    side = base.family.latent_size(config)
    latents = torch.zeros(2 * batch, config["in_channels"], side, side, device=device)
    rows = base.family.dummy_rows(config, 2 * batch, device)
    return base.family.output(denoiser, latents, torch.zeros(2 * batch, device=device), rows)


def counted(base: Architecture, denoiser: nn.Module) -> tuple[int, float]:
    """Parameters, and GFLOPs of a call for one image without guidance."""
    twin = copy.deepcopy(denoiser).to("meta")
    with FlopCounterMode(display=False) as counter:
        call(base, 1, twin, "meta")
    return sum(p.numel() for p in denoiser.parameters()), counter.get_total_flops() / 2 / 1e9


def timed(base: Architecture, rows: dict[str, nn.Module], batch: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of a call in every repeat; rows alternate, each repeat beginning with another. A warm-up is first."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    names = list(rows)
    for repeat in range(-1, repeats):
        turn = max(repeat, 0) % len(names)
        for name in [*names[turn:], *names[:turn]]:
            began = time.process_time()
            call(base, batch, rows[name])
            if repeat >= 0:
                seconds[name].append(time.process_time() - began)
    return seconds


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and prints a Markdown table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mini", help="mini, mini-dit, sd15, sd21, ... or a folder")
    parser.add_argument("--batch", type=int, default=8, help="images of a batch with guidance")
    parser.add_argument("--repeats", type=int, default=30, help="number of paired repeats")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    given = parser.parse_args(arguments)
    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = architecture(given.base)
    rows = with_forms(base, given.batch)
    counts = {name: counted(base, denoiser) for name, denoiser in rows.items()}
    seconds = timed(base, rows, given.batch, given.repeats)
    figures: dict[str, dict[str, float]] = {}
    for name, (parameters, gflop) in counts.items():
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["the base"], strict=True))
        figures[name] = {
            "parameters": parameters, "gflop": gflop, "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios), "low": ratios[len(ratios) // 4], "high": ratios[-1 - len(ratios) // 4],
        }  # fmt: skip
    if given.json:
        print(json.dumps(figures))
        return 0
    print("| student | parameters | GFLOP per image | CPU s per call | against the base (middle half) |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, row in figures.items():
        spread = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        print(f"| {name} | {row['parameters']:,} | {row['gflop']:.3g} | {row['seconds']:.3g} | {spread} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
