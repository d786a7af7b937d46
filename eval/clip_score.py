"""CLIP score: the cosine between an image and its prompt, raw and in the two scales that papers use.

Hessel et al. 2021 (arXiv 2104.08718, eq. 1): 2.5 max(cos, 0). Text-to-image papers: 100 cos. No prefix is put before
the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..core.errors import SctoolError
from .batches import Batch
from .features.clip_models import ClipModel
from .intervals import BOOTSTRAP, ImageFigures
from .results import Figure, FolderResults
from .targets import SampleFolder

W = 2.5


class ClipScore(ImageFigures):
    """Streaming cosines of images and prompts; mergeable."""

    def update(self, images: torch.Tensor, texts: torch.Tensor, positions: Sequence[int] | None = None) -> None:
        """Adds unit embeddings of images and of their prompts, (B, D) each, at `positions` of the set."""
        cosines = (images.double() * texts.double()).sum(-1).tolist()
        for index, cos in enumerate(cosines):
            self.add((1, cos, max(cos, 0)), None if positions is None else positions[index])

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Means: "cos" in -1..1, "100" = 100 cos, "w2.5" = 2.5 max(cos, 0)."""
        cos = sums[..., 1] / sums[..., 0]
        return {"cos": cos, "100": 100 * cos, "w2.5": W * sums[..., 2] / sums[..., 0]}

    def compute(self) -> dict[str, float]:
        """The figures of the set. Raises `SctoolError` without any image."""
        if not self.n:
            raise SctoolError("a CLIP score needs images with prompts; there are none.")
        return super().compute()


class ClipMeasurement:
    """The CLIP score of folders of images under one CLIP model."""

    def __init__(self, clip: ClipModel, note: Callable[[str], None]) -> None:
        self.clip, self.note = clip, note

    def meters(self) -> ClipScore:
        """A fresh score for one folder."""
        return ClipScore()

    def update(self, meters: ClipScore, batch: Batch, results: FolderResults) -> None:
        """Adds a batch."""
        for indices, images in batch.by_size:
            texts = self.clip.texts([batch.rows[i]["prompt"] for i in indices])
            meters.update(self.clip.images(images), texts, batch.positions(indices))

    def figures(
        self, meters: ClipScore, folder: SampleFolder, rows: list[dict[str, Any]], results: FolderResults
    ) -> Iterator[Figure]:
        """Cosine and both scales; the results' images get their cosines, since the other scales order them alike."""
        label = self.clip.label
        suffix, stem = (f" ({label})", f"clip_{label}") if label else ("", "clip")
        if self.clip.truncated:
            self.note(f"{self.clip.truncated} prompts were longer than the CLIP model's context and were truncated.")
        protocol = {
            "metric": f"CLIP score{suffix}", **self.clip.protocol, "prefix": "", "interval": BOOTSTRAP,
            **folder.protocol(rows),
        }  # fmt: skip
        names = {
            "cos": f"CLIP cosine{suffix}",
            "100": f"CLIP score{suffix}, 100 cos",
            "w2.5": f"CLIP score{suffix}, w=2.5",
        }
        intervals = meters.intervals()
        for key, value in meters.compute().items():
            yield Figure(f"{stem}_{key}", names[key], value, "higher", protocol, intervals.get(key))
        results.set_values(f"{stem}_cos", meters.per_image()["cos"])
