"""Paths named by a set: those that lead outside its folder are refused."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from .records import PICTURES, Fault

NO_UTF8 = "the name is not UTF-8; rename the file"


def is_utf8(name: str) -> bool:
    """Whether a name can be written as text; names in file systems and tars may have any bytes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def shown(name: str) -> str:
    """The name for messages, bytes that are not UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def unsafe(name: str) -> str | None:
    """Why a relative path in a set is refused (absolute, `..`, drive, NUL, not UTF-8), or None."""
    if not is_utf8(name):
        return NO_UTF8
    if not name or "\0" in name:
        return "the name is empty or contains a NUL byte"
    if name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":"):
        return "the path is absolute; paths must lie inside the set's folder"
    if ".." in PurePosixPath(name.replace("\\", "/")).parts:
        return "the path leaves the set's folder ('..')"
    return None


def inside(root: Path, name: str) -> tuple[str | None, str | None]:
    """(path, None) of an existing file `name` inside `root`, or (None, reason); links that lead out are refused."""
    reason = unsafe(name)
    if reason:
        return None, reason
    path = os.path.join(root, name)
    if not os.path.isfile(path):
        return None, "no such file"
    if not contains(root, path):
        return None, "the path is a link to outside the set's folder"
    return path, None


def contains(root: Path, path: str) -> bool:
    """Whether `path`, links followed, lies inside `root`, links followed."""
    real = os.path.realpath(root)
    return os.path.realpath(path).startswith(real.rstrip(os.sep) + os.sep)


def is_picture(name: str) -> bool:
    """Whether the extension is that of an image, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in PICTURES


def walk(root: Path, faults: list[Fault]) -> list[str]:
    """Every file under `root` except hidden ones, as a sorted list of relative POSIX paths.

    Links to folders, and links to files outside `root`, are left out and become faults.
    """
    files: list[str] = []
    stack = [""]
    while stack:
        folder = stack.pop()
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as error:
            faults.append(Fault(folder or str(root), f"the folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            if not is_utf8(entry.name):
                faults.append(Fault(shown(name), NO_UTF8))
                continue
            if entry.is_dir(follow_symlinks=False):
                stack.append(name)
            elif entry.is_symlink() and (entry.is_dir() or not entry.is_file() or not contains(root, entry.path)):
                what = "is a link to a folder, which is not followed" if entry.is_dir() else "is a broken link"
                if entry.is_file():
                    what = "is a link to outside the set's folder"
                faults.append(Fault(name, f"{what}; copy the files instead"))
            elif entry.is_file():
                files.append(name)
    return sorted(files)
