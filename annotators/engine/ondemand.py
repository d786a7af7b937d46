"""Maps that training needs and the data set lacks: made at the training size, if the condition needs no network."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2

from ...core.data.conditions import ConditionSpec, parse_conditions
from ...core.data.images import BadImage, Geometry, decode_rgb
from ...core.data.records import ANY, FileBlob, Record, Source
from ...core.errors import UsageError
from ...core.files import write_bytes
from .. import make_annotators
from ..base import Annotator, Params
from ..color import enlarge
from .maps import encode_png
from .output import read_settings
from .pool import OnImage, run_jobs

CHUNK = 256
"""Images per job."""
IN_PROCESS = 512
"""With no more images than this, starting processes takes longer than the work."""


@dataclass(frozen=True)
class MapJob:
    """Records whose maps are to be made; picklable."""

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
    maps: str | None = None,
    seed: int = 0,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Source, dict[str, dict[str, Any]]]:
    """A copy of `source` whose records have a map of every condition, and how the maps were made.

    conds: conditions, with settings (`canny:low=50`) or without. maps: the folder of the set's maps, if it is not the
    set's own. Maps that the set has are used. Missing ones are made on the training pixels, all `size` x `size`
    (`Geometry(size)`), and cached under the image's content in `cache` (default $SCTOOL_CACHE, else ~/.cache/sctool).
    The second value holds what `annotate` noted about existing maps, and `Annotator.id` of each condition made here.
    Images that cannot be read get no map.
    Raises `UsageError` for an unknown condition, for one that needs weights and is missing, and for settings other than
    those that existing maps were made with.
    """
    from ...core.data.cache import cache_folder  # imports torch, which workers that unpickle a job do not need

    specs = parse_conditions(conds)
    source = name_single_map(source, specs)
    noted = recorded(source.records, [spec.name for spec in specs])
    for spec in specs:
        if spec.settings:
            check_settings(source, spec, maps)
    missing = [spec for spec in specs if any(spec.name not in record.maps for record in source.records)]
    if not missing:
        return source, noted
    annotators = make_annotators(map(str, missing), seed)
    _refuse_networks(source, missing, annotators)
    folder, total = cache_folder(cache), len(source.records)
    chunks = [source.records[start : start + CHUNK] for start in range(0, total, CHUNK)]
    todo = [MapJob(tuple(chunk), annotators, size, folder) for chunk in chunks]
    workers = jobs or (len(os.sched_getaffinity(0)) if total > IN_PROCESS else 1)
    results = run_jobs(make_missing_maps, todo, workers, lambda done: progress(done, total) if progress else None)
    new_maps = [paths for result in results for paths in result]
    records = [
        replace(record, maps={**record.maps, **{cond: FileBlob(str(path)) for cond, path in paths.items()}})
        for record, paths in zip(source.records, new_maps, strict=True)
    ]
    made_here = {annotator.name: {**annotator.id, "opencv": cv2.__version__} for annotator in annotators}
    return replace(source, records=records), noted | made_here


def recorded(records: Iterable[Record], conds: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How a set's own maps were made, by condition, as `annotate` noted it with each image.

    A setting that differs between images (such as random thresholds) is left out; `<setting>_varies` replaces it.
    """
    settings: dict[str, dict[str, Any]] = {}
    names = list(conds)
    for record in records:
        notes = _notes(record)
        for name in names:
            params = notes.get(name)
            if not isinstance(params, dict):
                continue
            common = settings.setdefault(name, dict(params))
            for key in [k for k in common if not k.endswith("_varies") and common[k] != params.get(k)]:
                del common[key]
                common[f"{key}_varies"] = True
    return settings


def _notes(record: Record) -> dict[str, Any]:
    """What `annotate` noted with the image about the maps of each condition."""
    noted = record.meta.get("conditions")
    return (json.loads(noted) if isinstance(noted, str) else noted) or {}


def name_single_map(source: Source, specs: Sequence[ConditionSpec]) -> Source:
    """If one condition is asked for, gives a map without a name (of a ControlNet `prompt.json`) its name."""
    if len(specs) != 1:
        return source
    (spec,) = specs
    records = [
        replace(record, maps={**record.maps, spec.name: record.maps[ANY]}) if set(record.maps) == {ANY} else record
        for record in source.records
    ]
    return replace(source, records=records)


def check_settings(source: Source, spec: ConditionSpec, maps: str | None) -> None:
    """Raises `UsageError` if the set has maps of the condition that are not known to be made with exactly its settings.

    What `annotate` noted with the images decides. The settings file of an annotated set adds what is not noted there,
    and is used alone if the maps are in a folder of their own.
    """
    (annotator,) = make_annotators([str(spec)])
    records = [record for record in source.records if spec.name in record.maps]
    folder = Path(maps).expanduser() if maps else source.root
    params = _settings_of_set(folder, spec.name) if folder else {}
    if not maps and all(spec.name in _notes(record) for record in records):
        params |= recorded(records, [spec.name]).get(spec.name, {})
    if not records or annotator.made_with_same_settings(params):
        return
    varying = [key for key in annotator.Settings.model_fields if f"{key}_varies" in params]
    fixed = [key for key in annotator.Settings.model_fields if key in params and key not in varying]
    shown = [*(f"{key}={params[key]}" for key in fixed), *(f"varying {key}" for key in varying)]
    how = f"were made with {', '.join(shown)}" if shown else "have no record of how they were made"
    raise UsageError(
        f"--cond {spec} does not fit '{source.name}': its {spec.name} maps {how}. Leave the settings out (--cond "
        f"{spec.name}) to use these maps, or make others: sctool annotate {source.root or source.name} --cond {spec}"
    )


def _settings_of_set(folder: Path, cond: str) -> Params:
    """The settings that an annotated set's maps of a condition were made with; {} if they are not known."""
    identities = (read_settings(folder) or {}).get("conditions", ())
    return next((dict(identity) for identity in identities if identity.get("name") == cond), {})


def _refuse_networks(source: Source, specs: Sequence[ConditionSpec], annotators: Sequence[Annotator]) -> None:
    for spec, annotator in zip(specs, annotators, strict=True):
        if annotator.needs_weights:
            raise UsageError(
                f"'{source.name}' has no {spec.name} maps, and making them needs a network. First run: "
                f"sctool annotate {source.root or source.name} --cond {spec}"
            )


def make_missing_maps(job: MapJob, on_image: OnImage) -> list[dict[str, Path]]:
    """The files of the maps that each record lacks; maps in the cache are not made again."""
    geometry = Geometry(job.size)
    paths = []
    for record in job.records:
        missing = [annotator for annotator in job.annotators if annotator.name not in record.maps]
        paths.append(_cached_maps(record, missing, geometry, job))
        on_image()
    return paths


def _cached_maps(record: Record, annotators: list[Annotator], geometry: Geometry, job: MapJob) -> dict[str, Path]:
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
                ((map, _),) = annotator([pixels], [record.key])
                if map.shape[:2] != (job.size, job.size):
                    map = enlarge(map, job.size, job.size)  # or readers would take it for a map of the uncropped image
                write_bytes(path, encode_png(map, bilevel=annotator.bilevel), flush=False)
            paths[annotator.name] = path
    except (BadImage, OSError):
        return {}  # the check of the set reports the image
    return paths
