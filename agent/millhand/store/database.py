"""The store's file and the one connection to it: create, migrate, check, set aside, identify."""

from __future__ import annotations

import contextlib
import logging
import secrets
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from millhand.durable import sync_folder, write_durably
from millhand.errors import StoreError
from millhand.store.clock import StoreClock
from millhand.store.faults import Damage, extended_code, is_damage, store_error
from millhand.store.settings import StoreSettings

log = logging.getLogger("millhand.store")

APPLICATION_ID = 0x6D686E64
MAGIC = b"SQLite format 3\x00"
HEADER_BYTES = 100
SIDE_FILES = ("", "-wal", "-shm")
# Pages in the write-ahead log before it is copied into the file: SQLite's own default, 4 MB.
CHECKPOINT_PAGES = 1000
# A safety net only, should the estimate of pages written be far too low.
AUTOCHECKPOINT_PAGES = 8 * CHECKPOINT_PAGES

PRAGMAS = (
    # No second opener, and no -shm file: the write-ahead log's index lives in this process's memory.
    "PRAGMA locking_mode = EXCLUSIVE",
    # Works only before the first table.
    "PRAGMA auto_vacuum = INCREMENTAL",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA secure_delete = OFF",
    "PRAGMA temp_store = MEMORY",
    "PRAGMA cache_size = -4096",
    f"PRAGMA wal_autocheckpoint = {AUTOCHECKPOINT_PAGES}",
    f"PRAGMA journal_size_limit = {4 * CHECKPOINT_PAGES * 4096}",
)


class Loss(NamedTuple):
    """A file that had to be given up: why, and where it lies now (None where nothing was left of it)."""

    reason: str
    path: Path | None


