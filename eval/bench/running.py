"""One run of a table in pieces, each skipped where it is done: training, drawing, measuring."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...core.config import TrainConfig
from ...core.errors import Diverged, SctoolError
from ...core.runs import FREE_KEYS, Run, open_run
from ..heldout import sample_heldout
from .pieces import Piece
from .workshop import Workshop

FOLDER = "bench"
"""Where a run keeps the results of its pieces."""
BASE = "base"
"""The name of the folders of images that an untouched base drew."""


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
    open_run(run.path.parent, run.name, config)
    with run.locked():
        try:
            shop.work.train(run, config)
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


# --------------------------------------------------------------------------------------------------------- drawing


def drawing_piece(shop: Workshop, run: Run, seed: int) -> Piece:
    """The drawing of `count` held-out captions with what a run trained: {"seconds"}."""
    return _drawing(shop, seed, shop.work.result(run), run.path / FOLDER)


def drawn_images(shop: Workshop, run: Run) -> Path:
    """The folder of the images that were drawn with what a run trained."""
    return run.samples / shop.settings.form.drawn


def draw_run(shop: Workshop, run: Run, seed: int) -> Piece:
    """Draws with what a run trained; returns the piece, done."""
    piece = drawing_piece(shop, run, seed)
    piece.do(_timed(lambda: shop.work.draw(run, run.samples, seed)))
    return piece


def base_drawing_piece(shop: Workshop, name: str, seed: int, run: Run) -> Piece:
    """The drawing of the same captions and seeds with an untouched base; `run` is any run on it of the seed."""
    config = run.config
    model = {
        "base": shop.settings.bases[name],
        "data": config.data,
        "val_data": config.val_data,
        "caption": config.caption,
    }
    model |= {"cond": list(config.cond), "maps": config.maps} if config.cond else {}
    return _drawing(shop, seed, model, shop.base_images(name, seed))


def draw_base(shop: Workshop, name: str, seed: int, run: Run) -> Piece:
    """Draws with an untouched base, by the name of its row, for the seed; returns the piece, done."""
    settings, folder = shop.settings, shop.base_images(name, seed)

    def draw() -> None:
        sample_heldout(
            run, count=settings.count, sampling=settings.sampling, seed=settings.first_image(seed), which=(BASE,),
            quiet=shop.quiet, offline=shop.offline, out=folder, repeat=True, base=settings.bases[name],
        )  # fmt: skip

    piece = base_drawing_piece(shop, name, seed, run)
    piece.do(_timed(draw))
    return piece


def _drawing(shop: Workshop, seed: int, model: Any, results: Path) -> Piece:
    settings = shop.settings
    identity = {
        "model": model,
        "count": settings.count,
        "first_seed": settings.first_image(seed),
        "sampling": settings.sampling.model_dump(mode="json"),
    }
    return Piece(results / "drawn.json", identity)


def _timed(work: Callable[[], None]) -> Callable[[], dict[str, Any]]:
    def timed() -> dict[str, Any]:
        began = time.perf_counter()
        work()
        return {"seconds": time.perf_counter() - began}

    return timed
