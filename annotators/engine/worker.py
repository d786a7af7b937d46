"""The work of one job: a pure function of the job. It can be killed and repeated, and always writes the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...core.data.images import BadImage
from ...core.data.records import ANY, Record
from ...core.files import write_text
from .job import Job
from .maps import LoadedImage, load_image, make_maps
from .pool import OnImage
from .writers import FolderWriter, ShardWriter, Writer

BATCH = 16
"""Images per batch at most."""
BATCH_PIXELS = 16 << 20
"""A batch with this many pixels takes no further image, which limits it to 50 MB and one image."""


def run_job(job: Job, on_image: OnImage) -> dict[str, int]:
    """Makes every map of the job, then writes its marker. Returns the number of `images` and of `failed` ones.

    An image that cannot be read is listed in the marker under `errors` and left out. Raises `SctoolError` only if
    nothing can be written.
    """
    fingerprint = job.fingerprint()
    listed, faults = job.list_records()
    errors: list[dict[str, str]] = [vars(fault) for fault in faults]
    rows: list[dict[str, Any]] | None = None if job.is_shard and job.merged else []  # a merged shard holds its rows
    done = 0
    writer: Writer
    with ShardWriter(job) if job.is_shard else FolderWriter(job) as writer:
        for batch in _batches(job, listed, errors, on_image):
            images = [item.image for item in batch]
            outputs = make_maps(images, job.annotators, job.size, render=job.render, with_image=job.merged)
            for item, output in zip(batch, outputs, strict=True):
                row = writer.add(item.record, item.path, item.image.data, output, item.earlier_maps)
                if rows is not None:
                    rows.append(row)
                done += 1
                on_image()
    counts = {"images": done, "failed": len(errors)}
    marker = {"settings": job.settings, "source": fingerprint, **counts, "errors": errors, "files": writer.files}
    if rows is not None:
        marker["rows"] = rows
    write_text(job.marker, json.dumps(marker, ensure_ascii=False, indent=1) + "\n")
    return counts


@dataclass(frozen=True)
class BatchItem:
    """A record whose image was read, the image's path in the written set, and the files of maps that are kept."""

    record: Record
    path: str
    image: LoadedImage
    earlier_maps: dict[str, bytes]


def _batches(
    job: Job, listed: list[tuple[Record, str]], errors: list[dict[str, str]], on_image: OnImage
) -> Iterator[list[BatchItem]]:
    """The job's images in batches of `BATCH` images or about `BATCH_PIXELS`; only the job decides their composition."""
    batch: list[BatchItem] = []
    pixels = 0
    earlier = sorted({cond for record, _ in listed for cond in record.maps} - {a.name for a in job.annotators} - {ANY})
    if not job.merged or job.size.kind != "none":  # only new maps are written, or earlier ones do not fit the new size
        earlier = []
    for record, path in listed:
        try:
            image = load_image(record.image.read(), record.key, job.size)
            batch.append(BatchItem(record, path, image, _earlier_maps(job, record, earlier, errors)))
        except (BadImage, OSError) as error:
            errors.append({"where": record.image.name, "reason": str(error)})
            on_image()
            continue
        pixels += image.pixels.shape[0] * image.pixels.shape[1]
        if len(batch) == BATCH or pixels >= BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _earlier_maps(job: Job, record: Record, conds: list[str], errors: list[dict[str, str]]) -> dict[str, bytes]:
    """Files of the maps that the set already has. One that cannot be read, or is missing in a shard, is an error."""
    maps = {}
    for cond in conds:
        blob = record.maps.get(cond)
        try:
            if blob is not None:
                maps[cond] = blob.read()
            elif job.is_shard:  # readers of shards expect every field in every sample
                reason = f"has no {cond} map, unlike other images of its shard"
                errors.append({"where": record.image.name, "reason": reason})
        except OSError as error:
            errors.append({"where": blob.name if blob else cond, "reason": f"the {cond} map is left out: {error}"})
    return maps
