"""Canny maps a second and core, file to file: a 512 px JPEG in, a map out; sctool against controlnet_aux.

Both sides read the same JPEG files and write their map files, one thread, in turns (a, b, a, b …), so that a busy
machine slows both alike. CPU time is what the process used; wall time is the best turn.

    python benchmarks/annotate.py [--pictures 60] [--turns 6]

Target on a quiet machine: at least 120 maps/s a core. controlnet_aux is not a dependency: pip install controlnet_aux.
Its maps are 8-bit RGB, those here 1-bit; the script first asserts that the pixels are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
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
from sctool.annotators.maps import Size, make

SIDE = 512


def pictures(folder: Path, count: int) -> list[Path]:
    """`count` 512 px crops of scikit-image's photographs with some noise, as JPEG of quality 92 (about 70 KB)."""
    sources = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    generator = np.random.default_rng(0)
    paths = []
    for i in range(count):
        source = sources[i % len(sources)]
        short = min(source.shape[:2])
        side = int(generator.integers(int(short * 0.7), short + 1))
        y, x = (int(generator.integers(extent - side + 1)) for extent in source.shape[:2])
        crop = cv2.resize(source[y : y + side, x : x + side], (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(crop + generator.normal(0, 4, crop.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{i:04d}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=92)
    return paths


def ours(out: Path) -> Callable[[Path], Path]:
    """JPEG file to 1-bit PNG file by sctool."""
    canny, size = annotator("canny"), Size()

    def one(path: Path) -> Path:
        made = make(path.read_bytes(), path.stem, [canny], size, render=False, image=False)
        target = out / f"{path.stem}.png"
        target.write_bytes(made.maps["canny"])
        return target

    return one


def aux(out: Path) -> Callable[[Path], Path] | None:
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


def main() -> None:
    """Prints one line a side, the ratio, and a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--turns", type=int, default=6)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("in", "sctool", "aux"):
            (root / name).mkdir()
        paths = pictures(root / "in", arguments.pictures)
        sides = {"sctool": ours(root / "sctool"), "controlnet_aux": aux(root / "aux")}
        found = {name: side for name, side in sides.items() if side is not None}
        if "controlnet_aux" in found:
            for path in paths[:4]:
                pair = [np.array(Image.open(side(path)).convert("RGB")) for side in found.values()]
                assert np.array_equal(*pair), f"{path.name}: the maps differ"
        cpu = dict.fromkeys(found, float("inf"))
        wall = dict(cpu)
        for _ in range(arguments.turns):
            for name, side in found.items():
                began, used = time.perf_counter(), time.process_time()
                for path in paths:
                    side(path)
                cpu[name] = min(cpu[name], (time.process_time() - used) / len(paths))
                wall[name] = min(wall[name], (time.perf_counter() - began) / len(paths))
    for name in found:
        print(f"{name:15} {1 / cpu[name]:7.1f} maps/s a core (CPU time)  {1 / wall[name]:7.1f} maps/s (wall)")
    result = {f"{name}_maps_per_cpu_second": round(1 / cpu[name], 1) for name in found}
    if "controlnet_aux" in found:
        result["ratio"] = round(cpu["controlnet_aux"] / cpu["sctool"], 2)
        print(f"ratio {result['ratio']}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
