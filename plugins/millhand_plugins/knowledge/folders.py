"""Which files of a folder are taken in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from millhand.errors import InputError
from millhand_plugins.knowledge.reading import SUFFIXES


def files_of(path: Path, files_cap: int) -> tuple[Path, list[Path], list[tuple[Path, str]]]:
    """The path as it is known by, the files to read, and those that are refused, such as links out of the folder.

    Files of other kinds are passed over. Raises InputError where there is nothing, or too much.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - links keep their names
    if not path.exists():
        raise InputError(f"'{path}' does not exist", hint="give the path of a file or a folder on this node")
    if not path.is_dir():
        return path, [path], []
    files: list[Path] = []
    refused: list[tuple[Path, str]] = []
    root = path.resolve()
    for file in _walk(path):
        if file.suffix.lower() not in SUFFIXES:
            continue
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            refused.append((file, "is a link that leads out of the folder"))
        else:
            files.append(file)
        if len(files) > files_cap:
            raise InputError(
                f"'{path}' holds more than {files_cap:,} files",
                hint="add its folders one by one, or raise [plugins.knowledge] files_cap",
            )
    if not files and not refused:
        raise InputError(f"'{path}' holds no file that can be read", hint=f"known kinds: {', '.join(SUFFIXES)}")
    return path, sorted(files), refused


def _walk(path: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(path):  # does not follow links to folders
        for name in names:
            yield Path(folder) / name
