"""Folders among models and versions that look as if they were meant to be one, and are none."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LIKE_A_VERSION = re.compile(r"[vV]?(\d+)")
FILES_SHOWN = 3


@dataclass(frozen=True)
class Stray:
    """A folder in a model's that is passed over."""

    folder: str
    """Its name."""
    reason: str


def stray_versions(model: Path, files: Sequence[str], versions: Collection[int]) -> Iterator[Stray]:
    """The folders of a model that are no version, though named like one or holding all that a version must hold.

    files: what a version's folder must hold. versions: those that are good. Raises OSError.
    """
    good = set(map(str, versions))
    for folder in _folders(model):
        name = folder.name
        missing = [file for file in files if not (folder / file).exists()]
        like = _LIKE_A_VERSION.fullmatch(name)
        if name in good:
            continue
        if is_version(name):
            if missing:
                yield Stray(name, f"{name}/ has no '{missing[0]}'; {_contents(folder)}")
        elif like or (files and not missing):
            number = int(like[1]) if like else 0
            yield Stray(name, f"{name}/ is no version: its name must be a number from 1 on, such as {number or 1}")


def stray_models(root: Path, manifest: str) -> Iterator[Path]:
    """The folders of `root` without a manifest that hold a folder named like a version; not those that cannot be read.

    Raises OSError.
    """
    for folder in _folders(root):
        found = False
        with suppress(OSError):
            found = not (folder / manifest).exists() and any(map(_like_a_version, _folders(folder)))
        if found:
            yield folder


def is_version(name: str) -> bool:
    """Whether a folder of this name is a version's."""
    return name.isascii() and name.isdecimal() and not name.startswith("0")


def _like_a_version(folder: Path) -> bool:
    return bool(_LIKE_A_VERSION.fullmatch(folder.name))


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:FILES_SHOWN]) + (", …" if len(names) > FILES_SHOWN else "")
    return f"it holds {shown}" if names else "it is empty"
