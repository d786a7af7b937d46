"""Maps made when training needs them and the data set has none: weight-free conditions, at the training geometry."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2

from ...core.data.images import BadImage, Geometry, decode_rgb
from ...core.data.records import ANY, FileBlob, Record, Source
from ...core.errors import UsageError
from ...core.files import write_bytes
from .. import make_annotators
from ..base import Annotator
from ..color import enlarge
from .maps import encode_png
from .pool import Beat, run_jobs

CHUNK = 256
IN_PROCESS = 512


@dataclass(frozen=True)
class MapJob:
    """Some records whose maps are wanted; picklable."""

    records: tuple[Record, ...]
    annotators: tuple[Annotator, ...]
    size: int
    cache: Path


def ensure_maps(
    source: Source,
    conds: Iterable[str],
    size: int,
    cache: Path | None = None,
    *,
    seed: int = 0,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Source, dict[str, dict[str, Any]]]:
    """A copy of `source` whose records carry a map of every condition, and how the maps were made.

    conds: names, with settings or without (`canny:low=50`). Maps that the set has are kept; missing ones are made on
    the training pixels, all `size` x `size` (`Geometry(size)`), and kept in `cache` ($SCTOOL_CACHE, else
    ~/.cache/sctool) under the picture's content, so a second call is quick. The second value
    holds `Annotator.id` of each condition made here, and what `annotate` noted in the set of those made before.
    Pictures that cannot be read keep no map.
    Raises `UsageError` for an unknown condition, or one that needs weights, naming the command that makes its maps.
    """
    wanted = list(conds)
    source = _named(source, wanted)
    lacking = [spec for spec in wanted if any(spec.partition(":")[0] not in r.maps for r in source.records)]
    annotators = make_annotators(lacking, seed) if lacking else ()
    for annotator in annotators:
        if annotator.needs_weights:
            raise UsageError(
                f"'{source.name}' has no {annotator.name} maps, and making them needs a model. First run: "
                f"sctool annotate {source.root or source.name} --cond {annotator.name}"
            )
    noted = recorded(source.records, [spec.partition(":")[0] for spec in wanted])
    if not annotators:
        return source, noted
    todo = [
        MapJob(tuple(source.records[start : start + CHUNK]), annotators, size, cache or _cache())
        for start in range(0, len(source.records), CHUNK)
    ]
    workers = jobs or (len(os.sched_getaffinity(0)) if len(source.records) > IN_PROCESS else 1)
    total = len(source.records)
    found = run_jobs(
        make_maps,
        todo,
        workers,
        lambda done: progress(done, total) if progress else None,
        "Run the same command again to continue.",
    )
    maps = [made for chunk in found for made in chunk]
    records = [
        replace(record, maps={**record.maps, **{cond: FileBlob(str(path)) for cond, path in made.items()}})
        for record, made in zip(source.records, maps, strict=True)
    ]
    return replace(source, records=records), noted | {
        annotator.name: {**annotator.id, "opencv": cv2.__version__} for annotator in annotators
    }


def recorded(records: Iterable[Record], conds: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How a set's own maps were made, as `annotate` noted it with each picture, by condition.

    A setting that differs between pictures (random thresholds, say) is left out and `<setting>_varies` stands for it.
    """
    found: dict[str, dict[str, Any]] = {}
    names = list(conds)
    for record in records:
        noted = record.meta.get("conditions")
        noted = json.loads(noted) if isinstance(noted, str) else noted
        for name in names:
            how = (noted or {}).get(name)
            if not isinstance(how, dict):
                continue
            known = found.setdefault(name, dict(how))
            for key in [k for k in known if not k.endswith("_varies") and known[k] != how.get(k)]:
                del known[key]
                known[f"{key}_varies"] = True
    return found


def _named(source: Source, wanted: list[str]) -> Source:
    """The set with its unnamed map (a ControlNet `prompt.json`) under the one condition that is asked for."""
    if len(wanted) != 1:
        return source
    name = wanted[0].partition(":")[0]
    records = [
        replace(record, maps={**record.maps, name: record.maps[ANY]}) if set(record.maps) == {ANY} else record
        for record in source.records
    ]
    return replace(source, records=records)


def _cache() -> Path:
    return Path(os.environ.get("SCTOOL_CACHE") or Path.home() / ".cache" / "sctool")


def make_maps(job: MapJob, beat: Beat) -> list[dict[str, Path]]:
    """For each record the files of the maps that it lacks; those in the cache are not made again."""
    geometry = Geometry(job.size)
    made = []
    for record in job.records:
        made.append(_maps_of(record, [a for a in job.annotators if a.name not in record.maps], geometry, job))
        beat()
    return made


def _maps_of(record: Record, annotators: list[Annotator], geometry: Geometry, job: MapJob) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    pixels = None
    try:
        data = record.image.read() if annotators else b""
        for annotator in annotators:
            identity = [annotator.id, annotator.seed, record.key, geometry.id, cv2.__version__]
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
            digest.update(data)
            name = digest.hexdigest()
            path = job.cache / "maps" / annotator.name / name[:2] / f"{name}.png"
            if not (path.exists() and path.stat().st_size):
                if pixels is None:
                    pixels = geometry.apply(decode_rgb(data))
                ((made, _),) = annotator([pixels], [record.key])
                if made.shape[:2] != (job.size, job.size):
                    made = enlarge(made, job.size, job.size)  # no reader then takes it for a map of the whole picture
                write_bytes(path, encode_png(made, bilevel=annotator.bilevel), flush=False)
            paths[annotator.name] = path
    except (BadImage, OSError):
        return {}  # the check of the set names the picture
    return paths
