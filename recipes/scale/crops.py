"""A large set made of a small one: random square crops of its photographs, in shards as img2dataset writes them.

    python recipes/scale/crops.py PHOTOS --out work/crops --count 200000 --side 64

For trying `sctool prepare` at a scale for which there are no images at hand. Every shard depends on its number and the
seed alone and is written completely or not at all: the same command again makes those that are missing. Crops of one
photograph in fifty are marked for validation, and no training crop comes from these.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from sctool.core.data.images import decode_rgb
from sctool.core.data.records import Blob, Record
from sctool.core.data.sources import open_source
from sctool.core.files import replacing

HELD_OUT_EVERY = 50


def main() -> None:
    """Writes the shards that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="any set that sctool reads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200_000, help="crops in all")
    parser.add_argument("--per-shard", type=int, default=5000)
    parser.add_argument("--side", type=int, default=64, help="side of a crop in pixels")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    cv2.setNumThreads(1)
    records = open_source(words.source).records
    shards = -(-words.count // words.per_shard)
    for number in range(shards):
        path = words.out / f"{number:05d}.tar"
        if path.exists():
            continue
        began = time.perf_counter()
        first = number * words.per_shard
        crops = range(first, min(first + words.per_shard, words.count))
        write_shard(path, records, crops, words.side, words.seed)
        speed = len(crops) / (time.perf_counter() - began)
        print(f"{path}: shard {number + 1} of {shards}, {speed:.0f} crops/s", flush=True)


def write_shard(path: Path, records: list[Record], crops: range, side: int, seed: int) -> None:
    """One tar with KEY.jpg, KEY.txt and KEY.json for every crop."""
    rng = np.random.default_rng([seed, crops.start])
    order = np.sort(rng.integers(0, len(records), len(crops)))  # each photograph is decoded once a shard
    with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
        for number, place in zip(crops, order.tolist(), strict=True):
            record = records[place]
            split = "validation" if place % HELD_OUT_EVERY == 0 else "train"
            data = cv2.imencode(".jpg", crop(pixels(record), side, rng)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
            meta = {"class": record.label, "split": split, "photograph": record.key}
            key = f"{number:09d}"
            for suffix, content in (
                ("jpg", data.tobytes()),
                ("txt", (record.text or "").encode()),
                ("json", json.dumps(meta).encode()),
            ):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def crop(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A square of at least `side` pixels, or the whole width of a smaller image, resized to `side`."""
    height, width = image.shape[:2]
    short = min(height, width)
    own = int(rng.integers(min(side, short), short + 1))
    top, left = int(rng.integers(0, height - own + 1)), int(rng.integers(0, width - own + 1))
    pixels = image[top : top + own, left : left + own]
    return cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA if own >= side else cv2.INTER_CUBIC)


def pixels(record: Record) -> np.ndarray:
    """The decoded photograph; the last one is kept."""
    return _decoded(record.image)


@lru_cache(maxsize=1)
def _decoded(blob: Blob) -> np.ndarray:
    return decode_rgb(blob)


if __name__ == "__main__":
    main()
