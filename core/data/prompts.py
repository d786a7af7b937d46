"""The prompt that an image is trained and sampled with: its caption, else its class label in a template."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from string import Formatter
from typing import ClassVar

from ..errors import UsageError
from .records import Record

Prompt = Callable[[Record], str]
"""The prompt of a record; "" where there is none."""


def caption_of(record: Record) -> str:
    """The record's own caption, else ""."""
    return record.text or ""


@dataclass(frozen=True)
class PromptRule:
    """A caption, else the class label in `template`, else nothing; `trigger` comes before it. Picklable.

    template: may contain `{label}`. Empty: labels are not used.
    """

    conditioned_on: ClassVar[str] = "caption"

    trigger: str = ""
    template: str | None = None

    def __call__(self, record: Record) -> str:
        """The prompt of `record`."""
        text = record.text or ""
        if not text.strip() and self.template and record.label:
            text = self.template.format(label=record.label)
        return f"{self.trigger} {text}".strip() if self.trigger else text


def check_template(template: str, key: str = "caption") -> str:
    """The template itself. Raises `UsageError` when it has a placeholder other than `{label}`."""
    try:
        fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UsageError(f"{key}='{template}': {error}; write a literal brace twice.") from error
    if any(field != ("label", "", None) for field in fields):
        raise UsageError(f"{key}='{template}': the only placeholder is {{label}}, e.g. 'a photo of a {{label}}'.")
    return template


@dataclass(frozen=True)
class PromptCounts:
    """How many of `images` have a prompt from their class label, and how many have none."""

    images: int
    from_labels: int
    empty: int
    example: str = ""
    """A prompt made from a label."""
    conditioned_on: str = "caption"
    """What the base is conditioned on: a caption, or a class label."""

    def __str__(self) -> str:
        """One line, "" when every image has its own caption."""
        parts = []
        if self.from_labels:
            parts.append(
                f"{self.from_labels} of {self.images} images have no caption and use their class label: "
                f'"{self.example}" (template: caption=...)'
            )
        if self.empty:
            lacking = "an empty caption" if self.conditioned_on == "caption" else f"no {self.conditioned_on}"
            parts.append(f"{self.empty} of {self.images} images have {lacking}")
        return "; ".join(parts)


def count_prompts(records: Iterable[Record], prompt: Prompt) -> PromptCounts:
    """Counts the prompts that are empty, and captions that would differ without the record's label."""
    conditioned_on = getattr(prompt, "conditioned_on", "caption")
    images = empty = 0
    labelled: list[str] = []
    for record in records:
        images += 1
        text = prompt(record)
        if not text.strip():
            empty += 1
        elif conditioned_on == "caption" and record.label and text != prompt(replace(record, label=None)):
            labelled.append(text)
    return PromptCounts(images, len(labelled), empty, labelled[0] if labelled else "", conditioned_on)
