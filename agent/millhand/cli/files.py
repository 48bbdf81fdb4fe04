"""Files that a command writes: whole or not at all."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from millhand.errors import InputError

TENSOR_FORMATS = ("json", "csv", "npy", "npz")


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is whole; a pipe or a device is written as it comes.

    Raises InputError where it cannot be written.
    """
    target = path.resolve()
    partial: Path | None = None
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            with target.open("wb") as handle:
                yield handle
            return
        number, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        partial = Path(name)
        with os.fdopen(number, "wb") as handle:
            yield handle
        partial.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
        partial.replace(target)
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be written: {error.strerror or error}",
            hint="name a file in a folder that you may write, on a disk with room",
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def written_text(path: Path | None) -> Iterator[TextIO]:
    """The same for UTF-8 text with its line ends as they are written; standard output for None."""
    if path is None:
        yield sys.stdout
        return
    with written(path) as handle, open(handle.fileno(), "w", newline="", encoding="utf-8", closefd=False) as text:
        yield text
