"""Cost of annotating, file to file. One thread per process; contestants alternate, so that load affects them equally.

    python benchmarks/annotate.py                     # canny and color against peers; one pass against three
    python benchmarks/annotate.py --processes         # a whole set by one process and by two, wall time
    python benchmarks/annotate.py --memory 50000      # memory of a run over this many small images

Canny is compared with controlnet_aux's CannyDetector (not a dependency: pip install controlnet_aux), color with
T2I-Adapter's palette from PIL image to PIL image, since controlnet_aux has no detector for it. Input are 512 px JPEG
files, output map files, whose pixels are compared first. The CPU time of the process is measured; the best turn counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from skimage import data

from sctool.annotators import annotator
from sctool.annotators.color import enlarge
from sctool.annotators.engine.maps import Size, load_image, make_maps
from sctool.annotators.engine.run import annotate
from sctool.core.config import AnnotateConfig

SIDE = 512
THREE = ("canny", "color", "mask")
LIMITS = {"canny": 2.5, "color": 3.0, "one pass": 0.6, "two processes": 1.8}

Contestant = Callable[[Path], object]


def make_images(folder: Path, count: int, side: int = SIDE) -> list[Path]:
    """`count` square crops of scikit-image's photographs with some noise, as JPEG of quality 92 (70 KB at 512 px)."""
    sources = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    generator = np.random.default_rng(0)
    paths = []
    for i in range(count):
        source = sources[i % len(sources)]
        short = min(source.shape[:2])
        extent = int(generator.integers(int(short * 0.7), short + 1))
        y, x = (int(generator.integers(whole - extent + 1)) for whole in source.shape[:2])
        crop = cv2.resize(source[y : y + extent, x : x + extent], (side, side), interpolation=cv2.INTER_AREA)
        noisy = np.clip(crop + generator.normal(0, 4, crop.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{i:04d}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=92)
    return paths


def sctool_maps(out: Path, *conds: str) -> Contestant:
    """JPEG file to PNG files by sctool, all conditions in one pass."""
    annotators, size = [annotator(cond) for cond in conds], Size()

    def annotate_file(path: Path) -> dict[str, Path]:
        image = load_image(path.read_bytes(), path.stem, size)
        (output,) = make_maps([image], annotators, size, render=False, with_image=False)
        targets = {cond: out / f"{path.stem}.{cond}.png" for cond in conds}
        for cond, target in targets.items():
            target.write_bytes(output.maps[cond])
        return targets

    return annotate_file


def aux_canny(out: Path) -> Contestant | None:
    """JPEG file to PNG file by controlnet_aux's CannyDetector, or None where it is not installed."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            from controlnet_aux import CannyDetector  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    detector = CannyDetector()

    def annotate_file(path: Path) -> Path:
        target = out / f"{path.stem}.png"
        detector(Image.open(path), 100, 200).save(target)
        return target

    return annotate_file


def pil_color(out: Path) -> Contestant:
    """JPEG file to PNG file by T2I-Adapter's palette between PIL images, as controlnet_aux's detectors are called."""

    def annotate_file(path: Path) -> Path:
        image, target = np.array(Image.open(path).convert("RGB")), out / f"{path.stem}.png"
        height, width = image.shape[:2]
        small = cv2.resize(image, (width // 64, height // 64), interpolation=cv2.INTER_CUBIC)
        Image.fromarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)).save(target)
        return target

    return annotate_file


def time_in_turns(contestants: dict[str, Contestant], paths: list[Path], turns: int) -> dict[str, float]:
    """CPU seconds per image of each contestant, the best of its turns."""
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(turns):
        for name, contestant in contestants.items():
            start = time.process_time()
            for path in paths:
                contestant(path)
            best[name] = min(best[name], (time.process_time() - start) / len(paths))
    return best


def same_edges(a: Path, b: Path) -> bool:
    """Whether two map files hold the same RGB pixels."""
    return np.array_equal(np.array(Image.open(a).convert("RGB")), np.array(Image.open(b).convert("RGB")))


def per_core(root: Path, count: int, turns: int) -> list[str]:
    """Canny and color compared with peers, and one pass compared with three."""
    for name in ("in", "out", "peer"):
        (root / name).mkdir()
    paths, lines = make_images(root / "in", count), []
    canny, color = sctool_maps(root / "out", "canny"), sctool_maps(root / "out", "color")
    peer = aux_canny(root / "peer")
    if peer is None:
        lines.append("canny: controlnet_aux is not installed; no comparison")
    else:
        assert all(same_edges(canny(p)["canny"], peer(p)) for p in paths[:4]), "the edges differ"
        lines.append(comparison("canny", time_in_turns({"sctool": canny, "controlnet_aux": peer}, paths, turns)))
    recipe = pil_color(root / "peer")
    for path in paths[:4]:
        palette = enlarge(cv2.imread(str(color(path)["color"])), SIDE, SIDE)[:, :, ::-1]
        assert np.array_equal(palette, np.array(Image.open(recipe(path)))), "the palettes differ"
    lines.append(comparison("color", time_in_turns({"sctool": color, "T2I-Adapter's by PIL": recipe}, paths, turns)))
    lines.append(passes(root, 2 * count, max(3, turns // 2)))
    return lines


def comparison(cond: str, seconds: dict[str, float]) -> str:
    """One line: maps per CPU second of both contestants, and their ratio."""
    (name, own), (peer_name, peer) = seconds.items()
    rates = f"{name} {1 / own:.1f}, {peer_name} {1 / peer:.1f} maps per CPU second"
    return f"{cond}: {rates}; {verdict(cond, peer / own)}"


def verdict(name: str, ratio: float, at_most: bool = False) -> str:
    """The ratio, and whether it meets its limit."""
    limit = LIMITS[name]
    met = ratio <= limit if at_most else ratio >= limit
    return f"ratio {ratio:.2f}, limit {limit}: {'met' if met else 'MISSED'}"


# --------------------------------------------------------------------------------------------------- whole runs


def make_shards(root: Path, count: int, per_shard: int, side: int) -> Path:
    """A set of `count` images of `side` px in shards; a few hundred different images, repeated."""
    (root / "few").mkdir(parents=True)
    kinds = [path.read_bytes() for path in make_images(root / "few", min(count, 200), side)]
    (root / "set").mkdir()
    for start in range(0, count, per_shard):
        with tarfile.open(root / "set" / f"{start // per_shard:05d}.tar", "w") as tar:
            for i in range(start, min(start + per_shard, count)):
                for suffix, content in ((".jpg", kinds[i % len(kinds)]), (".txt", b"a picture"), (".json", b"{}")):
                    info = tarfile.TarInfo(f"{i:09d}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root / "set"


def command(src: Path, out: Path, jobs: int) -> list[str]:
    """The command as a user types it."""
    words = ["annotate", str(src), "--cond", ",".join(THREE), "--out", str(out), "-j", str(jobs), "--quiet", "--json"]
    return [sys.executable, "-m", "sctool", *words]


def passes(root: Path, count: int, turns: int) -> str:
    """CPU time of one run that makes three maps, and of three runs that make one map each, alternating."""
    src = make_shards(root / "passes", count, max(1, count // 4), SIDE)
    best = {"one": float("inf"), "three": float("inf")}
    for turn in range(turns):
        for name, conds in (("one", (",".join(THREE),)), ("three", THREE)):
            start = time.process_time()
            for cond in conds:
                out = root / "passes" / f"{turn}-{name}-{cond}"
                annotate(AnnotateConfig(src=str(src), cond=(cond,), out=str(out), jobs=1))
            best[name] = min(best[name], (time.process_time() - start) / count)
    return (
        f"{', '.join(THREE)}: {1e3 * best['one']:.2f} CPU ms per image in one pass over a set, "
        f"{1e3 * best['three']:.2f} in three; " + verdict("one pass", best["one"] / best["three"], at_most=True)
    )


def processes(root: Path, count: int, turns: int) -> str:
    """Wall time of whole runs with one and with two processes, start of the interpreter included, alternating."""
    src = make_shards(root, count, max(1, count // 16), SIDE)
    best = {1: float("inf"), 2: float("inf")}
    for turn in range(turns):
        for jobs in best:
            began = time.perf_counter()
            subprocess.run(command(src, root / f"out{turn}{jobs}", jobs), check=True, stdout=subprocess.DEVNULL)
            best[jobs] = min(best[jobs], time.perf_counter() - began)
    return f"{count} images, three maps each: {best[1]:.1f} s with one process, {best[2]:.1f} s with two; " + verdict(
        "two processes", best[1] / best[2]
    )


def memory(root: Path, count: int, kind: str) -> str:
    """Peak memory of a run with two processes in each tenth of it, over all processes, shared pages counted once."""
    src = make_shards(root, count, 2500, 64)
    if kind == "folder":
        src = unpacked(src, root / "folder")
    process = subprocess.Popen(command(src, root / "out", 2), stdout=subprocess.PIPE, text=True)
    samples = []
    while process.poll() is None:
        samples.append(resident(process.pid))
        time.sleep(0.2)
    summary = json.loads(process.communicate()[0])
    assert summary["images"] == count, summary
    tenths = [max(samples[len(samples) * i // 10 : max(1, len(samples) * (i + 1) // 10)], default=0) for i in range(10)]
    return (
        f"{count} images of 64 px, {kind}: {summary['images_per_second']:.0f} images/s; peak MB in each tenth of "
        f"the run: {' '.join(f'{mb:.0f}' for mb in tenths)}"
    )


def unpacked(src: Path, folder: Path) -> Path:
    """The shards' images as single files."""
    folder.mkdir()
    for tar in sorted(src.glob("*.tar")):
        with tarfile.open(tar) as archive:
            archive.extractall(folder, filter="data")
    return folder


def resident(pid: int) -> float:
    """Memory of a process and its descendants in MB, shared pages counted once (Linux's Pss)."""
    total, todo = 0.0, [pid]
    while todo:
        process = todo.pop()
        with contextlib.suppress(OSError, ValueError):
            for task in Path(f"/proc/{process}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    return total


def main() -> int:
    """Prints one line per comparison; returns 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="images per comparison [default: 60, --processes 8000]")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--memory", type=int, metavar="N")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.processes:
            lines = [processes(root, options.images or 8000, options.turns)]
        elif options.memory:
            lines = [memory(root / kind, options.memory, kind) for kind in ("shards", "folder")]
        else:
            lines = per_core(root, options.images or 60, options.turns)
    print("\n".join(lines))
    return int(any("MISSED" in line for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
