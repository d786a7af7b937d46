"""Help texts of flags, read from the settings that the flags set: each description and default is written once.

The classes of settings need pydantic, whose import takes longer than all of `sctool --help`. A help text therefore only
names its field, and `Command` reads the field when the help of its command is shown.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

from typer.core import TyperCommand

_PLACEHOLDER = re.compile(r"\{(\w+)\.(\w+)\}")


def help_of(config: str, field: str, text: str = "") -> str:
    """The help of a flag that sets a field of a class in `core.config`: `help_of("AnnotateConfig", "size")`.

    text: shown instead of the field's description; the default is still the field's. Only a `Command` fills it in.
    """
    return f"{{{config}.{field}}}{text}"


class Command(TyperCommand):
    """A command whose flags may have help texts made by `help_of`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Fills in the texts, then shows the help."""
        for parameter in self.params:
            text = getattr(parameter, "help", None)
            if text and (match := _PLACEHOLDER.match(text)):
                parameter.help = _help(match[1], match[2], text[match.end() :])  # pyright: ignore[reportAttributeAccessIssue]
        super().format_help(ctx, formatter)


def _help(config: str, field: str, text: str) -> str:
    """A sentence and the default, e.g. `Worker processes. [default: all cores]`; brackets are escaped for rich.

    A description that ends with `; all cores when not given` says what the default None stands for.
    """
    from ..core import config as settings

    info = getattr(settings, config).model_fields[field]
    description, unset = info.description or "", None
    if match := re.fullmatch(r"(.*); (.+) when not given", description):
        description, unset = match.groups()
    sentence = text or re.sub(r"^[a-z]+(?=[ -]|$)", lambda word: word[0].capitalize(), description)
    choices = list(map(str, get_args(info.annotation))) if get_origin(info.annotation) is Literal else []
    if not text and not all(choice in description for choice in choices):
        sentence = f"{sentence}: {', '.join(choices)}"
    sentence = sentence.removesuffix(".") + "."
    default = unset or ("" if info.is_required() else _as_typed(info.get_default(call_default_factory=True)))
    return (f"{sentence} [default: {default}]" if default else sentence).replace("[", r"\[")


def _as_typed(default: Any) -> str:
    """A default as the user would type it; empty for a flag that is off or a value that is not set."""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "" if default is None or default is False or default == {} else f"{default}"
