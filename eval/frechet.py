"""Fréchet distance of two feature sets (Heusel et al. 2017, arXiv 1706.08500, eq. 6), in float64, without sqrtm.

d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

The last trace is a sum of square roots of eigenvalues of a symmetric matrix, which is exact, real and several times
faster than `scipy.linalg.sqrtm`. With fewer pictures than dimensions the covariances are singular; the trace is then
the nuclear norm of the product of the centred features, which needs no covariance at all.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..core.errors import SctoolError, UsageError
from ..core.files import write_bytes

ENOUGH = 10_000
"""Pictures below which the distance is visibly biased upwards (the bias falls as 1/N)."""


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of N features; `centred` (N, D) is kept where N <= D.

    `n` is None for statistics files that do not say it, such as pytorch-fid's.
    """

    mu: np.ndarray
    sigma: np.ndarray = field(repr=False)
    n: int | None
    centred: np.ndarray | None = field(default=None, repr=False)

    def save(self, path: str | Path) -> None:
        """Writes an .npz with `mu`, `sigma` (as pytorch-fid names them) and `n`. Atomic."""
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mu, sigma=self.sigma, n=np.array(-1 if self.n is None else self.n))
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Reads an .npz with `mu` and `sigma`; pickled arrays are refused. Raises `UsageError` for other files."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
                n = int(file["n"]) if "n" in file else -1
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UsageError(f"--reference {path} is no statistics file with mu and sigma: {error}.") from error
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UsageError(f"--reference {path}: mu is {mu.shape} and sigma {sigma.shape}; they belong not together.")
        return cls(mu, sigma, n if n >= 0 else None)


class FrechetStats:
    """Streaming moments of features: n, sum x, sum x x^T. Mergeable over processes, and exact in any order to rounding.

    Until more than `dim` features have come they are kept as they are, which takes less room than the matrix.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.n = dim, 0
        self._rows: list[np.ndarray] | None = []
        self._sum = np.zeros(dim)
        self._outer = np.zeros((0, 0))

    def update(self, features: torch.Tensor | np.ndarray) -> None:
        """Adds features (B, D)."""
        if isinstance(features, torch.Tensor):
            features = features.detach().double().cpu().numpy()
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"features are {x.shape}, not (B, {self.dim})")
        self.n += len(x)
        self._sum = self._sum + x.sum(0)
        if self._rows is None:
            self._outer += x.T @ x
            return
        self._rows.append(x)
        if self.n > self.dim:
            kept = np.concatenate(self._rows)
            self._outer, self._rows = kept.T @ kept, None

    def merge(self, other: FrechetStats) -> None:
        """Adds what another process has counted."""
        if other._rows is not None:
            for rows in other._rows:
                self.update(rows)
            return
        if self._rows is not None:
            kept = np.concatenate([np.zeros((0, self.dim)), *self._rows])
            self._outer, self._rows = kept.T @ kept, None
        self.n += other.n
        self._sum = self._sum + other._sum
        self._outer = self._outer + other._outer

    def compute(self) -> Moments:
        """Mean and covariance. Raises `SctoolError` for fewer than two features."""
        if self.n < 2:
            raise SctoolError(f"a Fréchet distance needs at least 2 pictures on each side; there are {self.n}.")
        mu = self._sum / self.n
        if self._rows is not None:
            centred = np.concatenate(self._rows) - mu
            return Moments(mu, centred.T @ centred / (self.n - 1), self.n, centred)
        sigma = (self._outer - self.n * np.outer(mu, mu)) / (self.n - 1)
        return Moments(mu, (sigma + sigma.T) / 2, self.n)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of two Gaussians with these moments (what is called FID with Inception features).

    Raises `SctoolError` when the dimensions differ.
    """
    if len(a.mu) != len(b.mu):
        raise SctoolError(f"features of {len(a.mu)} and {len(b.mu)} dimensions cannot be compared: other extractors.")
    both = a.centred is not None and b.centred is not None
    cross = _trace_of_features(a, b) if both else _trace_of_covariances(a.sigma, b.sigma)
    distance = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross
    return max(float(distance), 0.0)  # rounding may leave -1e-12 for equal sets


def _trace_of_features(a: Moments, b: Moments) -> float:
    """tr (S1 S2)^(1/2) as the nuclear norm of X Y^T / sqrt((n-1)(m-1)), X (n, D) and Y (m, D) centred."""
    x, y = a.centred, b.centred
    assert x is not None
    assert y is not None
    product = torch.from_numpy(x) @ torch.from_numpy(y).T
    return float(torch.linalg.svdvals(product).sum() / np.sqrt((len(x) - 1) * (len(y) - 1)))


def _trace_of_covariances(first: np.ndarray, second: np.ndarray) -> float:
    """tr (S1 S2)^(1/2): with S1 = A A^T it is the sum of square roots of the eigenvalues of A^T S2 A."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(first))
    root = vectors * values.clamp(min=0).sqrt()
    product = root.T @ torch.from_numpy(second) @ root
    return float(torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum())


def small_sample_note(name: str, n: int, dim: int) -> str | None:
    """What to say of a distance from `n` pictures; None where they are enough."""
    if n >= ENOUGH:
        return None
    rank = f", fewer than its {dim} dimensions" if n < dim else ""
    return f"{name} from {n} pictures{rank}: biased upwards; compare it only with figures of the same N."
