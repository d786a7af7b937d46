"""The list of packages in pyproject.toml is the one thing to forget when a folder is added."""

from __future__ import annotations

import ast
import graphlib
import importlib
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


def test_every_imported_name_exists() -> None:
    """Also of imports inside functions, which run late, and of those for types, which never run."""
    missing = []
    for file in [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]:
        package = ["sctool", *file.parent.relative_to(ROOT).parts]
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                if not hasattr(importlib.import_module(base), alias.name):
                    try:
                        importlib.import_module(f"{base}.{alias.name}")
                    except ImportError:
                        missing.append(f"{file.relative_to(ROOT)}:{node.lineno} {base}.{alias.name}")
    assert missing == []
