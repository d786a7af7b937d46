"""Sampling: unmodified diffusers pipelines with tuners attached; folders of samples that explain themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .backbones.loading import Backbone
from .config import SampleConfig
from .errors import SctoolError, UsageError, unknown
from .files import write_json, write_text
from .sheets import save_png, sheet
from .sites.attaching import channel
from .sites.reuse import check_reuse, reusing
from .sites.wiring import attached_tasks

if TYPE_CHECKING:
    from .backbones.families.base import Rows

SHEET_ROWS = 16


@dataclass(frozen=True)
class Request:
    """One image to draw: prompt, seed, hints as uint8 (H, W, 3) by condition, and what it is compared to.

    `maps` are the raw maps (H, W) behind hints that do not show all of them, such as class ids. `task` is whose tuner
    draws it, where tuners are attached with tasks.
    """

    prompt: str
    seed: int
    hints: Mapping[str, np.ndarray] = field(default_factory=dict)
    reference: np.ndarray | None = None
    key: str = ""
    label: str | None = None
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    task: str | None = None


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """x_T as (B, C, h, w) float32 on the CPU; each image's noise depends on its own seed alone."""
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def hint_tensor(hints: Sequence[np.ndarray], device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 (H, W, 3) maps as one float32 (B, 3, H, W) in 0..1."""
    return torch.from_numpy(np.stack(hints)).permute(0, 3, 1, 2).to(device).float() / 255


def settled(config: SampleConfig, backbone: Backbone) -> SampleConfig:
    """The config with the base's own size and guidance where it gives none.

    Raises `DoesNotFit` for key steps of a base without an encoder.
    """
    if config.key_steps:
        check_reuse(backbone.denoiser)
    guidance = backbone.family.guidance if config.guidance is None else config.guidance
    return config.model_copy(update={"size": config.size or backbone.resolution, "guidance": guidance})


@torch.no_grad()
def sample_batch(
    backbone: Backbone,
    rows: Rows,
    null: Rows,
    seeds: Sequence[int],
    config: SampleConfig,
    hints: Mapping[str, torch.Tensor] | None = None,
    tasks: Sequence[str | None] | None = None,
) -> torch.Tensor:
    """Draws one batch with whatever tuners are attached to the backbone; uint8 (B, 3, H, W).

    The encoder runs at the config's key steps, at all where it names none.

    `rows` has a conditioning row per image, `null` that of the negative prompt (1 row). `hints` are float
    (B, 3, H, W) in 0..1 by condition, `tasks` the task of each image; they reach the tuners through the pipeline's
    open channel, `cross_attention_kwargs`.
    """
    config = settled(config, backbone)
    pipe, side = backbone.pipe, (config.size or 0) // backbone.vae_scale
    noise = initial_noise(seeds, (backbone.latent_channels, side, side))
    base_scheduler = pipe.scheduler
    pipe.scheduler = scheduler_class(backbone, config).from_config(base_scheduler.config)
    try:
        with reusing(backbone, config.key_steps) if config.key_steps else nullcontext():
            latents = backbone.family.sample(
                pipe, _placed(noise, backbone), _placed(rows, backbone), _placed(null, backbone), config,
                channel({name: hint.to(backbone.device) for name, hint in (hints or {}).items()}, tasks),
            )  # fmt: skip
    finally:
        pipe.scheduler = base_scheduler
    return backbone.decode(latents)


def scheduler_class(backbone: Backbone, config: SampleConfig) -> Any:
    """diffusers' scheduler class for the config's sampler. Raises `UsageError` for one that does not fit the base."""
    known = backbone.family.schedulers()
    if config.scheduler not in known:
        raise unknown("scheduler for this base", config.scheduler, known)
    return known[config.scheduler]


def _placed(value: Any, backbone: Backbone) -> Any:
    """On the denoiser's device; numbers in its precision, ids as they are. Also every value of a dict."""
    if isinstance(value, dict):
        return {name: _placed(one, backbone) for name, one in value.items()}
    return value.to(backbone.device, backbone.denoiser.dtype if value.is_floating_point() else value.dtype)


def sample_images(
    backbone: Backbone,
    requests: Sequence[Request],
    config: SampleConfig,
    progress: Callable[[int], None] = lambda done: None,
    encode: Callable[[list[str]], Rows] | None = None,
    classes: Mapping[str | None, Sequence[str]] | None = None,
) -> Iterator[tuple[Request, np.ndarray]]:
    """Draws every request in batches; yields uint8 (H, W, 3) images in order.

    Requests of a task share a batch if they have the same set of hints; so do those of different tasks, whose tuners
    must then all be attached with tasks. Where tuners are, a request without a task is drawn by the base alone.
    `encode` turns prompts into conditioning rows; the backbone's own encoder when not given, with the `classes` that
    each task's tuner adds. Raises `UsageError` for a size that the base cannot draw, or a hint of another size.
    """
    check_sizes(backbone, requests, config)
    tasks, routed = {request.task for request in requests}, attached_tasks(backbone.denoiser)
    alone = tasks.pop() if len(tasks) == 1 else None
    null = encode([config.negative]) if encode else encoded(backbone, [(config.negative, alone)], classes)
    for batch in batched(requests, config.batch):
        prompts = [request.prompt for request in batch]
        texts = [(request.prompt, request.task) for request in batch]
        rows = encode(prompts) if encode else encoded(backbone, texts, classes)
        named = [request.task for request in batch] if routed else None
        images = sample_batch(
            backbone, rows, null, [request.seed for request in batch], config, batch_hints(batch),
            named,
        )  # fmt: skip
        yield from zip(batch, images.permute(0, 2, 3, 1).numpy(), strict=True)
        progress(len(batch))


def encoded(
    backbone: Backbone,
    prompts: Sequence[tuple[str, str | None]],
    classes: Mapping[str | None, Sequence[str]] | None = None,
) -> Rows:
    """Conditioning rows of (prompt, task) pairs; `classes` are those that each task's tuner adds to the base's.

    Raises the family's `UsageError` for a class that is not there.
    """
    added = classes or {}
    parts = [
        backbone.with_classes(own).encode_prompts([prompt for prompt, _ in group])
        for own, group in groupby(prompts, lambda pair: tuple(added.get(pair[1], backbone.classes)))
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def batch_hints(batch: Sequence[Request]) -> dict[str, torch.Tensor] | None:
    """The hints (B, 3, H, W) in 0..1 by condition; black for requests of tasks without the condition."""
    shapes = {name: hint.shape for request in batch for name, hint in request.hints.items()}
    return {
        name: hint_tensor([request.hints.get(name, np.zeros(shapes[name], np.uint8)) for request in batch])
        for name in sorted(shapes)
    } or None


def check_sizes(backbone: Backbone, requests: Sequence[Request], config: SampleConfig) -> None:
    """Raises `UsageError` for a size that the base cannot draw, and for a hint of another size."""
    size = config.size or backbone.resolution
    backbone.check_size(size)
    for request in requests:
        for name, hint in request.hints.items():
            if hint.shape[:2] != (size, size):
                raise UsageError(f"hint '{name}' is {hint.shape[1]}x{hint.shape[0]} px, the image {size}x{size} px.")


def batched(requests: Sequence[Request], most: int) -> Iterator[list[Request]]:
    """Requests in order, in batches of at most `most` in which those of a task have the same set of hints."""
    batch: list[Request] = []
    names: dict[str | None, set[str]] = {}
    for request in requests:
        own = set(request.hints)
        if batch and (len(batch) == most or names.get(request.task, own) != own):
            yield batch
            batch, names = [], {}
        batch.append(request)
        names[request.task] = own
    if batch:
        yield batch


def write_samples(
    folder: str | Path, images: Iterator[tuple[Request, np.ndarray]], protocol: Mapping[str, Any]
) -> list[Path]:
    """Writes images, hints and references with all that is needed to make them again; returns the images' paths.

    FOLDER/000000.png ..., metadata.jsonl (file_name, prompt, seed, key, label, reference, hints, and maps and task
    where there are any), sampling.json (protocol) and sheet.png. Each PNG also carries its own row and the protocol.
    metadata.jsonl is written last: a folder that has one is complete. Raises `SctoolError` when there is nothing to
    draw.
    """
    folder = Path(folder)
    remove_samples(folder)
    rows, shown = [], []
    for index, (request, image) in enumerate(images):
        rows.append(_write_sample(folder, f"{index:06d}.png", request, image, protocol))
        if len(shown) < SHEET_ROWS:
            shown.append((request, image))
    if not rows:
        raise SctoolError(f"nothing was drawn into {folder}: there was no prompt.")
    save_png(contact_sheet(shown), folder / "sheet.png")
    write_json(folder / "sampling.json", protocol)
    write_text(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return [folder / row["file_name"] for row in rows]


def contact_sheet(shown: Sequence[tuple[Request, np.ndarray]]) -> Image.Image:
    """A row for each image, with its hints on the left; white where it has none of a condition."""
    names = list(dict.fromkeys(name for request, _ in shown for name in request.hints))
    blank = np.full_like(shown[0][1], 255)
    rows = [[*(request.hints.get(name, blank) for name in names), image] for request, image in shown]
    captions = ["  ".join([r.prompt[:60], f"seed {r.seed}", *([r.task] if r.task else [])]) for r, _ in shown]
    return sheet(rows, [*names, "sample"], captions)


def remove_samples(folder: Path) -> None:
    """Removes an earlier sampling's files, so that none of its images stays among the new ones.

    Raises `SctoolError` for a folder that cannot be written, or that is somebody else's image set.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table, ours = folder / "metadata.jsonl", (folder / "sampling.json").is_file()
        if table.is_file() and not ours:
            raise SctoolError(f"{folder} is an image set that sctool sample did not write. Choose another --out.")
        table.unlink(missing_ok=True)
        for path in folder.rglob("*.png") if ours else ():
            if re.fullmatch(r"\d{6}", path.stem):
                path.unlink()
    except OSError as error:
        raise SctoolError(f"cannot write samples to {folder}: {error.strerror}. Choose another --out.") from error


def _write_sample(
    folder: Path, name: str, request: Request, image: np.ndarray, protocol: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes one image and what belongs to it; returns its row of metadata."""
    row: dict[str, Any] = {"file_name": name, "prompt": request.prompt, "seed": request.seed}
    row |= {"key": request.key or name[:-4], "label": request.label, "reference": None, "hints": {}}
    row |= {"task": request.task} if request.task else {}
    for condition, hint in request.hints.items():
        row["hints"][condition] = f"{condition}/{name}"
        save_png(Image.fromarray(hint), folder / condition / name)
    if request.reference is not None:
        row["reference"] = f"reference/{name}"
        save_png(Image.fromarray(request.reference), folder / "reference" / name)
    for condition, map in request.maps.items():
        row.setdefault("maps", {})[condition] = f"maps/{condition}/{name}"
        save_png(Image.fromarray(map), folder / "maps" / condition / name)
    save_png(Image.fromarray(image), folder / name, {"sctool": json.dumps({**row, **protocol})})
    return row


def sampling_protocol(
    backbone: Backbone, config: SampleConfig, tuners: Sequence[Mapping[str, Any]] = (), compose: str | None = None
) -> dict[str, Any]:
    """What decides the images apart from prompt, seed and hints: base, tuners with their scales, sampler settings.

    compose: the rule by which several tuners act together, where it was chosen. Key steps are named where there are
    any, so that images drawn without them have one protocol whether or not this was known when they were drawn.
    """
    plain = set() if config.key_steps else {"key_steps"}
    return {
        "base": {"id": backbone.id, "hash": backbone.hash, "family": backbone.family.name},
        "tuners": list(tuners),
        **({"compose": compose} if compose else {}),
        **settled(config, backbone).model_dump(mode="json", exclude=plain),
    }
