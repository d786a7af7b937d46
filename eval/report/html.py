"""The report as one HTML file: figures, pictures, best and worst, distributions; nothing in it is fetched."""

from __future__ import annotations

import base64
import io
import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ...core.data.images import BadImage
from ...core.errors import SctoolError
from ...core.files import write_bytes
from ..results import Column, Figure, Picture, Results
from ..targets import read_folder, read_picture
from .compare import winner, with_interval
from .histogram import histogram
from .tables import ARROWS, cost_rows, number

SHOWN = 12
"""Pictures of the grid, spread evenly over the set."""
EXTREMES = 6
"""Pictures at either end of each figure."""
THUMB = 192
"""Longest side of a picture in the page, in pixels."""
LOSSLESS = 12_000
"""Bytes up to which a thumbnail stays PNG: small pictures and line maps; the others become JPEG."""
PROMPT = 200


@dataclass(frozen=True)
class Cell:
    """One picture in the page, or why it is not there."""

    label: str
    alt: str
    source: str = ""
    width: int = 0
    height: int = 0
    missing: str = ""


@dataclass(frozen=True)
class Sample:
    """A drawn picture with what belongs to it, above a caption."""

    cells: list[Cell]
    prompt: str
    file: str
    value: str = ""


def write_html(results: Results, folder: str | Path) -> Path:
    """Writes report.html into `folder`, as a whole or not at all; gives its path.

    The page needs no other file, no script and no network. Only the pictures that it shows are read; one that cannot
    be is shown as missing. The same results and pictures give the same bytes.
    Raises `SctoolError` when the file cannot be written.
    """
    path = Path(folder) / "report.html"
    # A lone surrogate in a prompt has no UTF-8 form.
    write_bytes(path, render(results).encode(errors="replace"))
    return path


def render(results: Results) -> str:
    """The page. Every string in it is escaped; a content security policy forbids whatever might slip through."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    main = results.columns[-1] if results.columns else None
    protocols = {f.protocol_id: f.protocol for column in results.columns for f in column.figures}
    return environment.get_template("report.html.j2").render(
        target=results.target,
        about=about(results),
        columns=results.columns,
        rows=[table_row(first, figures) for first, figures in results.rows()],
        notes=results.notes,
        profile=results.profile,
        costs=cost_rows(results.profile) if results.profile else [],
        samples=grid(results.columns) if main else [],
        extremes=extremes(main) if main else {},
        charts=charts(results.columns),
        protocols={key: {k: text(v) for k, v in protocol.items()} for key, protocol in protocols.items()},
        main=main,
        text=text,
    )


def text(value: Any) -> str:
    """A protocol's value in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {text(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    return (value or "none") if isinstance(value, str) else json.dumps(value, default=str)


def titled(figure: Figure) -> str:
    """The figure's name with the arrow of its better direction."""
    return f"{figure.name} {ARROWS[figure.better]}".strip()


# ------------------------------------------------------------------------------------------------------ tables


def about(results: Results) -> dict[str, str]:
    """What was evaluated, from the files beside the pictures; only what they say."""
    said = {"Target": results.target}
    for column in results.columns[-1:]:
        if not (column.folder / "metadata.jsonl").is_file():
            continue
        sampling = dict(read_folder(column.folder).sampling)
        base = sampling.pop("base", None) or {}
        tuners = sampling.pop("tuners", None) or []
        said["Base"] = f"{base.get('id', 'unknown')} ({str(base.get('hash'))[:12]})"
        said["Tuner"] = "; ".join(map(text, tuners)) or "none"
        said["Sampling"] = text({key: value for key, value in sampling.items() if value != ""})
        drawn = datetime.fromtimestamp((column.folder / "metadata.jsonl").stat().st_mtime, UTC)
        said["Drawn"] = f"{drawn:%Y-%m-%d}"
    if results.profile and "Tuner" not in said:
        said["Method"] = str(results.profile["method"])
    said["Pictures"] = ", ".join(f"{column.count} {column.label}" for column in results.columns)
    return {key: value for key, value in said.items() if value}


def table_row(first: Figure, figures: list[Figure | None]) -> dict[str, Any]:
    """Name with arrow, (value, interval) of every folder, which of them is best, protocol id."""
    best, _ = winner(figures)
    cells = [with_interval(figure).partition(" ")[::2] for figure in figures]
    return {"name": titled(first), "cells": cells, "best": best, "protocol": first.protocol_id}


