"""A table as one HTML file, with images of every row side by side and loss curves."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ...core.files import write_bytes
from ..report.curves import curves
from ..report.html import Sample, file_cell, shortened, template, text
from ..targets import read_folder
from .running import BASE, drawn_images, log_rows
from .show import DIFFERENCES, Section, below, change, count, heading, legend, rate, sections, spread, title
from .table import COSTS, Row, Table
from .workshop import Workshop

SHOWN = 8
"""Captions whose images are shown."""
COLOURS = ("#c2410c", "#0b5cad", "#15803d", "#a21caf", "#b45309", "#0e7490", "#be123c", "#6b7684")
CURVES = {"loss": "training loss by step, mean of the seeds", "val/loss": "held-out loss by step, mean of the seeds"}


def write_page(table: Table, shop: Workshop) -> Path:
    """Writes report.html beside the runs, atomically; returns its path. It loads nothing from elsewhere."""
    path = shop.out / "report.html"
    write_bytes(path, render(table, shop).encode(errors="replace"))
    return path


def render(table: Table, shop: Workshop) -> str:
    """The page; every string in it is escaped."""
    names = [row.name for row in table.rows]
    shown = CURVES if table.form.loss else {}  # losses of other objectives are no curves of one figure
    drawn = [curves(_means(shop, names, key), label, len(COLOURS)) for key, label in shown.items()]
    return template("bench.html.j2").render(
        title=title(table),
        sections=[_section(table, section) for section in sections(table)],
        differences=_differences(table),
        legend=legend(table),
        lines=below(table),
        papers=table.form.papers,
        samples=_samples(table, shop),
        curves=[svg for svg in drawn if svg],
        names=names,
        colours=COLOURS,
        protocol={key: text(value) for key, value in table.protocol.items()},
    )


def _section(table: Table, section: Section) -> dict[str, Any]:
    heads = [*(heading(table.example(key)) for key in section.keys), *section.counts, *(["lr"] if section.rate else [])]
    return {"title": section.title, "heads": heads, "rows": [_row(table, row, section) for row in table.all_rows]}


def _row(table: Table, row: Row, section: Section) -> dict[str, Any]:
    """A row's cells as (value, interval, whether it is best)."""
    figures = [(*spread(row.figures.get(key)), table.best(key) == row.name) for key in section.keys]
    counts = [(count(row.parameters[name]), "", False) for name in section.counts]
    rates = [(rate(row), "", False)] if section.rate else []
    return {"name": row.name, "cells": [*figures, *counts, *rates]}


def _differences(table: Table) -> dict[str, Any] | None:
    """Every row's paired difference to the best mean; None where there is none."""
    found = {key: table.differences(key) for key in table.keys if key not in COSTS and table.differences(key)}
    if not found:
        return None
    heads = [f"{table.example(key).name} − {table.reference(key)}" for key in found]
    rows = [
        {"name": row.name, "cells": [(*change(key, own.get(row.name)), False) for key, own in found.items()]}
        for row in table.all_rows
    ]
    return {"title": DIFFERENCES, "heads": heads, "rows": rows}


def _samples(table: Table, shop: Workshop) -> list[Sample]:
    """For captions spread evenly over the set: the real image, its hints, and every row's image, seed 0."""
    folders = {row.name: shop.base_images(row.name, 0) / BASE for row in table.bases if row.values.get("distance")}
    folders |= {row.name: drawn_images(shop, shop.run(row.name, 0)) for row in table.rows if 0 not in row.diverged}
    if not folders:
        return []
    first = next(iter(folders.values()))
    rows = read_folder(first).rows
    shown = [rows[i * len(rows) // min(SHOWN, len(rows))] for i in range(min(SHOWN, len(rows)))]
    samples = []
    for row in shown:
        prompt = shortened(row["prompt"])
        given = {"real": row["reference"], **{f"hint: {cond}": file for cond, file in sorted(row["hints"].items())}}
        cells = [file_cell(label, first, file, prompt) for label, file in given.items()]
        cells += [file_cell(name, folder, row["file_name"], prompt) for name, folder in folders.items()]
        samples.append(Sample(cells, prompt, row["file_name"]))
    return samples


def _means(shop: Workshop, arms: list[str], key: str) -> dict[str, dict[int, float]]:
    """For each arm, the mean over the seeds of the log's rows that have `key`, by step."""
    means: dict[str, dict[int, float]] = {}
    for arm in arms:
        values: defaultdict[int, list[float]] = defaultdict(list)
        for seed in range(shop.settings.seeds):
            for row in log_rows(shop.run(arm, seed)):
                if key in row:
                    values[row["step"]].append(row[key])
        means[arm] = {step: float(np.mean(found)) for step, found in values.items()}
    return means
