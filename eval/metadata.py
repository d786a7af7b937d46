"""Reads and checks metadata.jsonl and sampling.json, which record what images were drawn from and how.

Other programs may have written them, so every fault is a `UsageError` that names file, line and field.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.data.paths import is_utf8
from ..core.errors import UsageError


class SampleRow(BaseModel):
    """The fields of a row of metadata.jsonl that are used; others may hold anything."""

    model_config = ConfigDict(extra="allow")

    file_name: str
    prompt: str | None = None
    key: str | int | None = None
    reference: str | None = None
    hints: dict[str, str] | None = None
    maps: dict[str, str] | None = None


class BaseIdentity(BaseModel):
    """The base model that drew the images."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    hash: str | None = None


class SamplingFile(BaseModel):
    """The fields of sampling.json that are used; others may hold anything."""

    model_config = ConfigDict(extra="allow")

    base: BaseIdentity = BaseIdentity()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a metadata.jsonl, one JSON object per line; empty lines are skipped. Raises `UsageError`."""
    # Only b"\n" ends a line: str.splitlines would also cut at U+2028 and U+0085, which JSON allows inside strings.
    lines = _bytes(file).split(b"\n")
    return [_parsed(line, SampleRow, f"{file} line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def read_sampling(file: Path) -> dict[str, Any]:
    """The values of a sampling.json; {} without the file. Raises `UsageError`."""
    return _parsed(_bytes(file), SamplingFile, str(file)) if file.is_file() else {}


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error


def _parsed(data: bytes, model: type[BaseModel], where: str) -> dict[str, Any]:
    """The JSON object in `data`, as written, after `model` has validated its fields."""
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UsageError(f"{where} is not a JSON object.")
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][:2] if part not in ("str", "int"))
        if first["type"] == "missing":
            raise UsageError(f"{where} has no {field}.") from error
        expected = first["msg"].removeprefix("Input should be ")
        raise UsageError(f"{where}: {field} is {first['input']!r}; it should be {expected}.") from error
    if not is_utf8(json.dumps(value, ensure_ascii=False)):
        raise UsageError(f"{where} contains half a character (a lone surrogate, \\ud800 to \\udfff). Correct the text.")
    return value
