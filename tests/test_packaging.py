"""The list of packages in pyproject.toml is the one thing to forget when a folder is added."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("cli", "core", "annotators", "eval")


def test_no_package_is_forgotten() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"sctool"}
    for folder in FOLDERS:
        inits = (ROOT / folder).rglob("__init__.py")
        found |= {"sctool." + ".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    assert listed == found


def test_every_folder_is_in_the_readme_map() -> None:
    readme = (ROOT / "README.md").read_text()
    names = {path.parent.name for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    assert [name for name in sorted(names) if f"{name}/" not in readme] == []
