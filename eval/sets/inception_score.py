"""Inception score (Salimans et al. 2016, arXiv 1606.03498, section 4): exp E KL(p(y|x) || p(y)), mean of ten splits.

An image's split is its position modulo ten: a shuffle that needs no second pass and is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch

from ...core.errors import SctoolError
from ..features.choosing import Extractor
from ..features.inception import InceptionFeatures
from ..intervals import BLOCKS, JACKKNIFE, Estimate, blocks_of, jackknife
from .meter import SetMeter


class InceptionScore(SetMeter):
    """Streaming sums per split of class probabilities and of their negative entropies; mergeable; float64."""

    protocol: ClassVar[dict[str, Any]] = {
        "classes": "1008, logits without bias",
        "splits": f"{BLOCKS}, position modulo {BLOCKS}",
        "interval": JACKKNIFE,
    }

    def __init__(self, classes: int) -> None:
        self._count = np.zeros(BLOCKS, np.int64)
        self._p = np.zeros((BLOCKS, classes))
        self._p_log_p = np.zeros(BLOCKS)

    @classmethod
    def for_extractor(cls, extractor: Extractor) -> Self:
        """An empty score for Inception's classes."""
        assert isinstance(extractor, InceptionFeatures)
        return cls(extractor.classes)

    @staticmethod
    def inputs(extractor: Extractor, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of the features (B, D)."""
        assert isinstance(extractor, InceptionFeatures)
        return extractor.logits(features)

    @property
    def n(self) -> int:
        """Images counted."""
        return int(self._count.sum())

    def update(self, features: torch.Tensor | np.ndarray, positions: Sequence[int] | None = None) -> None:
        """Adds logits (B, C) of the images at `positions` of the set; the next ones by default."""
        x = torch.as_tensor(features).detach().double().cpu()
        p, log_p = x.softmax(1).numpy(), x.log_softmax(1).numpy()
        member = np.eye(BLOCKS)[blocks_of(len(p), self.n, positions)]
        self._count += member.sum(0).astype(np.int64)
        self._p += member.T @ p
        self._p_log_p += (p * log_p).sum(1) @ member

    def merge(self, other: InceptionScore) -> None:
        """Adds what another process counted."""
        self._count = self._count + other._count
        self._p = self._p + other._p
        self._p_log_p = self._p_log_p + other._p_log_p

    def compute(self, real: None = None) -> dict[str, Estimate]:
        """{"is": mean over splits}. Raises `SctoolError` without any image."""
        filled = self._count > 0
        if not filled.any():
            raise SctoolError("an Inception score needs images; there are none.")
        count = self._count[filled]
        mean = self._p[filled] / count[:, None]
        entropy = np.where(mean > 0, mean * np.log(np.maximum(mean, 1e-300)), 0).sum(1)
        scores = np.exp(self._p_log_p[filled] / count - entropy)
        value = float(scores.mean())
        return {
            "is": jackknife(value, self._count.tolist(), lambda block: float(np.delete(scores, block).mean()), low=1)
        }
