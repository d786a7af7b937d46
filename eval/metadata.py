"""The files that say what pictures were drawn from, metadata.jsonl and sampling.json, read and checked.

Anyone may have written them, so every fault is a `UsageError` that names file, line and field.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.data.paths import is_utf8
from ..core.errors import UsageError


class Row(BaseModel):
    """What is read of a row of metadata.jsonl; other fields may be anything."""

    model_config = ConfigDict(extra="allow")

    file_name: str
    prompt: str | None = None
    key: str | int | None = None
    reference: str | None = None
    hints: dict[str, str] | None = None
    maps: dict[str, str] | None = None


class Base(BaseModel):
    """The base model that drew the pictures."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    hash: str | None = None


class Sampling(BaseModel):
    """What is read of sampling.json; other fields may be anything."""

    model_config = ConfigDict(extra="allow")

    base: Base = Base()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a metadata.jsonl, one JSON object a line, empty lines left out. Raises `UsageError`."""
    # Only b"\n" ends a line: str.splitlines would also cut at U+2028 and U+0085, which JSON allows inside strings.
    lines = _bytes(file).split(b"\n")
    return [_parsed(line, Row, f"{file} line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def read_sampling(file: Path) -> dict[str, Any]:
    """The values of a sampling.json; {} where there is none. Raises `UsageError`."""
    return _parsed(_bytes(file), Sampling, str(file)) if file.is_file() else {}


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error


def _parsed(data: bytes, model: type[BaseModel], where: str) -> dict[str, Any]:
    """The JSON object in `data`, as written, once `model` has found its fields right."""
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UsageError(f"{where} is no JSON object.")
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][:2] if part not in ("str", "int"))
        if first["type"] == "missing":
            raise UsageError(f"{where} has no {field}.") from error
        wanted = first["msg"].removeprefix("Input should be ")
        raise UsageError(f"{where}: {field} is {first['input']!r}; it should be {wanted}.") from error
    if not is_utf8(json.dumps(value, ensure_ascii=False)):
        raise UsageError(f"{where} holds half a character (a lone surrogate, \\ud800 to \\udfff). Mend the text.")
    return value
