"""The teacher's outputs on disk: a few fixed draws of noise per image, each computed once.

A student that sees every image many times then costs no teacher. It sees fewer different noises: `cache` of them per
image, which of them a step's own random timestep decides, so that a resumed run takes the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.noising import Noising
from ..data.cache import TensorCache
from ..training.batches import Draw
from ..training.objective import Sample
from ..training.seeds import generator


class TeacherCache:
    """Outputs (C, h, w) in float16 by image and number of the draw, in a folder of the run."""

    def __init__(self, folder: Path, draws: int, seed: int, noising: Noising, dropout: float) -> None:
        self.rows, self.draws, self.seed = TensorCache(folder), draws, seed
        self.noising, self.dropout = noising, dropout

    def fixed(self, batch: Mapping[str, Any], draw: Draw) -> tuple[Draw, list[str]]:
        """The batch's draw replaced by fixed ones, and the key of each sample."""
        numbers = (draw.t % self.draws).tolist()
        images = [_digest(mean, batch["text"], place) for place, mean in enumerate(batch["mean"])]
        keys = [f"{image}-{number}" for image, number in zip(images, numbers, strict=True)]
        posterior, noise, t, dropped = [], [], [], []
        for key in keys:
            source = generator(self.seed, "teacher", key)
            posterior.append(torch.randn(draw.posterior.shape[1:], generator=source))
            noise.append(torch.randn(draw.noise.shape[1:], generator=source))
            t.append(self.noising.timesteps(1, source))
            dropped.append(torch.rand(1, generator=source) < self.dropout)
        new = replace(
            draw, posterior=torch.stack(posterior), noise=torch.stack(noise), t=torch.cat(t),
            drop_caption=torch.cat(dropped),
        )  # fmt: skip
        return new, keys

    def outputs(self, keys: list[str], sample: Sample, run: Callable[[Sample], Tensor]) -> Tensor:
        """The teacher's outputs for the fixed draws; computed for the whole batch where one is missing, and kept."""
        if missing := self.rows.missing(keys):
            made = run(sample).to(torch.float16).cpu()
            self.rows.write(missing, {"output": torch.stack([made[keys.index(key)] for key in missing])})
        return torch.stack([self.rows.read(key)["output"] for key in keys]).to(sample.noisy.device)


def _digest(mean: Tensor, text: Mapping[str, Tensor], place: int) -> str:
    """What tells an image of the batch, mirrored or not, and its caption from all others."""
    parts = [mean, *(text[name][place] for name in sorted(text))]
    return hashlib.sha256(b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)).hexdigest()
