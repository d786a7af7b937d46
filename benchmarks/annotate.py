"""What annotating costs, file to file: one thread a process, sides in turns so that a busy machine slows all alike.

    python benchmarks/annotate.py                     # canny and color against peers; one pass against three
    python benchmarks/annotate.py --processes         # a whole set by one process and by two, wall time
    python benchmarks/annotate.py --memory 50000      # memory of the run while it annotates so many small pictures

Canny stands beside controlnet_aux's CannyDetector (no dependency: pip install controlnet_aux), color beside
T2I-Adapter's palette from PIL image to PIL image, since controlnet_aux has no detector for it. 512 px JPEG files in,
map files out; the pixels of both sides are first compared. CPU time is what the process used; the best turn counts.
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

Side = Callable[[Path], object]


def pictures(folder: Path, count: int, side: int = SIDE) -> list[Path]:
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


def ours(out: Path, *conds: str) -> Side:
    """JPEG file to PNG files by sctool, all conditions in one pass."""
    annotators, size = [annotator(cond) for cond in conds], Size()

    def one(path: Path) -> dict[str, Path]:
        image = load_image(path.read_bytes(), path.stem, size)
        (output,) = make_maps([image], annotators, size, render=False, with_image=False)
        targets = {cond: out / f"{path.stem}.{cond}.png" for cond in conds}
        for cond, target in targets.items():
            target.write_bytes(output.maps[cond])
        return targets

    return one


def aux_canny(out: Path) -> Side | None:
    """JPEG file to PNG file by controlnet_aux's CannyDetector, or None where it is not installed."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            from controlnet_aux import CannyDetector  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    detector = CannyDetector()

    def one(path: Path) -> Path:
        target = out / f"{path.stem}.png"
        detector(Image.open(path), 100, 200).save(target)
        return target

    return one


def pil_color(out: Path) -> Side:
    """JPEG file to PNG file by T2I-Adapter's palette between PIL images, as controlnet_aux's detectors are called."""

    def one(path: Path) -> Path:
        image, target = np.array(Image.open(path).convert("RGB")), out / f"{path.stem}.png"
        height, width = image.shape[:2]
        small = cv2.resize(image, (width // 64, height // 64), interpolation=cv2.INTER_CUBIC)
        Image.fromarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)).save(target)
        return target

    return one


def in_turns(sides: dict[str, Side], paths: list[Path], turns: int) -> dict[str, float]:
    """CPU seconds a picture of each side, the best of its turns."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(turns):
        for name, side in sides.items():
            used = time.process_time()
            for path in paths:
                side(path)
            best[name] = min(best[name], (time.process_time() - used) / len(paths))
    return best


def same_edges(a: Path, b: Path) -> bool:
    """Whether two map files hold the same RGB pixels."""
    return np.array_equal(np.array(Image.open(a).convert("RGB")), np.array(Image.open(b).convert("RGB")))


def per_core(root: Path, count: int, turns: int) -> list[str]:
    """Canny and color against peers, and one pass against three."""
    for name in ("in", "out", "peer"):
        (root / name).mkdir()
    paths, lines = pictures(root / "in", count), []
    canny, color = ours(root / "out", "canny"), ours(root / "out", "color")
    peer = aux_canny(root / "peer")
    if peer is None:
        lines.append("canny: controlnet_aux is not installed; nothing to compare with")
    else:
        assert all(same_edges(canny(p)["canny"], peer(p)) for p in paths[:4]), "the edges differ"
        lines.append(against("canny", in_turns({"sctool": canny, "controlnet_aux": peer}, paths, turns)))
    recipe = pil_color(root / "peer")
    for path in paths[:4]:
        mine = enlarge(cv2.imread(str(color(path)["color"])), SIDE, SIDE)[:, :, ::-1]
        assert np.array_equal(mine, np.array(Image.open(recipe(path)))), "the palettes differ"
    lines.append(against("color", in_turns({"sctool": color, "T2I-Adapter's by PIL": recipe}, paths, turns)))
    lines.append(passes(root, 2 * count, max(3, turns // 2)))
    return lines


def against(cond: str, spent: dict[str, float]) -> str:
    """One line: maps a CPU second of both sides and their ratio."""
    (mine, own), (other, peer) = spent.items()
    return f"{cond}: {mine} {1 / own:.1f}, {other} {1 / peer:.1f} maps a CPU second; {verdict(cond, peer / own)}"


def verdict(name: str, ratio: float, at_most: bool = False) -> str:
    """The ratio and whether its limit holds."""
    limit = LIMITS[name]
    met = ratio <= limit if at_most else ratio >= limit
    return f"ratio {ratio:.2f}, limit {limit}: {'met' if met else 'MISSED'}"


# --------------------------------------------------------------------------------------------------- whole runs


def shards(root: Path, count: int, each: int, side: int) -> Path:
    """A set of `count` pictures of `side` px in shards, made of copies of a few hundred."""
    (root / "few").mkdir(parents=True)
    kinds = [path.read_bytes() for path in pictures(root / "few", min(count, 200), side)]
    (root / "set").mkdir()
    for start in range(0, count, each):
        with tarfile.open(root / "set" / f"{start // each:05d}.tar", "w") as tar:
            for i in range(start, min(start + each, count)):
                for suffix, content in ((".jpg", kinds[i % len(kinds)]), (".txt", b"a picture"), (".json", b"{}")):
                    info = tarfile.TarInfo(f"{i:09d}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root / "set"


def command(src: Path, out: Path, jobs: int) -> list[str]:
    """The user's command."""
    words = ["annotate", str(src), "--cond", ",".join(THREE), "--out", str(out), "-j", str(jobs), "--quiet", "--json"]
    return [sys.executable, "-m", "sctool", *words]


