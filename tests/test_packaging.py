"""The list of packages in pyproject.toml is the one thing to forget when a folder is added."""

from __future__ import annotations

import graphlib
import tomllib
from pathlib import Path

import grimp

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


def test_no_two_files_import_each_other_not_even_for_types() -> None:
    graph = grimp.build_graph("sctool", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError with the modules of a cycle
