"""A run's data as the run saw it, and samples of its held-out images from the base and the tuned model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..annotators.training_sets import open_training_sets
from ..core.config import SampleConfig, TrainConfig
from ..core.data.conditions import condition
from ..core.data.images import BadImage, Geometry, decode_map, decode_rgb
from ..core.data.prompts import Prompt
from ..core.data.records import Record, Source
from ..core.devices import best_device
from ..core.errors import SctoolError, UsageError
from ..core.files import write_json
from ..core.progress import Progress
from ..core.runs import Run
from ..core.sampling import Request

Images = dict[str, np.ndarray]
Distance = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], dict[str, float]]

SHOWN = 8  # rows of the sheet that shows hint, base and tuned side by side
COUNTS = "heldout.json"
SPLITS = ("test", "validation", "val")  # test rows first: the run itself used the validation rows


def evaluation_records(source: Source, held_out: Source | None, config: TrainConfig) -> list[Record]:
    """Records that training never saw: the held-out set, else rows marked as test, else what training held out."""
    from ..core.training.splits import split_records

    if held_out is not None:
        return list(held_out.records)
    for name in SPLITS:
        marked = [r for r in source.records if r.split == name]
        if marked:
            return marked
    return split_records(source, None, config)[1]


def sample_heldout(
    run: Run,
    *,
    count: int = 200,
    sampling: SampleConfig | None = None,
    seed: int = 0,
    which: Sequence[str] = ("base", "tuned"),
    scale: float = 1.0,
    quiet: bool = False,
    offline: bool = False,
    out: Path | None = None,
    repeat: bool = False,
    base: str | None = None,
    force: bool = False,
    normalize: bool | None = None,
) -> list[Path]:
    """Draws held-out captions with their hints into run/samples/<which>, or `out`/<which>; returns the folders.

    Of a run of several tasks, `run` is the part of one: run.of_task(NAME), with its samples in run/samples/NAME.

    "tuned" draws with the trained tuner; "base", and any other name, with the untouched base (hints are saved beside
    the images for comparison). `base` takes the place of the run's; `force`: also one that the tuner is not for.
    `normalize` as in `tuned`. Image i has seed + i in all. With `repeat`, captions are drawn
    again with further seeds where there are fewer than `count`. Beside the folders, sheet.png shows some images side by
    side, and heldout.json records how many were requested and drawn. Raises `SctoolError` if the run has no held-out
    data, and `UsageError` if its data is gone.
    """
    from ..core.backbones.loading import load_backbone
    from ..core.checkpoint import load_tuner, read_meta
    from ..core.sampling import sample_images, sampling_protocol, write_samples
    from ..core.sites.attaching import tuned

    config = run.config
    _data_there(run)
    backbone = load_backbone(base or config.base, device=best_device(), offline=offline)
    backbone.classes = tuple(read_meta(run.tuner).get("classes", ())) if run.tuner.is_file() else ()
    sampling = sampling or SampleConfig(guidance=config.guidance)
    size = sampling.size or config.size or backbone.resolution
    sampling = sampling.model_copy(update={"size": size})
    prompt = backbone.family.prompt_rule(config.trigger, config.caption)
    requests = heldout_requests(run, size, prompt, count, seed, quiet, repeat)
    progress = Progress(quiet)
    folders, parent = [], out or run.samples
    (parent / COUNTS).unlink(missing_ok=True)
    for kind in which:
        tuners = [load_tuner(run.tuner, backbone, force=force)] if kind == "tuned" else []
        task = {"task": run.task} if run.task else {}
        used = [{"method": tuner.method, "run": run.name, **task, "scale": scale} for tuner in tuners]
        drawn = requests if tuners else [Request(request.prompt, request.seed) for request in requests]
        with (
            progress.counting(len(requests), f"sampling {kind}") as advance,
            tuned(backbone.denoiser, *tuners, scales=scale, normalize=normalize),
        ):
            images = (image for _, image in sample_images(backbone, drawn, sampling, advance))
            protocol = sampling_protocol(backbone, sampling, used)
            write_samples(parent / kind, zip(requests, images, strict=True), protocol)
        folders.append(parent / kind)
    write_json(parent / COUNTS, {"asked": count, "drawn": len(requests)})
    title = f"{run.title}, continued from {config.init}" if config.init else run.title
    side_by_side(folders, requests, SHOWN, title)
    return folders


def heldout_requests(
    run: Run, size: int, prompt: Prompt, count: int, seed: int, quiet: bool, repeat: bool = False
) -> list[Request]:
    """Up to `count` held-out captions with hints and reference images at `size` px; image i has seed + i.

    Images and maps that cannot be read are left out; with `repeat` the others are requested again, in order, until
    there are `count`. Raises `SctoolError` if nothing is left.
    """
    config = run.config
    source, held_out, _ = open_training_sets(config, size, prompt=prompt, quiet=quiet)
    requests: list[Request] = []
    for record in evaluation_records(source, held_out, config):
        if len(requests) == count:
            break
        try:
            reference, hints, maps = reference_and_hints(record, config.conditions, size)
        except BadImage:
            continue
        position = seed + len(requests)
        requests.append(Request(prompt(record), position, hints, reference, record.key, record.label, maps))
    if not requests:
        raise SctoolError(f"{run.path}: its data has no held-out images to sample; pass --val-data when training.")
    if repeat:
        different = len(requests)
        for index in range(different, count):
            requests.append(replace(requests[index % different], seed=seed + index))
    return requests


def reference_and_hints(record: Record, conditions: Sequence[str], size: int) -> tuple[np.ndarray, Images, Images]:
    """The image (size, size, 3), its hints, and the class maps behind hints whose colours do not tell all classes."""
    geometry, image = Geometry(size), decode_rgb(record.image, record.image.name)
    reference = geometry.apply(image)
    hints, class_maps = {}, {}
    for name in conditions:
        kind, blob = condition(name), record.map_for(name, only=len(conditions) == 1)
        if blob is None:
            raise BadImage(f"has no {name} map", record.key)
        fitted = geometry.apply_map(decode_map(blob, blob.name), image.shape, names=kind.categorical)
        hints[name] = kind.render(fitted, reference)
        if kind.categorical and fitted.ndim == 2:
            class_maps[name] = fitted
    return reference, hints, class_maps


def held_out(run: Run) -> int | None:
    """How many held-out images the run has, if more were once requested than it has; None if unknown."""
    try:
        counts = json.loads((run.samples / COUNTS).read_text(encoding="utf-8"))
        asked, drawn = int(counts["asked"]), int(counts["drawn"])
    except (OSError, ValueError, KeyError, TypeError):  # older samples, or an interrupted drawing
        return None
    return drawn if drawn < asked else None


def _data_there(run: Run) -> None:
    """Raises `UsageError` if the data sets that the run was trained on no longer exist."""
    for key in ("data", "val_data", "maps"):
        value = getattr(run.config, key)
        if value is not None and str(value) != "photos" and not Path(value).expanduser().exists():
            raise UsageError(
                f"the held-out images of {run.path} come from its {key}={value}, which does not exist. Restore it, or "
                f"train again with another --{key.replace('_', '-')}."
            )


def side_by_side(folders: Sequence[Path], requests: Sequence[Request], count: int, title: str) -> Path:
    """Writes sheet.png beside the folders: one row per image, its hints on the left, then the image of each folder.

    Shows `count` images spread evenly over the set, since neighbours are often alike.
    """
    from PIL import Image

    from ..core.sheets import save_png, sheet

    count = min(count, len(requests))
    shown = {i: requests[i] for i in (row * len(requests) // count for row in range(count))}
    rows = []
    for index, request in shown.items():
        images = [np.asarray(Image.open(folder / f"{index:06d}.png")) for folder in folders]
        rows.append([*request.hints.values(), *images])
    path = folders[0].parent / "sheet.png"
    headings = [*requests[0].hints, *(folder.name for folder in folders)]
    save_png(sheet(rows, headings, [r.prompt[:60] for r in shown.values()], title), path)
    return path


def adherence(
    conds: Sequence[str], map_settings: dict[str, Any], *, quiet: bool = False
) -> dict[str, Callable[..., dict[str, float]]]:
    """For each condition that can be measured, a function (images, hints) -> figures; see `eval/control/table.py`."""
    from .control.table import measures

    return measures(conds, map_settings, Progress(quiet).note)


def sample_distance(
    base: str, *, offline: bool = False
) -> Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], dict]:
    """A function of (images, reference images), uint8 (H, W, 3) each, that returns their Frechet distance as {"fd": x}.

    Of the few images that a training draws on the way it is biased upwards: it shows a trend. The features are those
    that are on this machine, else the embedded ones.
    """
    import torch

    from .features.choosing import choose_features
    from .features.inception import inception_cache
    from .sets.frechet import FrechetStats, frechet_distance

    def distance(images: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> dict[str, float]:
        kind = "auto" if inception_cache().is_file() else "mini"
        extractor = choose_features(kind, base=base, offline=offline)
        moments = []
        for part in (images, reference):
            stats = FrechetStats(extractor.dim)
            for first in range(0, len(part), 16):
                pixels = torch.from_numpy(np.stack(part[first : first + 16])).permute(0, 3, 1, 2)
                stats.update(extractor(pixels))
            moments.append(stats.compute())
        return {"fd": frechet_distance(*moments)}

    return distance
