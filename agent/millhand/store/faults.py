"""SQLite's error codes, read as what a person or the store can do about them."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

from millhand.errors import StoreError

_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
_DAMAGE_EXTENDED = {sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS}
_SURROUNDINGS = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
}
_FULL_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Damage(Exception):
    """The file is not what the store wrote: it must be set aside. Never leaves the store."""


def extended_code(error: BaseException) -> int:
    """SQLite's extended result code, or -1 for an error that is not SQLite's."""
    return int(getattr(error, "sqlite_errorcode", -1))


def is_damage(error: BaseException) -> bool:
    """Whether the content of the file is bad, or its tables are not the store's."""
    code = extended_code(error)
    if code == sqlite3.SQLITE_ERROR and str(error).startswith(("no such table", "no such column")):
        return True
    return isinstance(error, Damage) or code in _DAMAGE_EXTENDED or (code >= 0 and code & 0xFF in _DAMAGE)


def is_surroundings(error: BaseException) -> bool:
    """Whether disk, file system or memory refused; the same call may work later."""
    code = extended_code(error)
    return isinstance(error, OSError) or (code >= 0 and code & 0xFF in _SURROUNDINGS)


def store_error(error: BaseException, path: Path) -> StoreError:
    """Say what happened to the store at `path`, and the remedy."""
    if isinstance(error, StoreError):
        return error
    code = extended_code(error)
    full = code & 0xFF == sqlite3.SQLITE_FULL if code >= 0 else getattr(error, "errno", None) in _FULL_ERRNO
    if full:
        return StoreError(
            f"the disk under '{path}' is full",
            hint="free some space, or lower [store] bytes_cap; the step will be tried again",
            retriable=True,
        )
    if code >= 0 and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreError(
            f"'{path}' is in use by another process",
            hint="stop the other millhand, or give this one its own [node] data_dir",
        )
    if is_surroundings(error):
        return StoreError(
            f"'{path}' cannot be read or written: {error}",
            hint="check the folder's permissions, the mount and the disk's health; the step will be tried again",
            retriable=True,
        )
    return StoreError(f"'{path}' refused a statement: {error}", hint="look at the value named, or report a defect")
