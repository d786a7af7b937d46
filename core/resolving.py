"""How settings are given and checked: defaults < preset < YAML file < flags and `key=value`. Imports no torch.

An unknown key is an error that names the nearest known one. The resolved value is saved with the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .errors import UsageError, unknown

PRESETS = Path(__file__).parent / "presets"


class Config(BaseModel):
    """A frozen set of values; unknown keys are refused. A list may be written with commas: `skips=0,3,6`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    former: ClassVar[frozenset[str]] = frozenset()
    """Keys of earlier versions that are still read; a validator translates them."""

    @model_validator(mode="before")
    @classmethod
    def _comma_lists(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {key: _as_list(cls, key, value) for key, value in values.items()}


def _as_list(cls: type[BaseModel], key: str, value: Any) -> Any:
    """The value of a tuple field as a list, where it was written with commas or as a single item."""
    annotation = cls.model_fields[key].annotation if key in cls.model_fields else None
    tuples = [one for one in (annotation, *get_args(annotation)) if get_origin(one) is tuple]
    any_length = any(... in get_args(one) for one in tuples)
    if isinstance(value, str) and (any_length or (tuples and "," in value)):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if any_length and isinstance(value, int | float) else value


C = TypeVar("C", bound=Config)


def parse_value(text: str) -> Any:
    """The value of a `key=value` flag, read as YAML: 1e-4 is a number, [0, 11] a list, canny a string, nothing ""."""
    if not text.strip():
        return ""
    try:
        return (
            float(text)
            if "e" in text.lower() and text.lower().replace("e", "").strip("+-.0123456789") == ""
            else yaml.safe_load(text)
        )
    except (yaml.YAMLError, ValueError):
        return text


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises `UsageError` for a missing or malformed file."""
    try:
        value = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"cannot read config '{path}': {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"config '{path}' is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"config '{path}' is not a mapping of keys to values.")
    return value


def preset(name: str) -> dict[str, Any]:
    """A preset shipped with the package, by name. Raises `UsageError` naming the nearest one."""
    known = {path.stem: path for path in PRESETS.glob("*.yaml")}
    if name not in known:
        raise unknown("preset", name, known)
    return read_yaml(known[name])


SETTINGS_REMEDY = " A method's own settings are written tuner.KEY=VALUE."


def build(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Validates `values` as `cls`. Raises `UsageError` that names the key, the fault and the nearest known key."""
    for key in values:
        if key not in cls.model_fields and key not in cls.former:
            raise unknown(f"{where}key", key, cls.model_fields, SETTINGS_REMEDY if "tuner" in cls.model_fields else "")
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{where}{key}={first.get('input')!r}: {first['msg'][0].lower()}{first['msg'][1:]}."
        ) from error


def resolve_config(
    cls: type[C],
    *,
    preset_name: str | None = None,
    file: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    pairs: Iterable[str] = (),
) -> C:
    """Defaults < preset < YAML file < flags < `key=value` pairs, as one frozen value.

    `tuner.ratio=0.1` sets a key of a nested mapping. A flag of value None counts as not given.
    Raises `UsageError` for an unknown key, a wrong value or a pair without `=`.
    """
    values: dict[str, Any] = {}
    for layer in (preset(preset_name) if preset_name else {}, read_yaml(file) if file else {}):
        _merge(values, layer)
    _merge(values, {k: v for k, v in (flags or {}).items() if v is not None})
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"'{pair}' is not a setting; write it as key=value, e.g. lr=1e-4.")
        head, *rest = key.split(".")
        value: Any = text if not rest and _is_text(cls, head) else parse_value(text)
        for part in reversed(rest):
            value = {part: value}
        _merge(values, {head: value})
    return build(cls, values)


def _is_text(cls: type[Config], key: str) -> bool:
    """Whether the field holds a string: it is taken as written, not as YAML, whatever braces or colons are in it."""
    annotation = cls.model_fields[key].annotation if key in cls.model_fields else None
    return annotation is str or set(get_args(annotation)) == {str, type(None)}


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), Mapping):
            into[key] = {**into[key], **value}
        else:
            into[key] = value


def to_yaml(config: Config) -> str:
    """The resolved value as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
