"""What fast sampling costs in quality: images of the same prompts, hints and seeds, drawn in several ways.

Each way is SCHEDULER:STEPS, or SCHEDULER:STEPS:KEYS with the steps at which the encoder runs: numbers such as 0.1.4.9,
or N or N^P for N steps, the k-th at the share (k/N)^P of all. "fast" is what `--fast` draws, and
deepcache:SCHEDULER:STEPS:INTERVAL is DeepCache (`pip install DeepCache`). The ways alternate from batch to batch, and
the first is what the others are compared to. FLOPs are counted on the U-Net; time is process CPU time, decoding
included. Images, figures and a sheet are written to --out.

    sctool annotate CLOTHING --cond canny --size crop:mini --out work/clothing
    OMP_NUM_THREADS=1 python benchmarks/fast.py --data work/clothing --out work/fast
    OMP_NUM_THREADS=1 python benchmarks/fast.py --data work/clothing --split validation --count 100 --out work/sweep \
        dpm++:20 dpm++:20:10 dpm++:20:7 dpm++:20:5 dpm++:20:4 dpm++:20:7^1.5 fast
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from sctool.annotators.training_sets import open_training_sets
from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.checkpoint import load_tuner, tuner_file
from sctool.core.config import SampleConfig, TrainConfig
from sctool.core.devices import best_device
from sctool.core.fast import with_fast
from sctool.core.files import write_text
from sctool.core.progress import Progress
from sctool.core.resolving import resolve_config
from sctool.core.sampling import Request, batched, sample_images, sampling_protocol, write_samples
from sctool.core.sites.attaching import tuned
from sctool.eval.evaluate import evaluate
from sctool.eval.heldout import reference_and_hints, side_by_side
from sctool.eval.options import Options
from sctool.eval.report.tables import number
from sctool.eval.results import FolderResults

WAYS = ("ddim:50", "dpm++:20", "fast", "dpm++:16")
SHOWN = 8


@dataclass
class Way:
    """One way of drawing, the images drawn so far, and what they cost."""

    name: str
    config: SampleConfig
    interval: int = 0
    """DeepCache's; 0 without it."""
    images: list[np.ndarray] = field(default_factory=list)
    flops: float = 0
    seconds: float = 0


def parse(text: str, guidance: float, batch: int) -> Way:
    """The way that the text names."""
    flags: dict[str, Any] = {"guidance": guidance, "batch": batch}
    name, interval = text.replace(":", "-"), 0
    if text.startswith("deepcache:"):
        _, *parts, last = text.split(":")
        text, interval = ":".join(parts), int(last)
    if text == "fast":
        flags = with_fast(flags)
    else:
        scheduler, steps, *keys = text.split(":")
        flags |= {"scheduler": scheduler, "steps": int(steps)}
        if keys:
            flags["key_steps"] = spread(keys[0], int(steps))
    return Way(name, resolve_config(SampleConfig, flags=flags), interval)


def spread(text: str, steps: int) -> tuple[int, ...]:
    """The steps 0.1.4.9; or N of `steps`, the k-th at their share (k/N)^P: evenly for P = 1, early for larger P."""
    count, _, power = text.partition("^")
    if "." in count:
        return tuple(map(int, count.split(".")))
    exponent = float(power or 1)
    return tuple(int(steps * (number / int(count)) ** exponent) for number in range(int(count)))


def requests(config: TrainConfig, backbone: Backbone, split: str, count: int) -> list[Request]:
    """Captions of the split's first images with hints and references; image i has seed i."""
    prompt = backbone.family.prompt_rule("", config.caption)
    source, _, _ = open_training_sets(config, backbone.resolution, prompt=prompt, quiet=True)
    records = [record for record in source.records if record.split == split][:count]
    drawn = []
    for seed, record in enumerate(records):
        reference, hints, maps = reference_and_hints(record, config.conditions, backbone.resolution)
        drawn.append(Request(prompt(record), seed, hints, reference, record.key, record.label, maps))
    return drawn


