"""CPU time of the Fréchet distance with our trace and with `scipy.linalg.sqrtm`, measured alternately.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/frechet.py
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/frechet.py --turns 1 --few 500

Correlated random features of 2048 dimensions: 5000 per side, where the covariances have full rank and the trace is a
sum of square roots of eigenvalues, and 500 per side, where it is the nuclear norm of a product of features. Both
methods get the same means and covariances (ours with 500 also the centred features); the whole distance is timed.
CPU time is that of all threads of the process; the best turn counts. The root of the reference's covariance, which
evaluation caches, is computed again in every turn.
Exit code 1 if sqrtm is less than `LIMIT` times slower, or if the two disagree by more than rounding.
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
CLOSE = {True: 1e-9, False: 1e-5}  # by full rank or not: sqrtm of a singular matrix is itself not more precise


def features(count: int, seed: int) -> np.ndarray:
    """(N, 2048) features that are correlated and not negative, like pooled activations."""
    mixing = np.random.default_rng(0).normal(size=(DIM, DIM)) / np.sqrt(DIM)
    random = np.random.default_rng(seed)
    scale = np.linspace(1, 0.02, DIM) ** 2
    return np.maximum(random.normal(size=(count, DIM)) * scale @ mixing + 0.05 * seed, 0)


def moments(count: int, seed: int) -> Moments:
    """Mean and covariance, which both methods start from."""
    stats = FrechetStats(DIM)
    stats.update(features(count, seed))
    return stats.compute()


def with_sqrtm(a: Moments, b: Moments) -> float:
    """The formula as pytorch-fid and similar packages compute it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = linalg.sqrtm(a.sigma @ b.sigma)
    return float(((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root.real))


def ours(a: Moments, b: Moments) -> float:
    """Our distance, with nothing cached from the previous turn."""
    return frechet_distance(a, Moments(b.mu, b.sigma, b.n, b.centred))


def seconds(work: Callable[[], float]) -> tuple[float, float]:
    """(CPU seconds, value)."""
    start = time.process_time()
    value = work()
    return time.process_time() - start, value


def compare(count: int, turns: int) -> bool:
    """Prints one comparison; returns whether it is as fast and as close as required."""
    a, b = moments(count, 1), moments(count, 2)
    best = {"ours": float("inf"), "sqrtm": float("inf")}
    values = dict.fromkeys(best, 0.0)
    for _ in range(turns):
        for name, work in (("ours", ours), ("sqrtm", with_sqrtm)):
            spent, values[name] = seconds(lambda work=work: work(a, b))
            best[name] = min(best[name], spent)
    ratio = best["sqrtm"] / best["ours"]
    difference = abs(values["ours"] - values["sqrtm"]) / values["sqrtm"]
    print(
        f"N={count}, {DIM} dimensions: ours {best['ours']:.2f} s, sqrtm {best['sqrtm']:.2f} s of CPU: {ratio:.1f}x; "
        f"{values['ours']:.9g} and {values['sqrtm']:.9g}, relative difference {difference:.1e}",
        flush=True,
    )
    return ratio >= LIMIT and difference <= CLOSE[count > DIM]


def main() -> int:
    """Runs both comparisons; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--many", type=int, default=5000)
    parser.add_argument("--few", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    passed = [compare(count, options.turns) for count in (options.many, options.few)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
