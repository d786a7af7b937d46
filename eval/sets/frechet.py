"""Fréchet distance of two feature sets (Heusel et al. 2017, arXiv 1706.08500, eq. 6), in float64, without sqrtm.

d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

With S2 = A A^T, from Cholesky's factors, the last trace is the sum of square roots of the eigenvalues of the symmetric
A^T S1 A, which is exact, real and several times faster than `scipy.linalg.sqrtm`. With fewer images than dimensions
the covariances are singular; the trace is then the nuclear norm of the product of the centred features, which needs no
covariance at all.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from ...core.errors import SctoolError, UsageError
from ...core.files import write_bytes
from ..features.choosing import Extractor
from ..intervals import BLOCKS, JACKKNIFE, Estimate, blocks_of, jackknife
from .meter import SetMeter

ENOUGH = 10_000
"""Images below which the distance is noticeably biased upwards (the bias falls as 1/N)."""
TOLERANCE = 1e-3
"""Share of sigma's largest entry by which a covariance stored in half precision may be off."""
FLUSH = 512  # features added to the matrix at once


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of N features; `centred` (N, D) is kept if N <= D.

    `n` is None for statistics files without it, such as pytorch-fid's.
    """

    mu: np.ndarray
    sigma: np.ndarray = field(repr=False)
    n: int | None
    centred: np.ndarray | None = field(default=None, repr=False)

    @cached_property
    def root(self) -> torch.Tensor:
        """A (D, D) with A A^T = sigma; cached, since many sets are compared to the same reference."""
        sigma = torch.from_numpy(self.sigma)
        factor, failed = torch.linalg.cholesky_ex(sigma)
        if not failed:
            return factor
        values, vectors = torch.linalg.eigh(sigma)  # singular: slower, but works
        return vectors * values.clamp(min=0).sqrt()

    def save(self, path: str | Path) -> None:
        """Writes an .npz with `mu`, `sigma` (as pytorch-fid names them) and `n`. Atomic."""
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mu, sigma=self.sigma, n=np.array(-1 if self.n is None else self.n))
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Reads an .npz with `mu` and `sigma`; pickled arrays are refused.

        Raises `UsageError` for other files, and for arrays that are not a mean and a covariance.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = (file[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma"))
                n = int(file["n"]) if "n" in file else -1
        except OSError as error:
            raise UsageError(f"--reference {path} cannot be read: {error.strerror or error}.") from error
        except Exception as error:  # NumPy's reader raises a dozen types for damaged, pickled and other files
            raise UsageError(
                f"--reference {path} is not a statistics file: an .npz with the arrays mu and sigma, as written by "
                "pytorch-fid and --save-stats."
            ) from error
        if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
            raise UsageError(f"--reference {path}: mu is {mu.shape} and sigma {sigma.shape}; they do not fit together.")
        fault = _covariance_fault(mu, sigma)
        if fault:
            raise UsageError(f"--reference {path}: {fault}. Create it again from the images with --save-stats.")
        return cls(mu, sigma, n if n >= 0 else None)


def _covariance_fault(mu: np.ndarray, sigma: np.ndarray) -> str | None:
    """Why mu (D,) and sigma (D, D) are not a mean and a covariance, up to rounding; None where they are."""
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return "mu or sigma contains NaN or infinity"
    slack = TOLERANCE * np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > slack:
        return "sigma is not symmetric, so it is not a covariance"
    if float(torch.linalg.eigvalsh(torch.from_numpy(sigma)).min()) < -slack:
        return "sigma has negative eigenvalues, so it is not a covariance"
    return None


class FrechetStats:
    """Streaming moments of features: n, sum x, sum x x^T. Mergeable over processes; order affects only rounding.

    Up to `dim` features are stored as they are, which takes less memory than the matrix. Further ones are added to it
    in large batches, since a product of few rows costs as much as one of many.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.n = dim, 0
        self._rows: list[np.ndarray] = []
        self._waiting = 0
        self._sum = np.zeros(dim)
        self._outer: np.ndarray | None = None

    def update(self, features: torch.Tensor | np.ndarray) -> None:
        """Adds features (B, D)."""
        if isinstance(features, torch.Tensor):
            features = features.detach().double().cpu().numpy()
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"features are {x.shape}, not (B, {self.dim})")
        self.n += len(x)
        self._sum = self._sum + x.sum(0)
        self._rows.append(x)
        self._waiting += len(x)
        if self.n > self.dim and (self._outer is None or self._waiting >= FLUSH):
            self._flush()

    def merge(self, other: FrechetStats) -> None:
        """Adds what another process counted."""
        if other._outer is not None:
            self._flush()
            assert self._outer is not None
            waiting = other._stored()
            self.n += other.n - len(waiting)
            self._sum = self._sum + other._sum - waiting.sum(0)
            self._outer = self._outer + other._outer
        if other._rows:
            self.update(other._stored())

    def _stored(self) -> np.ndarray:
        return np.concatenate([np.zeros((0, self.dim)), *self._rows])

    def _flush(self) -> None:
        waiting = self._stored()
        product = waiting.T @ waiting
        self._outer = product if self._outer is None else self._outer + product
        self._rows, self._waiting = [], 0

    def compute(self) -> Moments:
        """Mean and covariance. Raises `SctoolError` with fewer than two features."""
        if self.n < 2:
            raise SctoolError(f"a Fréchet distance needs at least 2 images on each side; there are {self.n}.")
        mu = self._sum / self.n
        if self._outer is None:
            centred = self._stored() - mu
            return Moments(mu, centred.T @ centred / (self.n - 1), self.n, centred)
        self._flush()
        sigma = (self._outer - self.n * np.outer(mu, mu)) / (self.n - 1)
        return Moments(mu, (sigma + sigma.T) / 2, self.n)


