"""How much disk a preparation will take, estimated before it starts from the first images of the first job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.backbones.loading import Backbone
from ...core.data.records import Fault
from ...core.data.streaming.layout import FIXED, PER_CONDITION
from ...core.devices import torch_dtype
from ..engine.run import expected_images
from .images import add_missing_maps, load, map_files
from .job import PrepareJob

TRIED = 8
"""Images whose maps are made to see how large they are."""
JSON = 320
"""Bytes of a row's key, caption and origin, about."""
SHARD = 16 << 10
"""Bytes of a shard besides its rows, about: the tar's end and the index's header."""


@dataclass(frozen=True)
class DiskPlan:
    """Estimates for the jobs that are not finished; bytes."""

    images: int
    per_image: int
    captions: int
    per_caption: int
    shards: int

    @property
    def bytes(self) -> int:
        """All that will be written."""
        return self.images * self.per_image + self.captions * self.per_caption + self.shards * SHARD

    def to_json(self) -> dict[str, int]:
        """For `--json`."""
        return {**vars(self), "bytes": self.bytes}


def plan_disk(jobs: Sequence[PrepareJob], backbone: Backbone) -> DiskPlan:
    """What the unfinished ones of `jobs` will write.

    Numbers of images and of distinct captions of shards are those of the first unfinished shard, by file size; sizes
    of maps are the mean over its first images. Raises `SctoolError` when maps need weights that are not there.
    """
    todo = [job for job in jobs if job.valid_marker() is None]
    if not todo:
        return DiskPlan(0, 0, 0, 0, 0)
    recipe = todo[0].recipe
    records = todo[0].as_source([record for record, _ in todo[0].list_records()[0]]).records
    rows = sum(2 if recipe.flip and r.split not in ("validation", "test") else 1 for r in records)
    copies = rows / max(1, len(records))
    width = torch_dtype(recipe.dtype).itemsize
    side = recipe.size // backbone.vae_scale
    latents = 2 * backbone.latent_channels * side * side * width
    index = 8 * (FIXED + PER_CONDITION * len(recipe.conds))
    row = _in_tar(latents + 128) + _in_tar(JSON) + index + _map_bytes(todo[0], records)
    per_image = round(copies * row)
    images = expected_images(todo)
    distinct = len({recipe.prompt(record) for record in records}) / max(1, len(records))
    return DiskPlan(images, per_image, round(images * distinct), _caption_bytes(backbone, width), len(todo))


def _in_tar(size: float) -> int:
    """Bytes of a file in a tar: a header, and whole blocks of 512."""
    return 512 + -(-round(size) // 512) * 512


def _caption_bytes(backbone: Backbone, width: int) -> int:
    if backbone.family.by_class:
        return 0
    return sum(row.numel() * width for row in backbone.encode_prompts([""]).values())


def _map_bytes(job: PrepareJob, records: Sequence) -> float:
    """Mean bytes of an image's maps and hints."""
    names = [spec.name for spec in job.recipe.conds]
    if not names:
        return 0
    for annotator in job.annotators:
        if any(annotator.name not in record.maps for record in records):
            annotator.ready()
    loaded = [load(record, job.recipe.size, names) for record in records[:TRIED]]
    images = [item for item in loaded if not isinstance(item, Fault)]
    add_missing_maps(images, job.annotators)
    sizes = [sum(_in_tar(len(data)) for files in map_files(item, False) for data in files.values()) for item in images]
    return sum(sizes) / max(1, len(sizes))
