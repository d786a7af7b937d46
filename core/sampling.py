"""Drawing pictures: unmodified diffusers pipelines with tuners attached; folders of samples that explain themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image

from .backbones.loading import Backbone
from .config import SampleConfig
from .errors import SctoolError, UsageError
from .files import write_json, write_text
from .sheets import save_png, sheet

SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
Text = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Request:
    """One picture to draw: prompt, seed, hints as uint8 (H, W, 3) by condition, and what it is compared to.

    `maps` are the raw maps (H, W) behind hints that do not show all of them, such as class ids.
    """

    prompt: str
    seed: int
    hints: Mapping[str, np.ndarray] = field(default_factory=dict)
    reference: np.ndarray | None = None
    key: str = ""
    label: str | None = None
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """x_T as (B, C, h, w) float32 on the CPU; each picture's noise depends on its own seed alone."""
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def hint_tensor(hints: Sequence[np.ndarray], device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 (H, W, 3) maps as one float32 (B, 3, H, W) in 0..1."""
    return torch.from_numpy(np.stack(hints)).permute(0, 3, 1, 2).to(device).float() / 255


@torch.no_grad()
def generate(
    backbone: Backbone,
    text: Text,
    empty: Text,
    seeds: Sequence[int],
    config: SampleConfig,
    hints: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draws one batch with whatever tuners are attached to the backbone; uint8 (B, 3, H, W).

    `text` holds a row per picture, `empty` the encoding of the negative prompt (1 row). `hints` are float (B, 3, H, W)
    in 0..1 by condition; they reach the tuners through the pipeline's open channel, `cross_attention_kwargs`.
    """
    pipe, device, dtype = backbone.pipe, backbone.device, backbone.denoiser.dtype
    size = config.size or backbone.resolution
    side = size // backbone.vae_scale
    count = len(seeds)
    scheduler = SCHEDULERS[config.scheduler].from_config(pipe.scheduler.config)
    kept, pipe.scheduler = pipe.scheduler, scheduler
    arguments: dict[str, Any] = {
        "prompt_embeds": text["prompt_embeds"].to(device, dtype),
        "negative_prompt_embeds": empty["prompt_embeds"].to(device, dtype).expand(count, -1, -1),
    }
    if "pooled" in text:
        arguments["pooled_prompt_embeds"] = text["pooled"].to(device, dtype)
        arguments["negative_pooled_prompt_embeds"] = empty["pooled"].to(device, dtype).expand(count, -1)
    if hints:
        arguments["cross_attention_kwargs"] = {"hint": {name: h.to(device) for name, h in hints.items()}}
    try:
        latents = pipe(
            height=size,
            width=size,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            guidance_rescale=config.rescale,
            latents=initial_noise(seeds, (backbone.latent_channels, side, side)).to(device, dtype),
            output_type="latent",
            return_dict=False,
            **arguments,
        )[0]
    finally:
        pipe.scheduler = kept
    return backbone.decode(latents)


def draw(
    backbone: Backbone,
    requests: Sequence[Request],
    config: SampleConfig,
    progress: Callable[[int], None] = lambda done: None,
    encode: Callable[[list[str]], Text] | None = None,
) -> Iterator[tuple[Request, np.ndarray]]:
    """Draws every request in batches; yields uint8 (H, W, 3) pictures in order.

    Pictures with the same set of hints share a batch. `encode` turns prompts into text rows; the backbone's own
    encoder when not given.
    """
    encode = encode or backbone.encode_prompts
    size = config.size or backbone.resolution
    if size % max(8, backbone.vae_scale):
        raise UsageError(
            f"size={size} is not divisible by {max(8, backbone.vae_scale)}, the step of the base's latents."
        )
    for request in requests:
        for name, hint in request.hints.items():
            if hint.shape[:2] != (size, size):
                raise UsageError(f"hint '{name}' is {hint.shape[1]}x{hint.shape[0]} px, the picture {size}x{size} px.")
    empty = encode([config.negative])
    start = 0
    while start < len(requests):
        names = set(requests[start].hints)
        stop = start + 1
        while stop < len(requests) and stop - start < config.batch and set(requests[stop].hints) == names:
            stop += 1
        batch = requests[start:stop]
        hints = {name: hint_tensor([r.hints[name] for r in batch], backbone.device) for name in sorted(names)}
        text = encode([r.prompt for r in batch])
        pictures = generate(backbone, text, empty, [r.seed for r in batch], config, hints or None)
        yield from zip(batch, pictures.permute(0, 2, 3, 1).numpy(), strict=True)
        progress(len(batch))
        start = stop


def write_samples(
    folder: str | Path,
    drawn: Iterator[tuple[Request, np.ndarray]],
    protocol: Mapping[str, Any],
) -> list[Path]:
    """Writes pictures, hints and references with all that is needed to make them again; gives the pictures' paths.

    FOLDER/000000.png ..., metadata.jsonl (file_name, prompt, seed, key, label, reference, hints, and maps where there
    are any), sampling.json (protocol) and sheet.png. Each PNG also carries its own row and the protocol. The list of
    pictures is written last: a folder with metadata.jsonl is a complete one.
    """
    folder = Path(folder)
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    rows, paths, grid = [], [], []
    for index, (request, picture) in enumerate(drawn):
        name = f"{index:06d}.png"
        row: dict[str, Any] = {"file_name": name, "prompt": request.prompt, "seed": request.seed}
        row |= {"key": request.key or name[:-4], "label": request.label, "reference": None, "hints": {}}
        for kind, image in [
            *request.hints.items(),
            *([("reference", request.reference)] if request.reference is not None else []),
        ]:
            relative = f"{kind}/{name}"
            save_png(Image.fromarray(image), folder / relative)
            if kind == "reference":
                row["reference"] = relative
            else:
                row["hints"][kind] = relative
        for kind, map in request.maps.items():
            relative = f"maps/{kind}/{name}"
            save_png(Image.fromarray(map), folder / relative)
            row.setdefault("maps", {})[kind] = relative
        save_png(Image.fromarray(picture), folder / name, {"sctool": json.dumps({**row, **protocol})})
        rows.append(row)
        paths.append(folder / name)
        if len(grid) < 16:
            grid.append(([*request.hints.values(), picture], f"{request.prompt[:60]}  seed {request.seed}"))
    if not rows:
        raise SctoolError(f"nothing was drawn into {folder}: there was no prompt.")
    columns = len(grid[0][0])
    uniform = [(cells, text) for cells, text in grid if len(cells) == columns]
    headings = [*rows[0]["hints"], "sample"]
    save_png(sheet([c for c, _ in uniform], headings, [t for _, t in uniform]), folder / "sheet.png")
    write_json(folder / "sampling.json", protocol)
    write_text(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return paths


def protocol(backbone: Backbone, config: SampleConfig, tuners: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What decides the pictures apart from prompt, seed and hints: base, tuners with their scales, sampler settings."""
    return {
        "base": {"id": backbone.id, "hash": backbone.hash, "family": backbone.family},
        "tuners": list(tuners),
        **config.model_dump(mode="json"),
        "size": config.size or backbone.resolution,
    }