class FrechetDistance(SetMeter):
    """The Fréchet distance of streamed features to a reference, with its interval; mergeable.

    Moments are stored per block of images, so that a block can be left out without a second pass.
    """

    protocol: ClassVar[dict[str, Any]] = {"interval": JACKKNIFE}

    def __init__(self, dim: int) -> None:
        self.blocks = [FrechetStats(dim) for _ in range(BLOCKS)]

    @classmethod
    def for_extractor(cls, extractor: Extractor) -> Self:
        """An empty meter for features of the extractor's dimension."""
        return cls(extractor.dim)

    @property
    def n(self) -> int:
        """Images counted."""
        return sum(block.n for block in self.blocks)

    def update(self, features: torch.Tensor | np.ndarray, positions: Sequence[int] | None = None) -> None:
        """Adds features (B, D) of the images at `positions` of the set; the next ones by default."""
        blocks = blocks_of(len(features), self.n, positions)
        for block in np.unique(blocks):
            self.blocks[block].update(features[blocks == block])

    def merge(self, other: FrechetDistance) -> None:
        """Adds what another process counted."""
        for block, addition in zip(self.blocks, other.blocks, strict=True):
            block.merge(addition)

    def moments(self, without: int | None = None) -> Moments:
        """Moments of all features, or of all but one block. Raises `SctoolError` with fewer than two features."""
        total = FrechetStats(self.blocks[0].dim)
        for index, block in enumerate(self.blocks):
            if index != without:
                total.merge(block)
        return total.compute()

    def compute(self, real: Moments) -> dict[str, Estimate]:
        """{"fid": distance to `real` with its interval}. Raises `SctoolError` as `frechet_distance` does."""

        def without(block: int) -> float:
            return frechet_distance(self.moments(block), real)

        value = frechet_distance(self.moments(), real)
        return {"fid": jackknife(value, [block.n for block in self.blocks], without, low=0)}

    def caveat(self, extractor: Extractor, references: int | None) -> str | None:
        """The bias of small sets; see `small_sample_note`."""
        return small_sample_note(extractor.label, min(self.n, references or self.n), extractor.dim)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of two Gaussians with these moments (called FID with Inception features).

    The expensive half of the work is cached in `b`, so `b` should be the reference. Raises `SctoolError` when the
    dimensions differ.
    """
    if len(a.mu) != len(b.mu):
        raise SctoolError(f"features of {len(a.mu)} and {len(b.mu)} dimensions come from different extractors.")
    both = a.centred is not None and b.centred is not None
    cross = _trace_of_features(a, b) if both else _trace_of_covariances(a.sigma, b.root)
    distance = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross
    return max(float(distance), 0.0)  # rounding may give -1e-12 for equal sets


def _trace_of_features(a: Moments, b: Moments) -> float:
    """tr (S1 S2)^(1/2) as the nuclear norm of X Y^T / sqrt((n-1)(m-1)), X (n, D) and Y (m, D) centred."""
    x, y = a.centred, b.centred
    assert x is not None
    assert y is not None
    product = torch.from_numpy(x) @ torch.from_numpy(y).T
    return float(torch.linalg.svdvals(product).sum() / np.sqrt((len(x) - 1) * (len(y) - 1)))


def _trace_of_covariances(sigma: np.ndarray, root: torch.Tensor) -> float:
    """tr (S1 S2)^(1/2): with S2 = A A^T it is the sum of square roots of the eigenvalues of A^T S1 A."""
    product = root.T @ torch.from_numpy(sigma) @ root
    return float(torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum())


def small_sample_note(name: str, n: int, dim: int) -> str | None:
    """A warning about a distance computed from `n` images; None where they are enough."""
    if n >= ENOUGH:
        return None
    rank = f", fewer than its {dim} dimensions" if n < dim else ""
    return f"{name} from {n} images{rank}: biased upwards; compare it only with figures of the same N."
