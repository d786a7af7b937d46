"""Squared maximum mean discrepancy of two feature sets (Gretton et al. 2012, JMLR 13, eqs. 3 and 5) from sums of
kernel values per block of images, so that the figure without a block costs nothing more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..intervals import BLOCKS, Estimate, jackknife

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
CHUNK = 1024  # rows of the kernel matrix at once


@dataclass(frozen=True)
class KernelSums:
    """Sums of k(x, x') per pair of blocks (G, G), of k(x, x) and k(x, y) per block (G,), of k(y, y') without y = y'."""

    within: np.ndarray
    diagonal: np.ndarray
    across: np.ndarray
    real: float
    real_diagonal: float
    sizes: np.ndarray
    m: int

    def mmd2(self, unbiased: bool, without: int | None = None) -> float:
        """The squared discrepancy of all images, or of all but one block; the unbiased one may be negative."""
        included = np.arange(len(self.sizes)) != (-1 if without is None else without)
        n, m = float(self.sizes[included].sum()), self.m
        xx, xy = self.within[np.ix_(included, included)].sum(), self.across[included].sum()
        if unbiased:
            own = (xx - self.diagonal[included].sum()) / (n * (n - 1))
            return float(own + self.real / (m * (m - 1)) - 2 * xy / (n * m))
        return float(xx / n**2 + (self.real + self.real_diagonal) / m**2 - 2 * xy / (n * m))

    def estimate(self, value: float, scale: float, unbiased: bool, low: float = -np.inf) -> Estimate:
        """`value` with the jackknife interval of scale * mmd2."""
        sizes = [int(size) for size in self.sizes]
        return jackknife(value, sizes, lambda block: scale * self.mmd2(unbiased, block), low=low)


def kernel_sums(x: np.ndarray, blocks: np.ndarray, y: np.ndarray, kernel: Kernel) -> KernelSums:
    """Sums over generated features x (N, D) in `blocks` (N,) and real features y (M, D); float64, in chunks of rows."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    member = np.eye(BLOCKS)[blocks]  # (N, G)
    within, across, diagonal = np.zeros((BLOCKS, BLOCKS)), np.zeros(BLOCKS), np.zeros(BLOCKS)
    for start in range(0, len(x), CHUNK):
        part, own = x[start : start + CHUNK], member[start : start + CHUNK]
        values = kernel(part, x)
        within += own.T @ values @ member
        diagonal += np.diagonal(values, start) @ own
        across += kernel(part, y).sum(1) @ own
    real = real_diagonal = 0.0
    for start in range(0, len(y), CHUNK):
        values = kernel(y[start : start + CHUNK], y)
        trace = float(np.diagonal(values, start).sum())
        real, real_diagonal = real + float(values.sum()) - trace, real_diagonal + trace
    return KernelSums(within, diagonal, across, real, real_diagonal, member.sum(0), len(y))
