"""Stored features, for metrics that compare every image with every other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..intervals import BLOCKS


class FeatureStore:
    """Features (N, D) float32 in the order of their images' positions; mergeable over processes."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._positions: list[int] = []

    @property
    def n(self) -> int:
        """Images stored."""
        return len(self._positions)

    def update(self, features: torch.Tensor | np.ndarray, positions: Sequence[int] | None = None) -> None:
        """Adds features (B, D) of the images at `positions` of the set; the next ones by default."""
        if isinstance(features, torch.Tensor):
            features = features.detach().float().cpu().numpy()
        indices = list(range(self.n, self.n + len(features)) if positions is None else positions)
        if len(indices) != len(features):
            raise ValueError(f"{len(features)} features and {len(indices)} positions")
        self._parts.append(np.asarray(features, dtype=np.float32))
        self._positions += indices

    def merge(self, other: FeatureStore) -> None:
        """Adds what another process stored."""
        self._parts += other._parts
        self._positions += other._positions

    def rows(self) -> np.ndarray:
        """(N, D) float32, ordered by position whatever the order of arrival."""
        if not self._parts:
            return np.zeros((0, 0), np.float32)
        return np.concatenate(self._parts)[np.argsort(self._positions, kind="stable")]

    def blocks(self) -> np.ndarray:
        """The jackknife block (N,) of each row of `rows`."""
        return np.sort(self._positions, kind="stable").astype(np.int64) % BLOCKS
