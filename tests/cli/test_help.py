"""The examples in help pages and guides name commands and flags that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from sctool.cli import app

ROOT = Path(__file__).parents[2]


def commands() -> dict[str, set[str]]:
    """Flags by command, e.g. {"train": {"--method", ...}, "weights list": ...}."""
    flags = {}
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        for sub, leaf in getattr(command, "commands", {"": command}).items():
            flags[f"{name} {sub}".strip()] = {word for parameter in leaf.params for word in parameter.opts} | {"--help"}
    return flags


def examples() -> list[str]:
    """Every `sctool ...` line of the help pages, the README and the guides, comments cut off."""
    group = typer.main.get_command(app)
    leaves = [
        leaf
        for command in group.commands.values()  # pyright: ignore[reportAttributeAccessIssue]
        for leaf in getattr(command, "commands", {"": command}).values()
    ]
    texts = [leaf.help or "" for leaf in leaves]
    texts += [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if path.name != "log.md"]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    found = [re.search(r"^[\s>$`|-]*((?:accelerate launch .*-m |.*\| )?sctool [a-z].*)", line) for line in lines]
    return [re.split(r"\s{2,}#|\s{3,}|`", match[1])[0] for match in found if match]


def test_there_are_examples_of_every_command() -> None:
    used = " ".join(examples())
    assert [name for name in commands() if f"sctool {name}" not in used] == []


@pytest.mark.parametrize("line", examples())
def test_an_example_names_a_command_and_flags_that_exist(line: str) -> None:
    words = shlex.split(line[line.index("sctool ") :].split(" | ")[0], comments=True)[1:]
    known = commands()
    name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
    if name.isupper():
        return
    assert name in known, line
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= known[name], line
