"""Start-up time, memory and speed of training's loader on a prepared folder that this script makes up.

    python benchmarks/streaming.py --records 24000000 --side 1 --hard-links    # a real index, tiny rows
    python benchmarks/streaming.py --records 20000 --side 64 --cond            # rows as Stable Diffusion's at 512 px

Rows have random latents (4, SIDE, SIDE) in bf16, with `--cond` edge maps of 8 SIDE pixels, and text rows (77, 12 SIDE),
a hundred different ones a shard. With `--hard-links` all shards have the bytes of the first tar, each with an index
file of its own, so that 24 million rows fit on a small disk: start-up and memory are real, the speed is that of tiny
rows. The CPU time of a sample says what a core would do that has nothing else to do.
Start-up is opening the folder, its checks, and the first batch of 64 in the middle of an epoch. Memory is what the
process has more at the end than before it opened the folder (private pages, from /proc/self/smaps_rollup).
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from sctool.core.data.prompts import caption_of
from sctool.core.data.streaming.folder import PreparedFolder
from sctool.core.data.streaming.layout import Manifest, ShardInfo, index_name
from sctool.core.data.streaming.serving import StreamedSet
from sctool.core.data.streaming.writing import ShardWriter
from sctool.core.training.batches import StepBatches, collate

BATCH, ROWS, CAPTIONS = 64, 10_000, 100


def main() -> None:
    """Makes the folder where it is missing, and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=24_000_000)
    parser.add_argument("--side", type=int, default=1, help="side of the latents")
    parser.add_argument("--cond", action="store_true", help="also edge maps")
    parser.add_argument("--no-hints", action="store_true", help="do not load the edge maps that there are")
    parser.add_argument("--hard-links", action="store_true", help="one tar for all shards")
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    parser.add_argument("--folder", type=Path, help="where to keep what is made up, for another run")
    words = parser.parse_args()
    torch.set_num_threads(1)
    folder = words.folder or Path(tempfile.mkdtemp(prefix="streaming-"))
    try:
        if not (folder / "prepared.json").is_file():
            began = time.perf_counter()
            make(folder, words.records, words.side, words.cond, words.hard_links)
            print(f"made {words.records:,} rows in {time.perf_counter() - began:.0f} s")
        measure(folder, words)
    finally:
        if words.folder is None:
            shutil.rmtree(folder)


def make(folder: Path, records: int, side: int, cond: bool, hard_links: bool) -> None:
    """A prepared folder of `records` rows."""
    folder.mkdir(parents=True, exist_ok=True)
    conds = ("canny",) if cond else ()
    rng = np.random.default_rng(0)
    infos: list[ShardInfo] = []
    for number in range(records // ROWS):
        name = f"{number:05d}"
        if hard_links and number:
            os.link(folder / "00000.tar", folder / f"{name}.tar")
            shutil.copyfile(folder / index_name("00000"), folder / index_name(name))
            infos.append(ShardInfo(name, infos[0].rows, infos[0].tar_bytes, infos[0].index_bytes))
            continue
        with ShardWriter(folder, name, conds, "bf16") as writer:
            for row in range(ROWS):
                latents = torch.from_numpy(rng.standard_normal((2, 4, side, side), np.float32)).to(torch.bfloat16)
                maps = {name: edges(rng, 8 * side) for name in conds}
                meta = {"key": f"{number}/{row}", "text": "a cup", "label": None, "split": None, "origin": None}
                writer.add("train", meta, latents, maps, {}, row % CAPTIONS)
            writer.finish({"prompt_embeds": (77, 12 * side)}, texts(side), CAPTIONS)
        infos.append(ShardInfo(name, writer.rows, writer.files[f"{name}.tar"], writer.files[index_name(name)]))
    Manifest(
        source="made up", root=None, base="none", autoencoder="", conditioner=(), precisions={}, size=8 * side,
        latent=(4, side, side), dtype="bf16", flip=False, by_class=False, trigger="", caption="",
        conditions={name: {} for name in conds}, shards=tuple(infos),
    ).save(folder)  # fmt: skip


def texts(side: int) -> Iterator[dict[str, torch.Tensor]]:
    """Text rows of a shard."""
    yield {"prompt_embeds": torch.randn(CAPTIONS, 77, 12 * side, generator=torch.Generator().manual_seed(0))}


def edges(rng: np.random.Generator, side: int) -> bytes:
    """An edge map as a 1-bit PNG: ellipses, about as dense as Canny edges of photographs."""
    from sctool.annotators.engine.maps import encode_png

    map = np.zeros((side, side), np.uint8)
    for _ in range(40):
        centre, axes = rng.integers(0, side, 2).tolist(), rng.integers(2, max(3, side // 4), 2).tolist()
        cv2.ellipse(map, centre, axes, float(rng.integers(0, 180)), 0, 360, 255, 1)
    return encode_png(map, bilevel=True)


def measure(folder: Path, words: argparse.Namespace) -> None:
    """Prints start-up, memory and speed."""
    if words.cold:
        drop(folder)
    before, began = private_bytes(), time.perf_counter()
    prepared = PreparedFolder(folder)
    conds = [] if words.no_hints else prepared.conditions()
    data = StreamedSet(prepared.rows("train"), conds, caption_of, {"prompt_embeds": torch.zeros(77, 768)})
    start = len(data) // BATCH // 2
    order = StepBatches(len(data), BATCH, 0, start, start + words.batches, groups=data.groups)
    loader = iter(DataLoader(data, batch_sampler=order, num_workers=words.workers, collate_fn=collate))
    next(loader)
    started = time.perf_counter() - began
    began, cpu = time.perf_counter(), time.process_time()
    for _ in loader:
        pass
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    samples = (words.batches - 1) * BATCH
    memory = (private_bytes() - before) / 1e6
    print(
        f"{len(data):,} rows in {len(prepared.manifest.shards):,} shards, {prepared.manifest.bytes / 1e9:.2f} GB, "
        f"{words.workers} workers: start-up {started:.2f} s, memory {memory:.0f} MB, "
        f"{samples / seconds:,.0f} samples/s, {1e6 * cpu / samples:.0f} us of this process's CPU time a sample"
    )


def private_bytes() -> int:
    """Bytes of memory that are this process's own."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) << 10


def drop(folder: Path) -> None:
    """Asks the system to forget what it has cached of the folder's files."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
