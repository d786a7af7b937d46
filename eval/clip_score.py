"""CLIP score: the cosine between a picture and its prompt, raw and in the two scales that papers use.

Hessel et al. 2021 (arXiv 2104.08718, eq. 1): 2.5 max(cos, 0). Text-to-image papers: 100 cos. No prefix is put before
the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..core.errors import SctoolError
from .intervals import PictureFigures

W = 2.5


class ClipScore(PictureFigures):
    """Streaming cosines of pictures and prompts; mergeable."""

    def update(self, images: torch.Tensor, texts: torch.Tensor, positions: Sequence[int] | None = None) -> None:
        """Adds unit embeddings of pictures and of their prompts, (B, D) each, at `positions` of the set."""
        cosines = (images.double() * texts.double()).sum(-1).tolist()
        for index, cos in enumerate(cosines):
            self.add((1, cos, max(cos, 0)), None if positions is None else positions[index])

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Means: "cos" in -1..1, "100" = 100 cos, "w2.5" = 2.5 max(cos, 0)."""
        cos = sums[..., 1] / sums[..., 0]
        return {"cos": cos, "100": 100 * cos, "w2.5": W * sums[..., 2] / sums[..., 0]}

    def compute(self) -> dict[str, float]:
        """The figures of the set. Raises `SctoolError` for no picture."""
        if not self.n:
            raise SctoolError("a CLIP score needs pictures with prompts; there is none.")
        return super().compute()