@contextmanager
def deepcache(backbone: Backbone, way: Way) -> Iterator[None]:
    """DeepCache's hooks on the pipeline, for the ways that are its."""
    if not way.interval:
        yield
        return
    from DeepCache.extension.deepcache import DeepCacheSDHelper  # type: ignore[import-not-found]

    helper = DeepCacheSDHelper(backbone.pipe)
    helper.set_params(cache_interval=way.interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def draw(backbone: Backbone, ways: Sequence[Way], batch: list[Request]) -> None:
    """One batch in every way, with time and FLOPs."""
    for way in ways:
        began = time.process_time()
        with deepcache(backbone, way):
            way.images += [image for _, image in sample_images(backbone, batch, way.config)]
        way.seconds += time.process_time() - began


def counted(backbone: Backbone, ways: Sequence[Way], batch: list[Request]) -> None:
    """GFLOPs for one image, without those of the autoencoder's decoder."""
    for way in ways:
        with deepcache(backbone, way), FlopCounterMode(display=False) as counter:
            list(sample_images(backbone, batch[:1], way.config))
        total = sum(counter.get_flop_counts().get(type(backbone.denoiser).__name__, {}).values())
        way.flops = total / 1e9


def how(backbone: Backbone, way: Way, tuners: list[dict[str, Any]]) -> dict[str, Any]:
    """The protocol of a way's images."""
    more = {"deepcache": way.interval} if way.interval else {}
    return {**sampling_protocol(backbone, way.config, tuners), **more}


def written(folder: Path, requests: list[Request], protocol: dict[str, Any], images: list[np.ndarray]) -> Path:
    """The way's images as `sctool sample` writes them."""
    pairs: Iterator[tuple[Request, np.ndarray]] = zip(requests, images, strict=True)
    write_samples(folder, pairs, protocol)
    return folder


def difference(own: FolderResults, first: FolderResults, key: str) -> tuple[float, float]:
    """The mean over images of the difference to the first way, and half its 95 % interval."""
    pairs = zip(own.images, first.images, strict=True)
    apart = np.array([a.values[key] - b.values[key] for a, b in pairs if key in a.values and key in b.values])
    return float(apart.mean()), float(1.96 * apart.std(ddof=1) / len(apart) ** 0.5)


def likeness(own: Way, first: Way) -> float:
    """The mean over images of the PSNR in dB to the first way's."""
    errors = [np.square(a.astype(float) - b).mean() for a, b in zip(own.images, first.images, strict=True)]
    return float(np.mean([10 * np.log10(255**2 / max(error, 1e-9)) for error in errors]))


def page(ways: Sequence[Way], results: Sequence[FolderResults], count: int) -> str:
    """The table, one row a way."""
    keys = [f.key for f in results[0].figures if f.key.startswith("fd") or f.key.endswith(".nmse") or "f1@" in f.key]
    names = [next(f.name for f in results[0].figures if f.key == key) for key in keys]
    paired = next((key for key in keys if "f1@" in key), None)
    head = ["way", "key steps", "GFLOP per image", "fewer", "CPU s per image", "faster", *names]
    head += ["PSNR to the first row's (dB)"]
    head += [f"{names[keys.index(paired)]} less the first row's, paired"] if paired else []
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for way, own in zip(ways, results, strict=True):
        shown = " ".join(map(str, way.config.key_steps)) or "all"
        cells = [way.name, shown, number(way.flops), f"{ways[0].flops / way.flops:.2f}x"]
        cells += [number(way.seconds / count), f"{ways[0].seconds / way.seconds:.2f}x"]
        for key in keys:
            figure = own.get(key)
            assert figure is not None
            span = f" [{number(figure.interval[0])}, {number(figure.interval[1])}]" if figure.interval else ""
            cells.append(number(figure.value) + span)
        cells.append("" if way is ways[0] else f"{likeness(way, ways[0]):.2f}")
        if paired:
            mean, half = difference(own, results[0], paired)
            cells.append(f"{mean:+.4f} ± {half:.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Draws, measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"ways of drawing; {' '.join(WAYS)} when not given")
    parser.add_argument("--data", required=True, help="annotated images with splits")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--tuner", default="mini-canny", help="tuner file or run; '' for the base alone")
    parser.add_argument("--base", default="mini")
    parser.add_argument("--scale", type=float, default=1.4)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    backbone = load_backbone(given.base, device=best_device())
    tuners = [load_tuner(tuner_file(given.tuner), backbone)] if given.tuner else []
    config = TrainConfig(data=given.data, cond=tuners[0].conditions if tuners else ())
    ways = [parse(text, given.guidance, given.batch) for text in given.ways or WAYS]
    wanted = requests(config, backbone, given.split, given.count)
    with tuned(backbone, *tuners, scales=given.scale), Progress(False).counting(len(wanted), "drawing") as advance:
        counted(backbone, ways, wanted)
        for batch in batched(wanted, given.batch):
            draw(backbone, ways, batch)
            advance(len(batch))
    used = [{"method": tuner.method, "file": given.tuner, "scale": given.scale} for tuner in tuners]
    folders = [written(given.out / way.name, wanted, how(backbone, way, used), way.images) for way in ways]
    metrics = ("fid", "nmse") if "canny" in config.conditions else ("fid",)
    options = Options(metrics=metrics, features="mini" if given.base.startswith("mini") else "auto", quiet=True)
    results = [evaluate(folder, options, base=given.base).folders[0] for folder in folders]
    side_by_side(folders, wanted, SHOWN, "")
    text = page(ways, results, len(wanted))
    costs = {way.name: {"gflop": way.flops, "seconds": way.seconds / len(wanted)} for way in ways}
    write_text(given.out / "costs.json", json.dumps(costs))
    write_text(given.out / "table.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