# ----------------------------------------------------------------------------------------------------- pictures


def grid(columns: list[Column]) -> list[Sample]:
    """Pictures spread evenly over the set: hints, each folder's picture, its map extracted again, the reference."""
    main, samples = columns[-1], []
    others = [(column, {p.file: p for p in column.pictures}) for column in columns[:-1]]
    count = min(SHOWN, len(main.pictures))
    for picture in (main.pictures[i * len(main.pictures) // count] for i in range(count)):
        cells = [_file_cell(f"hint: {cond}", main, file, picture) for cond, file in sorted(picture.hints.items())]
        for column, known in others:
            if picture.file in known:
                cells.append(_file_cell(column.label, column, picture.file, picture))
        cells.append(_file_cell(main.label, main, picture.file, picture))
        for cond in sorted(main.extract.keys() & picture.hints.keys()):
            again = partial(_again, main, cond, picture)
            cells.append(_cell(f"{cond} of {main.label}", again, picture))
        if picture.reference:
            cells.append(_file_cell("reference", main, picture.reference, picture))
        samples.append(Sample(cells, shortened(picture.prompt), picture.file))
    return samples


def _again(column: Column, cond: str, picture: Picture) -> np.ndarray:
    return column.extract[cond](read_picture(column.folder, picture.file), picture.key)


def extremes(column: Column) -> dict[str, dict[str, list[Sample]]]:
    """By title, the best and the worst pictures of every figure that is made of pictures' own values."""
    found = {}
    for figure in column.figures:
        valued = [(v, p) for p in column.pictures if math.isfinite(v := p.values.get(figure.key, math.nan))]
        if len(valued) < 2:
            continue
        valued.sort(key=lambda pair: pair[0], reverse=figure.better == "higher")
        ends = min(EXTREMES, len(valued) // 2)
        names = ("best", "worst") if figure.better else ("lowest", "highest")
        groups = dict(zip(names, (valued[:ends], valued[: -ends - 1 : -1]), strict=True))
        made = {name: [_extreme(column, figure, v, p) for v, p in group] for name, group in groups.items()}
        found[titled(figure)] = made
    return found


def _extreme(column: Column, figure: Figure, value: float, picture: Picture) -> Sample:
    cells = [_file_cell(column.label, column, picture.file, picture)]
    cond = figure.key.partition(".")[0]
    if cond in picture.hints:
        cells.insert(0, _file_cell(f"hint: {cond}", column, picture.hints[cond], picture))
    return Sample(cells, shortened(picture.prompt), picture.file, number(value))


def _file_cell(label: str, column: Column, file: str, picture: Picture) -> Cell:
    return _cell(label, partial(read_picture, column.folder, file), picture)


def _cell(label: str, read: Callable[[], np.ndarray], picture: Picture) -> Cell:
    alt = f"{label}: {shortened(picture.prompt) or picture.file}"
    try:
        source, width, height = thumbnail(read())
    except (BadImage, SctoolError) as error:
        return Cell(label, alt, missing=str(error))
    return Cell(label, alt, source, width, height)


def thumbnail(picture: np.ndarray) -> tuple[str, int, int]:
    """A picture, uint8 (H, W, 3), as a data: URI of at most THUMB px a side, its width and its height."""
    image = Image.fromarray(picture)
    image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    kind = "png"
    if data.tell() > LOSSLESS:
        data, kind = io.BytesIO(), "jpeg"
        image.save(data, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", *image.size


def shortened(prompt: str) -> str:
    """A prompt in one line of at most PROMPT characters."""
    return textwrap.shorten(prompt, PROMPT, placeholder=" …")


# ------------------------------------------------------------------------------------------------ distributions


def charts(columns: list[Column]) -> list[tuple[Markup, int, dict[str, str]]]:
    """(SVG, values beyond its axis, mean by folder) of every figure of pictures' own values, the folders overlaid."""
    made = []
    figures = {figure.key: figure for column in columns for figure in column.figures}
    for key, figure in figures.items():
        series = {}
        for column in columns:
            values = [v for p in column.pictures if math.isfinite(v := p.values.get(key, math.nan))]
            if values:
                series[column.label] = values
        if series:
            means = {label: number(float(np.mean(values))) for label, values in series.items()}
            made.append((*histogram(series, titled(figure)), means))
    return made
