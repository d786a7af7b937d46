"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eqs. 1 and 2).

A set's manifold is the union of balls around its features, each reaching to the k-th nearest neighbour. Precision is
the share of drawn images inside the manifold of the real ones, recall the share of real images inside the manifold of
the drawn ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.errors import SctoolError
from ..intervals import BLOCKS, JACKKNIFE, Estimate, jackknife
from .feature_store import FeatureStore
from .meter import SetMeter

K = 3
CHUNK = 1024  # rows of the distance matrix at once


class PrecisionRecall(FeatureStore, SetMeter):
    """Precision and recall of streamed features against the reference features; mergeable. Distances in float64."""

    protocol: ClassVar[dict[str, Any]] = {"neighbours": K, "interval": JACKKNIFE}

    def compute(self, real: np.ndarray) -> dict[str, Estimate]:
        """{"precision", "recall"} against real features (M, D). Raises `SctoolError` with k or fewer on a side."""
        if min(self.n, len(real)) <= K:
            raise SctoolError(
                f"precision and recall need more than {K} images on each side; there are {self.n} and {len(real)}."
            )
        x, y = torch.from_numpy(self.rows()).double(), torch.from_numpy(real).double()
        blocks = torch.from_numpy(self.blocks())
        sizes = torch.bincount(blocks, minlength=BLOCKS).tolist()
        inside = within(x, y, radii(y)[None])[0].numpy()
        # Row 0 of the radii is for the whole set, row 1 + b for the set without block b.
        enough = min(sizes) > 0 and len(x) - max(sizes) > K
        balls = radii_without(x, blocks) if enough else radii(x)[None]
        covered = within(y, x, balls).double().mean(1)

        def precision(block: int) -> float:
            return float(inside[blocks.numpy() != block].mean())

        sizes = sizes if enough else [0]
        return {
            "precision": jackknife(float(inside.mean()), sizes, precision, 0, 1),
            "recall": jackknife(float(covered[0]), sizes, lambda block: float(covered[1 + block]), 0, 1),
        }


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (N, M)."""
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")


def radii(x: Tensor) -> Tensor:
    """Distance (N,) of each feature to its k-th nearest neighbour."""
    return radii_without(x, torch.zeros(len(x), dtype=torch.long), left_out=0)[0]


def radii_without(x: Tensor, blocks: Tensor, left_out: int = BLOCKS) -> Tensor:
    """Radii (1 + G, N): with all of x (N, D), then without each of G blocks; -1 for the members of the block itself."""
    radii = torch.zeros((1 + left_out, len(x)), dtype=x.dtype)
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        matrix = distances(x[rows], x)
        own = torch.arange(len(matrix))
        matrix[own, own + start] = torch.inf
        radii[0, rows] = matrix.kthvalue(K, dim=1).values
        for block in range(left_out):
            radii[1 + block, rows] = matrix[:, blocks != block].kthvalue(K, dim=1).values
    for block in range(left_out):
        radii[1 + block, blocks == block] = -1
    return radii


def within(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Whether each of points (N, D) is in any ball around centres (M, D), for each row of radii (R, M): bool (R, N)."""
    inside = torch.zeros((len(radii), len(points)), dtype=torch.bool)
    for start in range(0, len(points), CHUNK):
        matrix = distances(points[start : start + CHUNK], centres)
        for row, radius in enumerate(radii):
            inside[row, start : start + CHUNK] = (matrix <= radius).any(1)
    return inside
