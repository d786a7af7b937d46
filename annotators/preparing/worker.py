"""The work of one job of `prepare`: a pure function of the job, which can be killed and repeated, to the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import cv2
import torch
from torch import Tensor

from ...core.backbones.loading import Backbone, load_backbone
from ...core.data.records import Fault, Record
from ...core.data.streaming.origin import origin
from ...core.data.streaming.writing import Images, ShardWriter, stored
from ...core.devices import best_device
from ...core.errors import SctoolError
from ...core.files import write_text
from ..engine.ondemand import check_settings, recorded
from ..engine.pool import OnImage
from .images import Loaded, add_missing_maps, load, map_files, ordered
from .job import PrepareJob, Recipe

TEXT_BATCH = 64
"""Captions per pass of the conditioning encoder."""
DECODERS = 8
"""Threads that decode for a GPU; on the CPU, processes share the cores."""


@lru_cache(maxsize=1)
def encoders(base: str, precision: str, offline: bool) -> Backbone:
    """The encoders of a base, loaded once a process."""
    dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[precision]
    return load_backbone(base, device=best_device(), vae_dtype=dtype, offline=offline, encoders_only=True)


def prepare_job(job: PrepareJob, on_image: OnImage) -> dict[str, int]:
    """Writes the job's shard, then its marker. Returns the number of `images` and of `failed` ones.

    An image that cannot be used is listed in the marker and left out. Raises `UsageError` for maps that were made with
    other settings, `SctoolError` if nothing can be written.
    """
    recipe = job.recipe
    fingerprint = job.fingerprint()
    listed, faults = job.list_records()
    source = job.as_source([record for record, _ in listed])
    for spec in recipe.conds:
        if spec.settings:
            check_settings(source, spec, recipe.maps)
    backbone = encoders(recipe.base, recipe.precision, recipe.offline)
    cuda = backbone.vae.device.type == "cuda"
    pool = ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) if cuda else nullcontext()
    names = [spec.name for spec in recipe.conds]
    with one_thread(), pool as threads, ShardWriter(job.out, job.name, names, recipe.dtype) as writer:
        work = _Work(job, backbone, writer, faults)
        work.add_images(source.records, threads, on_image)
        work.add_text()
    lacking = [a for a in job.annotators if any(a.name not in record.maps for record in source.records)]
    notes = recorded(source.records, names) | {a.name: {**a.id, "opencv": cv2.__version__} for a in lacking}
    counts = {"images": work.images, "failed": len(faults)}
    marker = {
        "settings": job.settings, "source": fingerprint, **counts, "errors": [vars(fault) for fault in faults],
        "files": writer.files, "rows": writer.rows, "captions": len(work.captions), **work.noted(), "conditions": notes,
    }  # fmt: skip
    write_text(job.marker, json.dumps(marker, ensure_ascii=False, indent=1) + "\n")
    return counts


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch inside: processes share the cores, and results do not depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Work:
    """A shard in the making: rows are added batch by batch, whose composition the job alone decides."""

    def __init__(self, job: PrepareJob, backbone: Backbone, writer: ShardWriter, faults: list[Fault]) -> None:
        self.job, self.recipe, self.backbone, self.writer, self.faults = job, job.recipe, backbone, writer, faults
        self.images, self.without_prompt, self.root = 0, 0, job.as_source(()).root
        self.captions: dict[str, int] = {}
        self.latents_error, self.text_error = [0.0, 0.0], [0.0, 0.0]

    def add_images(self, records: Sequence[Record], pool: Executor | None, on_image: OnImage) -> None:
        """All rows of the shard."""
        names = [spec.name for spec in self.recipe.conds]
        able = {annotator.name for annotator in self.job.annotators}
        batch: list[Loaded] = []
        function = partial(load, size=self.recipe.size, conds=names)
        for record, loaded in zip(records, ordered(function, records, pool, 2 * self.recipe.batch), strict=True):
            if isinstance(loaded, Loaded) and (absent := [n for n in names if n not in loaded.maps and n not in able]):
                loaded = Fault(record.image.name, f"has no {absent[0]} map, which sctool cannot make")
            if isinstance(loaded, Fault):
                self.faults.append(loaded)
                on_image()
                continue
            batch.append(loaded)
            if len(batch) == self.recipe.batch:
                self._add_batch(batch, pool, on_image)
                batch = []
        if batch:
            self._add_batch(batch, pool, on_image)

    def _add_batch(self, batch: list[Loaded], pool: Executor | None, on_image: OnImage) -> None:
        add_missing_maps(batch, self.job.annotators)
        variants = [[(item.part, False, values)] for item, values in zip(batch, self._encoded(batch), strict=True)]
        trained = [number for number, item in enumerate(batch) if item.part == "train" and self.recipe.flip]
        if trained:
            mirrored = self._encoded([batch[number] for number in trained], flip=True)
            for number, values in zip(trained, mirrored, strict=True):
                variants[number].append(("mirrored", True, values))
        files = ordered(_all_files, list(zip(batch, variants, strict=True)), pool, len(batch))
        for item, own, images in zip(batch, variants, files, strict=True):
            self._add_rows(item.record, own, images)
            on_image()

    def _add_rows(
        self, record: Record, variants: Sequence[tuple[str, bool, Tensor]], images: Sequence[tuple[Images, Images]]
    ) -> None:  # fmt: skip
        """The rows of an image, as it is and mirrored; none where one of them cannot be stored."""
        try:
            kept = [stored(values, self.recipe.dtype, "its latents") for _, _, values in variants]
        except SctoolError as error:
            self.faults.append(Fault(record.image.name, str(error)))
            return
        prompt = self.recipe.prompt(record)
        caption = self.captions.setdefault(prompt, len(self.captions))
        meta = {"key": record.key, "text": record.text, "label": record.label, "split": record.split}
        meta["origin"] = origin(record.image, self.root)
        for (part, _, values), rows, (maps, hints) in zip(variants, kept, images, strict=True):
            _add_error(self.latents_error, values, rows)
            self.writer.add(part, meta, rows, maps, hints, caption)
        self.images += 1
        self.without_prompt += not prompt.strip()

    @torch.no_grad()
    def _encoded(self, batch: Sequence[Loaded], flip: bool = False) -> Tensor:
        """Means and standard deviations, (B, 2, C, h, w) float32 on the CPU."""
        device = self.backbone.vae.device
        pixels = torch.stack([torch.from_numpy(item.pixels) for item in batch]).to(device).permute(0, 3, 1, 2)
        pixels = pixels.flip(3) if flip else pixels
        return torch.stack(self.backbone.encode_images(pixels.float() / 127.5 - 1), 1).cpu()

    def add_text(self) -> None:
        """The conditioning rows of all distinct captions; of labels only their names, since rows depend on all sets."""
        if self.backbone.family.by_class:
            self.writer.finish({}, (), len(self.captions), list(self.captions))
            return
        shapes = {name: tuple(row.shape[1:]) for name, row in self.backbone.encode_prompts([""]).items()}
        self.writer.finish(shapes, self._text(), len(self.captions))

    def _text(self) -> Iterator[dict[str, Tensor]]:
        captions = list(self.captions)
        for start in range(0, len(captions), TEXT_BATCH):
            rows = self.backbone.encode_prompts(captions[start : start + TEXT_BATCH])
            kept = {name: stored(row.cpu(), self.recipe.dtype, "text rows") for name, row in rows.items()}
            for name, row in rows.items():
                _add_error(self.text_error, row.cpu(), kept[name])
            yield kept

    def noted(self) -> dict[str, Any]:
        """What the marker says of the set as a whole."""
        by_class = self.backbone.family.by_class
        return {
            "labels": sorted(self.captions) if by_class else [],
            "too_long": sum(map(self.backbone.too_long, self.captions)),
            "without_prompt": self.without_prompt,
            "squares": {"latents": self.latents_error, "text": self.text_error},
        }


def _all_files(image: tuple[Loaded, Sequence[tuple[str, bool, Tensor]]]) -> list[tuple[Images, Images]]:
    """The files of an image's maps and hints, for each of its variants."""
    item, variants = image
    return [map_files(item, flip) for _, flip, _ in variants]


def _add_error(sums: list[float], values: Tensor, kept: Tensor) -> None:
    """Adds the squares of values and of what storing them has changed."""
    exact = values.double()
    sums[0] += float(exact.square().sum())
    sums[1] += float((exact - kept.double()).square().sum())


def check_recipe(recipe: Recipe) -> Backbone:
    """The encoders of a run's base. Raises `UsageError` for a size that the base cannot take."""
    backbone = encoders(recipe.base, recipe.precision, recipe.offline)
    backbone.check_size(recipe.size)
    return backbone
