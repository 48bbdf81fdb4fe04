"""Files that are whole or not there, also after a power cut."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_durably(path: Path, data: bytes, mode: int = 0o644, group: int | None = None) -> None:
    """Write a whole file or nothing: temporary file, fsync, rename, fsync of the folder. Raises OSError.

    group: whose the file is; None for the process's own.
    """
    number, name = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path))
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            if group is not None:
                os.fchown(file.fileno(), -1, group)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary_prefix(path: Path) -> str:
    """What the names of a file's temporary files begin with."""
    return f".{path.name}-"


def sync_folder(folder: Path) -> None:
    """Make renames in a folder outlive a power cut. Raises OSError."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
