"""Folders and files that take their place at once: there is never half of one, and never none where one was."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

from millhand.durable import sync_folder

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
"""renameat2(2), Linux 3.15."""
_NOT_KNOWN = (errno.EINVAL, errno.ENOSYS, errno.EXDEV)
"""The last from an overlay, of a folder in its lower layer: it can be taken away there, never moved."""


def put(new: Path, place: Path) -> None:
    """Put `new`, whole and on the same file system, into `place`; what was there goes. Raises OSError."""
    sync_tree(new)
    place.parent.mkdir(parents=True, exist_ok=True)
    if (not place.exists() and not place.is_symlink()) or (new.is_file() and place.is_file()):
        new.replace(place)
    elif not _exchanged(new, place):
        # A file system without it: between these two nothing is there, and the next run ends it.
        old = new.with_name(f"{new.name}.old")
        put_aside(place, old)
        new.replace(place)
        remove(old)
    sync_folder(place.parent)
    remove(new)


def put_aside(place: Path, aside: Path) -> None:
    """Move a folder away, at once where the file system can; then `aside` holds it. Raises OSError."""
    try:
        place.replace(aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        remove(place)


def remove(path: Path) -> None:
    """Take a file or folder away, whatever it is; nothing where it is gone already. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_tree(path: Path) -> None:
    """Write all of a file or folder to the disk. Raises OSError."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync_file(Path(folder, name))
        sync_folder(Path(folder))
    if path.is_file():
        _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _exchanged(one: Path, other: Path) -> bool:
    """Let two names change places; False where the file system cannot. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_KNOWN:
        return False
    raise OSError(number, os.strerror(number), str(one))
