"""A transfer table as one HTML file, with images of every method side by side and loss curves."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ...core.files import write_bytes
from ..report.curves import curves
from ..report.html import Sample, file_cell, shortened, template, text
from ..targets import read_folder
from .running import base_folder, log_rows
from .show import COSTS, COUNTS, LEGEND, below, count, heading, rate, spread, title
from .transfer import BASE, PAPER, PAPER_NOTE, PAPER_SETS, Row, TransferTable
from .workshop import Workshop

SHOWN = 8
"""Captions whose images are shown."""
COLOURS = ("#c2410c", "#0b5cad", "#15803d", "#a21caf", "#b45309", "#0e7490", "#be123c", "#6b7684")
CURVES = {"loss": "training loss by step, mean of the seeds", "val/loss": "held-out loss by step, mean of the seeds"}


def write_page(table: TransferTable, shop: Workshop) -> Path:
    """Writes report.html beside the runs, atomically; returns its path. It loads nothing from elsewhere."""
    path = shop.out / "report.html"
    write_bytes(path, render(table, shop).encode(errors="replace"))
    return path


def render(table: TransferTable, shop: Workshop) -> str:
    """The page; every string in it is escaped."""
    names = [row.name for row in table.rows]
    drawn = [curves(_means(shop, names, key), label, len(COLOURS)) for key, label in CURVES.items()]
    return template("transfer.html.j2").render(
        title=title(table),
        rows=[_row(table, row) for row in (table.base, *table.rows)],
        headings={key: heading(table.example(key)) for key in table.keys},
        quality=[key for key in table.keys if key not in COSTS],
        costs=[key for key in table.keys if key in COSTS],
        best={key: table.best(key) for key in table.keys},
        legend=LEGEND,
        lines=below(table),
        paper=PAPER,
        paper_sets=PAPER_SETS,
        paper_note=PAPER_NOTE,
        samples=_samples(table, shop),
        curves=[svg for svg in drawn if svg],
        names=names,
        colours=COLOURS,
        protocol={key: text(value) for key, value in table.protocol.items()},
    )


def _row(table: TransferTable, row: Row) -> dict[str, Any]:
    cells = {key: spread(row.figures.get(key)) for key in table.keys}
    counts = {name: count(row.parameters[name]) for name in COUNTS}
    return {"name": row.name, "cells": cells, "counts": {**counts, "lr": rate(row)}}


def _samples(table: TransferTable, shop: Workshop) -> list[Sample]:
    """For captions spread evenly over the set, the reference and the images of the base and of every method, seed 0."""
    folders = {BASE: base_folder(shop, 0) / "base"} if table.base.values else {}
    folders |= {row.name: _samples_of(shop, row.name) for row in table.rows if 0 not in row.diverged}
    if not folders:
        return []
    first = next(iter(folders.values()))
    rows = read_folder(first).rows
    shown = [rows[i * len(rows) // min(SHOWN, len(rows))] for i in range(min(SHOWN, len(rows)))]
    samples = []
    for row in shown:
        prompt = shortened(row["prompt"])
        cells = [file_cell(name, folder, row["file_name"], prompt) for name, folder in folders.items()]
        samples.append(Sample([file_cell("real", first, row["reference"], prompt), *cells], prompt, row["file_name"]))
    return samples


def _samples_of(shop: Workshop, method: str) -> Path:
    return shop.run(shop.settings.config(method, 0)).samples / "tuned"


def _means(shop: Workshop, methods: list[str], key: str) -> dict[str, dict[int, float]]:
    """For each method, the mean over the seeds of the log's rows that have `key`, by step."""
    means: dict[str, dict[int, float]] = {}
    for method in methods:
        values: defaultdict[int, list[float]] = defaultdict(list)
        for seed in range(shop.settings.seeds):
            run = shop.run(shop.settings.config(method, seed))
            for row in log_rows(run):
                if key in row:
                    values[row["step"]].append(row[key])
        means[method] = {step: float(np.mean(found)) for step, found in values.items()}
    return means
