"""SHA-256 of an artifact with its data files; a file is read again only when something about it has changed."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from millhand.durable import temporary_prefix
from millhand.errors import ModelError
from millhand.proof.document import PAGE, PROOF, RECORD

ABOUT = (PROOF, PAGE, RECORD)
TEMPORARY = tuple(temporary_prefix(Path(name)) for name in ABOUT)
SETTLED_NS = 2_000_000_000
"""A file that was changed later than this may change again within one tick of its file system's clock, unseen."""
CACHE_CAP = 1024
READ_BYTES = 1 << 20

_Stamp = tuple[int, int, int, int, int]
_cache: dict[_Stamp, str] = {}
_lock = threading.Lock()


def digest(files: Mapping[str, Path]) -> str:
    """The digest of an artifact: name -> file. Hex.

    Of one file it is its SHA-256; of several the SHA-256 of the lines that `sha256sum` prints for them in the order of
    their names, so that `sha256sum FILE... | sha256sum` finds it too. Raises ModelError where a file changes while it
    is read, OSError where one cannot be read.
    """
    found = {name: _file_digest(files[name]) for name in sorted(files, key=os.fsencode)}
    if len(found) == 1:
        return next(iter(found.values()))
    lines = b"".join(f"{sha256}  ".encode() + os.fsencode(name) + b"\n" for name, sha256 in found.items())
    return hashlib.sha256(lines).hexdigest()


def artifact_files(folder: Path) -> dict[str, Path]:
    """Everything in an artifact's folder that is part of it: relative name -> path. Links are followed.

    What speaks of the artifact is left out. A folder that is not there has none. Raises ModelError for what is neither
    file nor folder, and for a name that no line can hold; OSError.
    """
    found: dict[str, Path] = {}
    passed: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_unless_missing):
        passed.add(os.path.realpath(root))
        folders[:] = [name for name in folders if os.path.realpath(Path(root, name)) not in passed]
        for name in names:
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if speaks_of_it(relative):
                continue
            if "\n" in relative or "\\" in relative or not path.is_file():
                raise ModelError(
                    f"{relative!r} in '{folder}' is no plain file, or has a line break or backslash in its name",
                    hint="take it out of the folder",
                )
            found[relative] = path
    return found


def speaks_of_it(name: str) -> bool:
    """Whether a file, by its name relative to an artifact's folder, speaks of the artifact: proof, page or record."""
    return name in ABOUT or name.startswith(TEMPORARY)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        stamp = _stamp(os.fstat(file.fileno()))
        with _lock:
            known = _cache.get(stamp)
        if known is not None:
            return known
        sha256 = _sha256(file)
        if _stamp(os.fstat(file.fileno())) != stamp:
            raise ModelError(f"'{path}' changes while it is read", hint="try again when it has been written")
    if time.time_ns() - max(stamp[-2:]) > SETTLED_NS:
        with _lock:
            while len(_cache) >= CACHE_CAP:
                _cache.pop(next(iter(_cache)))
            _cache[stamp] = sha256
    return sha256


def _sha256(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while part := file.read(READ_BYTES):
        found.update(part)
    return found.hexdigest()


def _stamp(status: os.stat_result) -> _Stamp:
    """What changes with a file's content: a program can set the time of change, not that of its inode (ctime)."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