class Database:
    """One SQLite file, opened by one thread through one connection.

    Identity: `epoch` is a UUID in the file. A copy of an old file that was put in the store's place would use sequence
    numbers a second time, so it must get a new epoch. To notice, a random token is written to the file and to a marker
    `<name>.instance` beside it at each open, about each minute, and at close. A file whose token is not the marker's is
    an older copy, or comes from another node: it gets a new epoch. Not noticed: a copy put back within the minute in
    which it was taken, or one put back together with the marker of the same moment.
    """

    def __init__(self, path: Path, settings: StoreSettings) -> None:
        self.path = path
        self.epoch = ""
        self.restored = False
        self.alert_last_at_open = 0
        """Newest seq of the alert stream when this file was opened or begun."""
        self.losses: list[Loss] = []
        """Files that were given up since this object was made, oldest first."""
        self._settings = settings
        self._connection: sqlite3.Connection | None = None
        self._marker = path.with_name(path.name + ".instance")
        self._marker_token = ""
        self._inodes: dict[Path, int] = {}
        self._floor_bytes = 0
        self.clock = StoreClock(0)

    @property
    def set_aside(self) -> list[Path]:
        """The files among the losses that are still there to be looked at."""
        return [loss.path for loss in self.losses if loss.path is not None]

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    @property
    def connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(f"'{self.path}' is not open", hint="open the store first", retriable=True)
        return self._connection

    def open(self) -> None:
        """Open or create the file; a damaged one is set aside first. Raises StoreError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except (sqlite3.Error, Damage) as error:
                if not is_damage(error):
                    raise
                self.replace(str(error))
        except (sqlite3.Error, OSError) as error:
            self._disconnect()
            raise store_error(error, self.path) from error
        except BaseException:
            self._disconnect()
            raise

    def close(self) -> None:
        """Write clock and token once more, fold the write-ahead log into the file, close."""
        if self._connection is None:
            return
        try:
            self.renew_token()
        except (sqlite3.Error, OSError) as error:
            log.warning("the store was closed without a fresh token: %s", error)
        self._disconnect()

    def replace(self, reason: str) -> None:
        """Set the file aside and begin a new one with a new epoch. Raises sqlite3.Error or OSError."""
        log.error("the store '%s' is set aside: %s", self.path, reason)
        # What is only in the write-ahead log would be lost with a deleted log; a damaged file may refuse.
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        # First rename, then close: closing deletes `<name>-wal`, and it must not be the new file's.
        self.losses.append(Loss(reason, self._move_aside()))
        self._disconnect()
        try:
            self._open()
        except BaseException:
            self._disconnect()
            raise

    def moved(self) -> str:
        """Why the file under `path` is no longer the one that is open; empty when all is well."""
        for path, inode in self._inodes.items():
            try:
                found = path.stat()
            except FileNotFoundError:
                return f"'{path.name}' was deleted while in use"
            if found.st_ino != inode:
                return f"'{path.name}' was replaced while in use"
            if path == self.path and found.st_size < self._floor_bytes:
                return f"'{path.name}' was cut from {self._floor_bytes} to {found.st_size} bytes while in use"
        return ""

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; returns after the fsync."""
        connection = self.connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def pragma(self, name: str) -> int:
        return int(self.connection.execute(f"PRAGMA {name}").fetchone()[0])

    def checkpoint(self, truncate: bool = False) -> None:
        """Copy the write-ahead log into the file; `truncate` also gives the log's disk space back."""
        self.connection.execute(f"PRAGMA wal_checkpoint({'TRUNCATE' if truncate else 'PASSIVE'})").fetchall()
        self._floor_bytes = self.path.stat().st_size

    def shrink(self, pages: int) -> None:
        """Cut at most so many free pages off the file."""
        # From here to the next checkpoint a shorter file is no sign of a foreign hand.
        self._floor_bytes = 0
        # As a script: the pragma gives an empty row for each page, at the first of which `execute` would stop.
        self.connection.executescript(f"PRAGMA incremental_vacuum({pages})")
        # The file itself is cut when the write-ahead log is copied into it.
        self.checkpoint()

    def renew_token(self) -> None:
        """Write clock and a fresh token to the file, then the token to the marker.

        The file also keeps what the marker held before, so that a crash between the two is no false alarm.
        """
        token = secrets.token_hex(16)
        with self.transaction() as connection:
            connection.execute(
                "UPDATE identity SET token = ?, marker_token = ?, clock_s = ?",
                (token, self._marker_token, self.clock.now_s()),
            )
        write_durably(self._marker, token.encode("ascii"))
        self._marker_token = token

    # ---- opening ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        existed = self._check_header()
        self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=0.0, cached_statements=256)
        for statement in PRAGMAS:
            self._connection.execute(statement).fetchall()
        if existed:
            self._quick_check()
        self._migrate()
        self._identify()
        row = self._connection.execute("SELECT last FROM stream WHERE name = 'alert'").fetchone()
        self.alert_last_at_open = int(row[0])
        self.renew_token()
        self.checkpoint()
        paths = [self.path, self.path.with_name(self.path.name + "-wal")]
        self._inodes = {path: path.stat().st_ino for path in paths}

    def _disconnect(self) -> None:
        self._inodes = {}
        if self._connection is not None:
            # A damaged file may refuse even this; there is nothing left to save then.
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _check_header(self) -> bool:
        """Whether a database is there. Raises Damage for a file that cannot be one, StoreError for a foreign one.

        Looks at the bytes, since SQLite would change the header of a foreign file when it opens it.
        """
        try:
            with self.path.open("rb") as file:
                head = file.read(HEADER_BYTES)
        except FileNotFoundError:
            return False
        if not head:
            return False
        # SQLite's file format, section 1.3: the magic, then the fixed payload fractions at 21 to 23.
        if len(head) < HEADER_BYTES or head[:16] != MAGIC or head[21:24] != bytes((64, 32, 32)):
            raise Damage(f"'{self.path.name}' does not begin like a SQLite file")
        schema_version, application_id = int.from_bytes(head[40:44]), int.from_bytes(head[68:72])
        if schema_version and application_id != APPLICATION_ID:
            raise StoreError(
                f"'{self.path}' is another program's database", hint="move it away, or change [node] data_dir"
            )
        return True

    def _quick_check(self) -> None:
        """Look for damaged pages, for a bounded time: a large file is not read to its end."""
        connection = self.connection
        timer = threading.Timer(self._settings.check_time_cap_s, connection.interrupt)
        timer.start()
        try:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.OperationalError as error:
            if extended_code(error) != sqlite3.SQLITE_INTERRUPT:
                raise
            return
        finally:
            timer.cancel()
            timer.join()
        if found != "ok":
            raise Damage(str(found))

    def _migrate(self) -> None:
        connection = self.connection
        found = self.pragma("user_version")
        scripts = migrations()
        newest = max(scripts)
        if found > newest:
            raise StoreError(
                f"'{self.path}' has schema {found}, this version knows up to {newest}",
                hint="install the newer millhand again, or move the file away to begin a new one",
            )
        for number in range(found + 1, newest + 1):
            connection.executescript(
                f"BEGIN; {scripts[number]}; PRAGMA application_id = {APPLICATION_ID}; "
                f"PRAGMA user_version = {number}; COMMIT;"
            )

    def _identify(self) -> None:
        connection = self.connection
        row = connection.execute("SELECT epoch, token, marker_token, clock_s FROM identity").fetchone()
        if row is None:
            self.epoch = str(uuid.uuid4())
            with self.transaction():
                connection.execute(
                    "INSERT INTO identity (id, epoch, token, marker_token) VALUES (1, ?, '', '')", (self.epoch,)
                )
            self.clock = StoreClock(0)
            return
        self.epoch, token, marker_token, clock_s = row
        self.clock = StoreClock(clock_s)
        self._marker_token = _read_marker(self._marker)
        if self._marker_token not in (token, marker_token) or not self._marker_token:
            log.warning("the store '%s' is a restored copy: it gets a new epoch", self.path)
            self.restored = True
            self.epoch = str(uuid.uuid4())
            with self.transaction():
                connection.execute("UPDATE identity SET epoch = ?", (self.epoch,))

    # ---- setting aside ----------------------------------------------------------------------------------------------

    def _move_aside(self) -> Path | None:
        """Rename the file with its companions; returns its new place, None where there was no file."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        target = self.path.with_name(f"{self.path.name}.corrupt-{stamp}")
        count = 1
        while target.exists():
            count += 1
            target = self.path.with_name(f"{self.path.name}.corrupt-{stamp}-{count}")
        for suffix in SIDE_FILES:
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).rename(target.with_name(target.name + suffix))
        sync_folder(self.path.parent)
        self._prune_set_aside()
        return target if target.exists() else None

    def _prune_set_aside(self) -> None:
        kept = [
            path
            for path in self.path.parent.glob(f"{self.path.name}.corrupt-*")
            if not path.name.endswith(SIDE_FILES[1:])
        ]
        kept.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in kept[: -self._settings.set_aside_files_cap]:
            for suffix in SIDE_FILES:
                path.with_name(path.name + suffix).unlink(missing_ok=True)


def migrations() -> dict[int, str]:
    """Number -> SQL text of every migration in the package, `0001_<what>.sql` first."""
    folder = resources.files("millhand.store") / "migrations"
    return {
        int(item.name.split("_", 1)[0]): item.read_text(encoding="utf-8")
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".sql")
    }


def _read_marker(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
