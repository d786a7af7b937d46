"""One run of a table in three pieces, each skipped where it is done: training, drawing, measuring."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from ...core.config import TrainConfig
from ...core.errors import Diverged, SctoolError
from ...core.files import sha256
from ...core.runs import FREE_KEYS, Run, open_run
from ..evaluate import evaluate
from ..heldout import sample_heldout
from ..options import Options
from .pieces import Piece
from .workshop import Workshop

FOLDER = "bench"
"""Where a run keeps the results of its pieces."""


def training_piece(run: Run, config: TrainConfig) -> Piece:
    """The training of a run: {"loss": held-out loss, "seconds": of all steps}, or {"diverged": why}."""
    decides = {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_KEYS}
    return Piece(run.path / FOLDER / "trained.json", decides)


def train_run(shop: Workshop, run: Run, config: TrainConfig) -> dict[str, Any]:
    """The result of `training_piece`; the trainer itself goes on from its last resume state."""
    return training_piece(run, config).do(lambda: _train(shop, run, config))


def _train(shop: Workshop, run: Run, config: TrainConfig) -> dict[str, Any]:
    try:
        _train_to_the_end(shop, run, config)
        if held_out_loss(run, config.steps) is None:  # killed after its last state and before the validation
            shutil.rmtree(run.path)
            _train_to_the_end(shop, run, config)
    except Diverged as error:
        shop.progress.note(f"{run.name} diverged: {error}")
        return {"diverged": str(error)}
    return {"loss": held_out_loss(run, config.steps), "seconds": sum(row.get("seconds", 0) for row in log_rows(run))}


def _train_to_the_end(shop: Workshop, run: Run, config: TrainConfig) -> None:
    from ...core.training.train import train

    open_run(run.path.parent, run.name, config)
    with run.locked():
        try:
            train(config, run, shop.source, held_out=shop.held_out, offline=shop.offline, quiet=shop.quiet)
        except SctoolError:
            run.discard_if_untrained()
            raise


def log_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of a run's log; [] where it diverged before the first."""
    if not run.metrics.is_file():
        return []
    return [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]


def held_out_loss(run: Run, step: int) -> float | None:
    """The held-out loss after `step` steps; None where it was not measured."""
    return next((row["val/loss"] for row in reversed(log_rows(run)) if row["step"] == step and "val/loss" in row), None)


# --------------------------------------------------------------------------------------------- drawing, measuring


def drawing_piece(shop: Workshop, run: Run, seed: int, kind: str, results: Path) -> Piece:
    """The drawing of `count` held-out captions with a trained run's "tuned" model, or with its "base": {"seconds"}."""
    settings, config = shop.settings, run.config
    base = {"base": config.base, "data": config.data, "val_data": config.val_data, "caption": config.caption}
    identity = {
        "model": base if kind == "base" else sha256(run.tuner),
        "count": settings.count,
        "first_seed": settings.first_image(seed),
        "sampling": settings.sampling.model_dump(mode="json"),
    }
    return Piece(results / "drawn.json", identity)


def draw(shop: Workshop, run: Run, seed: int, kind: str, parent: Path, results: Path) -> Piece:
    """Draws with the "base" or the "tuned" model of `run` into parent/kind; returns the piece, done."""
    settings = shop.settings

    def work() -> dict[str, Any]:
        began = time.perf_counter()
        sample_heldout(
            run, count=settings.count, sampling=settings.sampling, seed=settings.first_image(seed), which=(kind,),
            quiet=shop.quiet, offline=shop.offline, out=parent, repeat=True,
        )  # fmt: skip
        return {"seconds": time.perf_counter() - began}

    piece = drawing_piece(shop, run, seed, kind, results)
    piece.do(work)
    return piece


def distance_options(shop: Workshop, *, reference: str | None = None, quiet: bool) -> Options:
    """How `sctool evaluate --fid` is asked for the table's distance."""
    settings = shop.settings
    return Options(
        metrics=("fid",), features=settings.features, weights=settings.weights, reference=reference,
        offline=shop.offline, quiet=quiet,
    )  # fmt: skip


def measure(shop: Workshop, drawn: Piece, samples: Path, real: Path) -> dict[str, Any]:
    """The Fréchet distance of the images in `samples` to the statistics `real`: its figure and the notes on it."""

    def work() -> dict[str, Any]:
        results = evaluate(samples, distance_options(shop, reference=str(real), quiet=True))
        figure = results.folders[0].figures[0]
        described = {"key": figure.key, "name": figure.name, "value": figure.value, "better": figure.better}
        return {**described, "protocol": figure.protocol, "notes": results.notes}

    identity = {"drawn": drawn.identity, "reference_sha256": sha256(real), "features": shop.settings.features}
    return Piece(drawn.path.parent / "measured.json", identity).do(work)


def measured_run(shop: Workshop, run: Run, seed: int, real: Path) -> dict[str, Any]:
    """Draws with a trained run and measures the images."""
    results = run.path / FOLDER
    return measure(shop, draw(shop, run, seed, "tuned", run.samples, results), run.samples / "tuned", real)


def base_folder(shop: Workshop, seed: int) -> Path:
    """The untouched base's images for the seed."""
    return shop.out / "base" / f"seed{seed}"


def measured_base(shop: Workshop, run: Run, seed: int, real: Path) -> dict[str, Any]:
    """Draws the same captions and seeds with the untouched base; `run` is any trained run of the seed."""
    folder = base_folder(shop, seed)
    return measure(shop, draw(shop, run, seed, "base", folder, folder), folder / "base", real)
