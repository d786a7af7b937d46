"""Kernel Inception distance (Bińkowski et al. 2018, arXiv 1801.01401, section 4).

The unbiased squared MMD with k(x, y) = (x·y / D + 1)^3, averaged over 100 subsets of 1000 images per side, or of all if
there are fewer. Subsets are drawn as torch-fidelity draws them, so the figures agree. Unlike the Fréchet distance it
is not biased by small sets.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ...core.errors import SctoolError
from ..intervals import JACKKNIFE, Estimate
from .feature_store import FeatureStore
from .meter import SetMeter
from .mmd import kernel_sums

SUBSETS, SUBSET, SEED = 100, 1000, 2020


def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k (N, M) of features (N, D) and (M, D)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


class KernelDistance(FeatureStore, SetMeter):
    """KID of streamed features to the reference features; mergeable."""

    protocol: ClassVar[dict[str, Any]] = {
        "kernel": "(x.y/d + 1)^3, unbiased",
        "subsets": f"{SUBSETS} of {SUBSET} or all, seed {SEED}",
        "interval": JACKKNIFE,
    }

    def compute(self, real: np.ndarray) -> dict[str, Estimate]:
        """{"kid": distance to real features (M, D)}; it may be slightly negative. Raises `SctoolError` with too few."""
        if min(self.n, len(real)) < 2:
            raise SctoolError(f"a KID needs at least 2 images on each side; there are {self.n} and {len(real)}.")
        x = self.rows()
        sums = kernel_sums(x, self.blocks(), real, polynomial)
        size = min(SUBSET, len(x), len(real))
        if size == len(x) == len(real):
            value = sums.mmd2(unbiased=True)  # every subset would be the whole set
        else:
            value = float(np.mean(subset_distances(x, real, size)))
        return {"kid": sums.estimate(value, 1, unbiased=True)}


def subset_distances(x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """The unbiased MMD² (SUBSETS,) of seeded subsets of `size` rows of x (N, D) and y (M, D)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    random = np.random.RandomState(SEED)  # torch-fidelity's and clean-fid's generator
    distances = np.zeros(SUBSETS)
    for i in range(SUBSETS):
        a = x[random.choice(len(x), size, replace=False)]
        b = y[random.choice(len(y), size, replace=False)]
        aa, bb = polynomial(a, a), polynomial(b, b)
        own = aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)
        distances[i] = own / (size * (size - 1)) - 2 * polynomial(a, b).mean()
    return distances
