"""The report as one HTML file: figures, images, best and worst, distributions; it loads nothing from elsewhere."""

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
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from ...core.data.images import BadImage
from ...core.errors import SctoolError
from ...core.files import write_bytes
from ..results import Figure, FolderResults, ImageResult, Results
from ..targets import read_folder, read_image
from .compare import winner, with_interval
from .histogram import histogram
from .tables import ARROWS, cost_rows, number

SHOWN = 12
"""Images in the grid, spread evenly over the set."""
EXTREMES = 6
"""Images at each end of each figure."""
THUMB = 192
"""Longest side of an image in the page, in pixels."""
LOSSLESS = 12_000
"""Bytes up to which a thumbnail stays a PNG, as small images and line maps do; larger ones become JPEG."""
PROMPT = 200
"""Characters of a prompt that are shown."""


@dataclass(frozen=True)
class Cell:
    """One image in the page, or why it is missing."""

    label: str
    alt: str
    source: str = ""
    width: int = 0
    height: int = 0
    missing: str = ""


@dataclass(frozen=True)
class Sample:
    """A drawn image with its hint, reference and so on, above a caption."""

    cells: list[Cell]
    prompt: str
    file: str
    value: str = ""


def write_html(results: Results, folder: str | Path) -> Path:
    """Writes report.html into `folder`, atomically; returns its path.

    The page needs no other file, no script and no network. Only the images that it shows are read; those that cannot be
    read are shown as missing. The same results and images produce the same bytes.
    Raises `SctoolError` when the file cannot be written.
    """
    path = Path(folder) / "report.html"
    # A lone surrogate in a prompt cannot be encoded as UTF-8.
    write_bytes(path, render(results).encode(errors="replace"))
    return path


def render(results: Results) -> str:
    """The page. Every string in it is escaped; a content security policy blocks anything that slips through."""
    main = results.folders[-1] if results.folders else None
    protocols = {f.protocol_id: f.protocol for folder in results.folders for f in folder.figures}
    return template("report.html.j2").render(
        target=results.target,
        about=about(results),
        folders=results.folders,
        rows=[table_row(first, figures) for first, figures in results.rows()],
        notes=results.notes,
        profile=results.profile,
        costs=cost_rows(results.profile) if results.profile else [],
        samples=grid(results.folders) if main else [],
        extremes=extremes(main) if main else {},
        charts=charts(results.folders),
        protocols={key: {k: text(v) for k, v in protocol.items()} for key, protocol in protocols.items()},
        main=main,
        text=text,
    )


def template(name: str) -> Template:
    """A template of this folder; it escapes every string."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def text(value: Any) -> str:
    """A protocol's value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    return (value or "none") if isinstance(value, str) else json.dumps(value, default=str)


def titled(figure: Figure) -> str:
    """The figure's name with an arrow for its better direction."""
    return f"{figure.name} {ARROWS[figure.better]}".strip()


# ------------------------------------------------------------------------------------------------------ tables


def about(results: Results) -> dict[str, str]:
    """What was evaluated, as far as the files beside the images say."""
    facts = {"Target": results.target}
    for folder in results.folders[-1:]:
        if not (folder.path / "metadata.jsonl").is_file():
            continue
        sampling = dict(read_folder(folder.path).sampling)
        base = sampling.pop("base", None) or {}
        tuners = sampling.pop("tuners", None) or []
        facts["Base"] = f"{base.get('id', 'unknown')} ({str(base.get('hash'))[:12]})"
        facts["Tuner"] = "; ".join(map(text, tuners)) or "none"
        facts["Sampling"] = text({key: value for key, value in sampling.items() if value != ""})
        drawn = datetime.fromtimestamp((folder.path / "metadata.jsonl").stat().st_mtime, UTC)
        facts["Drawn"] = f"{drawn:%Y-%m-%d}"
    if results.profile and "Tuner" not in facts:
        facts["Method"] = str(results.profile["method"])
    facts["Images"] = ", ".join(f"{folder.count} {folder.label}" for folder in results.folders)
    return {key: value for key, value in facts.items() if value}


def table_row(first: Figure, figures: list[Figure | None]) -> dict[str, Any]:
    """Name with arrow, (value, interval) of every folder, which of them is best, protocol id."""
    best, _ = winner(figures)
    cells = [with_interval(figure).partition(" ")[::2] for figure in figures]
    return {"name": titled(first), "cells": cells, "best": best, "protocol": first.protocol_id}


# ------------------------------------------------------------------------------------------------------- images


