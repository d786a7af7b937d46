"""CMMD (Jayasumana et al. 2024, arXiv 2401.09603): MMD² of CLIP embeddings with a Gaussian kernel, times 1000.

Embeddings of unit length, k(x, y) = exp(-|x - y|² / (2 σ²)), σ = 10, the biased estimate, as in the authors' code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ...core.errors import SctoolError
from ..intervals import JACKKNIFE, Estimate
from .feature_store import FeatureStore
from .meter import SetMeter
from .mmd import kernel_sums

SIGMA, SCALE = 10.0, 1000.0


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k (N, M) of features (N, D) and (M, D)."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.exp(-np.maximum(squares, 0) / (2 * SIGMA**2))


def unit(features: np.ndarray) -> np.ndarray:
    """Rows (N, D) scaled to length 1, float64."""
    features = features.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)


class ClipDiscrepancy(FeatureStore, SetMeter):
    """CMMD of streamed CLIP embeddings to the reference embeddings; mergeable."""

    protocol: ClassVar[dict[str, Any]] = {
        "kernel": f"Gaussian, sigma {SIGMA:g}, unit embeddings, biased, x {SCALE:g}",
        "interval": JACKKNIFE,
    }

    def compute(self, real: np.ndarray) -> dict[str, Estimate]:
        """{"cmmd": discrepancy to real embeddings (M, D)}. Raises `SctoolError` if a side is empty."""
        if not self.n or not len(real):
            raise SctoolError(f"a CMMD needs images on each side; there are {self.n} and {len(real)}.")
        sums = kernel_sums(unit(self.rows()), self.blocks(), unit(real), gaussian)
        return {"cmmd": sums.estimate(SCALE * sums.mmd2(unbiased=False), SCALE, unbiased=False, low=0)}
