"""A run's data as the run saw it, and samples of its held-out images from the base and the tuned model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..annotators.training_sets import open_training_sets
from ..core.config import SampleConfig, TrainConfig
from ..core.data.prompts import PromptRule
from ..core.data.records import Record, Source
from ..core.devices import best_device
from ..core.errors import SctoolError, UsageError
from ..core.files import write_json
from ..core.progress import Progress
from ..core.runs import Run

if TYPE_CHECKING:
    from ..core.sampling import Request

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
) -> list[Path]:
    """Draws held-out captions with their hints into run/samples/<which>, or `out`/<which>; returns the folders.

    "base" draws with the untouched base (its hints are saved beside it for comparison), "tuned" with the trained tuner;
    image i has seed + i in both. Beside the folders, sheet.png shows some images side by side, and heldout.json records
    how many were requested and drawn. Raises `SctoolError` if the run has no held-out data, and `UsageError` if its
    data is gone.
    """
    from ..core.backbones.loading import load_backbone
    from ..core.checkpoint import load_tuner
    from ..core.data.conditions import condition
    from ..core.data.images import BadImage, Geometry, decode_map, decode_rgb
    from ..core.sampling import Request, sample_images, sampling_protocol, write_samples
    from ..core.sites.attaching import tuned

    config = run.config
    _data_there(run)
    backbone = load_backbone(config.base, device=best_device(), offline=offline)
    sampling = sampling or SampleConfig(guidance=config.guidance)
    size = sampling.size or config.size or backbone.resolution
    sampling = sampling.model_copy(update={"size": size})
    source, held_out, _ = open_training_sets(config, size, quiet=quiet)
    geometry = Geometry(size)
    requests: list[Request] = []
    for record in evaluation_records(source, held_out, config):
        if len(requests) == count:
            break
        try:
            image = decode_rgb(record.image, record.image.name)
            reference = geometry.apply(image)
            hints, maps = {}, {}
            for name in config.conditions:
                map, names = decode_map(record.maps[name], record.maps[name].name), condition(name).categorical
                fitted = geometry.apply_map(map, image.shape, names=names)
                hints[name] = condition(name).render(fitted, reference)
                if names and fitted.ndim == 2:  # some classes share a colour
                    maps[name] = fitted
        except (BadImage, KeyError):
            continue
        caption = PromptRule(config.trigger, config.caption)(record)
        requests.append(Request(caption, seed + len(requests), hints, reference, record.key, record.label, maps))
    if not requests:
        raise SctoolError(f"{run.path}: its data has no held-out images to sample; pass --val-data when training.")
    progress = Progress(quiet)
    folders, parent = [], out or run.samples
    (parent / COUNTS).unlink(missing_ok=True)
    for kind in which:
        folder = parent / kind
        with progress.counting(len(requests), f"sampling {kind}") as advance:
            if kind == "base":
                bare = [Request(r.prompt, r.seed) for r in requests]
                pictures = (p for _, p in sample_images(backbone, bare, sampling, advance))
                drawn = ((request, picture) for request, picture in zip(requests, pictures, strict=True))
                write_samples(folder, drawn, sampling_protocol(backbone, sampling))
            else:
                tuner = load_tuner(run.path, backbone)
                used = {"method": tuner.method, "run": run.name, "scale": scale}
                with tuned(backbone.denoiser, tuner, scales=scale):
                    write_samples(
                        folder,
                        sample_images(backbone, requests, sampling, advance),
                        sampling_protocol(backbone, sampling, [used]),
                    )
        folders.append(folder)
    write_json(parent / COUNTS, {"asked": count, "drawn": len(requests)})
    side_by_side(folders, requests, SHOWN, f"{run.name}, on from {config.init}" if config.init else run.name)
    return folders


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
    import numpy as np
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