def grid(folders: list[FolderResults]) -> list[Sample]:
    """Images spread evenly over the set: hints, the image of each folder, the extracted map, the reference."""
    main, samples = folders[-1], []
    others = [(folder, {image.file: image for image in folder.images}) for folder in folders[:-1]]
    count = min(SHOWN, len(main.images))
    for image in (main.images[i * len(main.images) // count] for i in range(count)):
        cells = [_file_cell(f"hint: {cond}", main, file, image) for cond, file in sorted(image.hints.items())]
        for folder, by_file in others:
            if image.file in by_file:
                cells.append(_file_cell(folder.label, folder, image.file, image))
        cells.append(_file_cell(main.label, main, image.file, image))
        for cond in sorted(main.extract.keys() & image.hints.keys()):
            cells.append(
                _cell(
                    f"{cond} of {main.label}",
                    partial(_extracted, main, cond, image),
                    shortened(image.prompt) or image.file,
                )
            )
        if image.reference:
            cells.append(_file_cell("reference", main, image.reference, image))
        samples.append(Sample(cells, shortened(image.prompt), image.file))
    return samples


def _extracted(folder: FolderResults, cond: str, image: ImageResult) -> np.ndarray:
    return folder.extract[cond](read_image(folder.path, image.file), image.key)


def extremes(folder: FolderResults) -> dict[str, dict[str, list[Sample]]]:
    """By title, the best and the worst images of every figure that single images have."""
    sections = {}
    for figure in folder.figures:
        valued = [(v, image) for image in folder.images if math.isfinite(v := image.values.get(figure.key, math.nan))]
        if len(valued) < 2:
            continue
        valued.sort(key=lambda pair: pair[0], reverse=figure.better == "higher")
        ends = min(EXTREMES, len(valued) // 2)
        names = ("best", "worst") if figure.better else ("lowest", "highest")
        groups = dict(zip(names, (valued[:ends], valued[: -ends - 1 : -1]), strict=True))
        sections[titled(figure)] = {
            name: [_extreme(folder, figure, value, image) for value, image in group] for name, group in groups.items()
        }
    return sections


def _extreme(folder: FolderResults, figure: Figure, value: float, image: ImageResult) -> Sample:
    cells = [_file_cell(folder.label, folder, image.file, image)]
    cond = figure.key.partition(".")[0]
    if cond in image.hints:
        cells.insert(0, _file_cell(f"hint: {cond}", folder, image.hints[cond], image))
    return Sample(cells, shortened(image.prompt), image.file, number(value))


def _file_cell(label: str, folder: FolderResults, file: str, image: ImageResult) -> Cell:
    return file_cell(label, folder.path, file, _about(image))


def _about(image: ImageResult) -> str:
    return shortened(image.prompt) or image.file


def file_cell(label: str, folder: Path, file: str, about: str) -> Cell:
    """An image file of a folder, described by its label and what it is about."""
    return _cell(label, partial(read_image, folder, file), about)


def _cell(label: str, read: Callable[[], np.ndarray], about: str) -> Cell:
    alt = f"{label}: {about}"
    try:
        source, width, height = thumbnail(read())
    except (BadImage, SctoolError) as error:
        return Cell(label, alt, missing=str(error))
    return Cell(label, alt, source, width, height)


def thumbnail(pixels: np.ndarray) -> tuple[str, int, int]:
    """An image, uint8 (H, W, 3), as a data: URI of at most THUMB px per side, with its width and height."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    kind = "png"
    if data.tell() > LOSSLESS:
        data, kind = io.BytesIO(), "jpeg"
        image.save(data, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", *image.size


def shortened(prompt: str) -> str:
    """A prompt on one line of at most PROMPT characters."""
    return textwrap.shorten(prompt, PROMPT, placeholder=" …")


# ------------------------------------------------------------------------------------------------ distributions


def charts(folders: list[FolderResults]) -> list[tuple[Markup, int, dict[str, str]]]:
    """(SVG, values beyond its axis, mean by folder) of every figure that single images have, the folders overlaid."""
    drawn = []
    figures = {figure.key: figure for folder in folders for figure in folder.figures}
    for key, figure in figures.items():
        series = {}
        for folder in folders:
            values = [v for image in folder.images if math.isfinite(v := image.values.get(key, math.nan))]
            if values:
                series[folder.label] = values
        if series:
            means = {label: number(float(np.mean(values))) for label, values in series.items()}
            drawn.append((*histogram(series, titled(figure)), means))
    return drawn
