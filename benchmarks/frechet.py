"""What the Fréchet distance costs without sqrtm: its trace against `scipy.linalg.sqrtm`, in turns, CPU time.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/frechet.py
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/frechet.py --turns 1 --few 500

Correlated random features of 2048 dimensions: 5000 a side, where the covariances have full rank and the trace is a sum
of square roots of eigenvalues, and 500 a side, where it is the nuclear norm of a product of features. Both sides get
the same means and covariances, ours with 500 the centred features too; what is timed is the whole distance from them.
CPU time is what the process used on all its threads; the best turn counts, and the root of the reference's covariance,
which evaluation keeps, is made anew in each.
Exit code 1 when sqrtm is less than `LIMIT` times slower or the two disagree by more than rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from scipy import linalg

from sctool.eval.sets.frechet import FrechetStats, Moments, frechet_distance

DIM, LIMIT = 2048, 3.0
CLOSE = {True: 1e-9, False: 1e-5}  # by full rank or not: sqrtm of a singular matrix is itself no better


def features(count: int, seed: int) -> np.ndarray:
    """(N, 2048) features that are correlated and never negative, as pooled activations are."""
    mixing = np.random.default_rng(0).normal(size=(DIM, DIM)) / np.sqrt(DIM)
    random = np.random.default_rng(seed)
    scale = np.linspace(1, 0.02, DIM) ** 2
    return np.maximum(random.normal(size=(count, DIM)) * scale @ mixing + 0.05 * seed, 0)


def moments(count: int, seed: int) -> Moments:
    """What both sides start from."""
    stats = FrechetStats(DIM)
    stats.update(features(count, seed))
    return stats.compute()


def with_sqrtm(a: Moments, b: Moments) -> float:
    """The formula as pytorch-fid and its like compute it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = linalg.sqrtm(a.sigma @ b.sigma)
    return float(((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root.real))


def ours(a: Moments, b: Moments) -> float:
    """The project's, with nothing kept from the turn before."""
    return frechet_distance(a, Moments(b.mu, b.sigma, b.n, b.centred))


def seconds(work: Callable[[], float]) -> tuple[float, float]:
    """(CPU seconds, value)."""
    began = time.process_time()
    value = work()
    return time.process_time() - began, value


def compare(count: int, turns: int) -> bool:
    """Prints one comparison; whether it is as fast and as close as it must be."""
    a, b = moments(count, 1), moments(count, 2)
    best = {"ours": float("inf"), "sqrtm": float("inf")}
    values = dict.fromkeys(best, 0.0)
    for _ in range(turns):
        for name, work in (("ours", ours), ("sqrtm", with_sqrtm)):
            spent, values[name] = seconds(lambda work=work: work(a, b))
            best[name] = min(best[name], spent)
    ratio = best["sqrtm"] / best["ours"]
    apart = abs(values["ours"] - values["sqrtm"]) / values["sqrtm"]
    print(
        f"N={count}, {DIM} dimensions: ours {best['ours']:.2f} s, sqrtm {best['sqrtm']:.2f} s of CPU: {ratio:.1f}x; "
        f"{values['ours']:.9g} and {values['sqrtm']:.9g}, {apart:.1e} apart",
        flush=True,
    )
    return ratio >= LIMIT and apart <= CLOSE[count > DIM]


def main() -> int:
    """Runs both comparisons; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--many", type=int, default=5000)
    parser.add_argument("--few", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    good = [compare(count, options.turns) for count in (options.many, options.few)]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