def passes(root: Path, count: int, turns: int) -> str:
    """CPU time of a run over a set of shards for all three maps, and of three runs for a map each, in turns."""
    src, best = shards(root / "passes", count, max(1, count // 4), SIDE), {"one": float("inf"), "three": float("inf")}
    for turn in range(turns):
        for name, conds in (("one", (",".join(THREE),)), ("three", THREE)):
            used = time.process_time()
            for cond in conds:
                out = root / "passes" / f"{turn}-{name}-{cond}"
                annotate(AnnotateConfig(src=str(src), cond=(cond,), out=str(out), jobs=1))
            best[name] = min(best[name], (time.process_time() - used) / count)
    return (
        f"{', '.join(THREE)}: {1e3 * best['one']:.2f} CPU ms a picture in one pass over a set, "
        f"{1e3 * best['three']:.2f} in three; " + verdict("one pass", best["one"] / best["three"], at_most=True)
    )


def processes(root: Path, count: int, turns: int) -> str:
    """Wall time of whole runs by one and by two processes, start of the interpreter included, in turns."""
    src = shards(root, count, max(1, count // 16), SIDE)
    best = {1: float("inf"), 2: float("inf")}
    for turn in range(turns):
        for jobs in best:
            began = time.perf_counter()
            subprocess.run(command(src, root / f"out{turn}{jobs}", jobs), check=True, stdout=subprocess.DEVNULL)
            best[jobs] = min(best[jobs], time.perf_counter() - began)
    return f"{count} pictures, three maps each: {best[1]:.1f} s by one process, {best[2]:.1f} s by two; " + verdict(
        "two processes", best[1] / best[2]
    )


def memory(root: Path, count: int, kind: str) -> str:
    """Memory of a run by two processes (all of them, shared pages counted once) at its tenths."""
    src = shards(root, count, 2500, 64)
    if kind == "folder":
        src = unpacked(src, root / "folder")
    process = subprocess.Popen(command(src, root / "out", 2), stdout=subprocess.PIPE, text=True)
    seen = []
    while process.poll() is None:
        seen.append(resident(process.pid))
        time.sleep(0.2)
    summary = json.loads(process.communicate()[0])
    assert summary["images"] == count, summary
    tenths = [max(seen[len(seen) * i // 10 : max(1, len(seen) * (i + 1) // 10)], default=0) for i in range(10)]
    return (
        f"{count} pictures of 64 px, {kind}: {summary['images_per_second']:.0f} pictures/s; peak MB in each tenth of "
        f"the run: {' '.join(f'{mb:.0f}' for mb in tenths)}"
    )


def unpacked(src: Path, folder: Path) -> Path:
    """The shards' pictures as single files."""
    folder.mkdir()
    for tar in sorted(src.glob("*.tar")):
        with tarfile.open(tar) as archive:
            archive.extractall(folder, filter="data")
    return folder


def resident(pid: int) -> float:
    """MB of a process and all below it, pages that they share divided among them (Linux's Pss)."""
    total, todo = 0.0, [pid]
    while todo:
        one = todo.pop()
        with contextlib.suppress(OSError, ValueError):
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    return total


def main() -> int:
    """Prints a line a comparison; gives 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, help="of a comparison [default: 60, --processes 8000]")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--memory", type=int, metavar="N")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if given.processes:
            lines = [processes(root, given.pictures or 8000, given.turns)]
        elif given.memory:
            lines = [memory(root / kind, given.memory, kind) for kind in ("shards", "folder")]
        else:
            lines = per_core(root, given.pictures or 60, given.turns)
    print("\n".join(lines))
    return int(any("MISSED" in line for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
