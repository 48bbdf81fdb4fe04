"""The hub's SQLite file: what came is stored once, and only what is committed is acknowledged."""

from __future__ import annotations

import fcntl
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

from millhand.errors import StoreError
from millhand.store.rows import STREAMS
from millhand_hub.edge import Birth, Death, Delivery, Event
from millhand_hub.held import Held

DAY_MS = 86_400_000
PRUNE_ROWS = 20_000
FREED_PAGES_AT_ONCE = 2_000
BUSY_TIMEOUT_S = 10.0

StreamKey = tuple[int, str, str]
"""(node id, epoch, stream)"""


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What a node may forget: everything up to `upto` of each stream of `epoch`."""

    group: str
    node: str
    epoch: str
    upto: dict[str, int]


class Database:
    """Used from one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises StoreError naming path and remedy."""
        self._lock = _locked(path)
        try:
            self._connection = _connected(path)
        except sqlite3.Error as error:
            self._lock.close()
            raise StoreError(f"the hub's database '{path}' cannot be opened: {error}", hint="check data_dir") from error
        self._node_ids: dict[tuple[str, str], int] = {}
        self._held: dict[StreamKey, Held] = {}
        self._unsaved: set[StreamKey] = set()
        self.duplicates = 0

    def close(self) -> None:
        self._connection.close()
        self._lock.close()

    def commit(self, events: Sequence[Event]) -> list[Acknowledgement]:
        """Store everything in one transaction, in order; return what may be acknowledged then. Raises StoreError."""
        touched: dict[tuple[str, str, str], None] = {}
        with self._transaction():
            for event in events:
                if isinstance(event, Birth):
                    self._store_birth(event)
                elif isinstance(event, Death):
                    self._set_online(self._node_id(event.group, event.node), False)
                else:
                    self._store_delivery(event)
                if not isinstance(event, Death):
                    touched[event.group, event.node, event.epoch] = None
            self._save_held()
            now_ms = _now_ms()
            self._connection.executemany(
                "UPDATE nodes SET seen_ms = ? WHERE id = ?",
                {(now_ms, self._node_id(event.group, event.node)) for event in events},
            )
        return [self._acknowledgement(group, name, epoch) for group, name, epoch in touched]

    def forget_online(self) -> list[tuple[str, str]]:
        """Who is online is not known any more; return (group, node) of every known node. Raises StoreError."""
        with self._transaction():
            self._connection.execute("UPDATE nodes SET online = 0")
            return self._connection.execute('SELECT "group", node FROM nodes ORDER BY 1, 2').fetchall()

    def prune(self, keep_days: int) -> bool:
        """Delete some readings and predictions older than `keep_days`; return whether all are gone. Raises StoreError.

        A pass is bounded, so that rows do not wait for it; the file gives the space back.
        """
        limit_ms, most = _now_ms() - keep_days * DAY_MS, 0
        with self._transaction():
            for table in ("readings", "predictions"):
                cursor = self._connection.execute(
                    f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} WHERE time_ms < ? LIMIT ?)",  # noqa: S608
                    (limit_ms, PRUNE_ROWS),
                )
                most = max(most, cursor.rowcount)
        if most:
            self._connection.executescript(f"PRAGMA incremental_vacuum({FREED_PAGES_AT_ONCE})")
        return most < PRUNE_ROWS

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. What memory says of the file is forgotten where it fails. Raises StoreError."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._held.clear()
            self._unsaved.clear()
            self._node_ids.clear()
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            raise StoreError(
                f"the hub could not commit: {error}",
                hint="free disk space and look at data_dir; nodes keep their rows",
                retriable=True,
            ) from error

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _store_birth(self, birth: Birth) -> None:
        self._connection.execute(
            'INSERT INTO nodes ("group", node, online, version, born_ms) VALUES (?, ?, 1, ?, ?)'
            ' ON CONFLICT ("group", node) DO UPDATE SET online = 1, version = excluded.version,'
            " born_ms = excluded.born_ms",
            (birth.group, birth.node, birth.version, birth.born_ms),
        )
        node_id = self._node_id(birth.group, birth.node)
        for stream, base in birth.base.items():
            key = (node_id, birth.epoch, stream)
            held = self._held_of(key, base)
            if base > held.upto:  # an earlier hub had them; they will not come again
                held.add(1, base)
                self._unsaved.add(key)

    def _set_online(self, node_id: int, online: bool) -> None:
        self._connection.execute("UPDATE nodes SET online = ? WHERE id = ?", (online, node_id))

    def _store_delivery(self, delivery: Delivery) -> None:
        gap = delivery.gap
        stream = gap.stream if gap else delivery.stream
        first, last = (gap.first, gap.last) if gap else (delivery.seq, delivery.seq)
        key = (self._node_id(delivery.group, delivery.node), delivery.epoch, stream)
        held = self._held_of(key)
        if held.has(first, last):
            self.duplicates += 1
            return
        held.add(first, last)
        self._unsaved.add(key)
        if gap:
            self._connection.execute("INSERT INTO gaps VALUES (?, ?, ?, ?, ?, ?)", (*key, first, last, gap.reason))
        if delivery.unread is not None:
            self._connection.execute("INSERT INTO unread VALUES (?, ?, ?, ?, ?)", (*key, first, delivery.unread))
        self._store_bulk(key[0], delivery)
        self._store_alerts(key[0], delivery)

    def _store_bulk(self, node_id: int, delivery: Delivery) -> None:
        mark = (delivery.epoch, delivery.seq)
        self._connection.executemany(
            "INSERT INTO readings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (node_id, r.asset, r.name, r.time_ms, r.value, r.unit, r.quality, r.historical, *mark)
                for r in delivery.readings
            ],
        )
        self._connection.executemany(
            "INSERT INTO predictions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (node_id, p.asset, p.model, p.version, p.time_ms, p.kind, json.dumps(p.values), *mark)
                for p in delivery.predictions
            ],
        )

    def _store_alerts(self, node_id: int, delivery: Delivery) -> None:
        """An alert is as it was changed last, an order as its newest version, in whatever order their rows come."""
        if delivery.alert is not None:
            alert = delivery.alert
            self._connection.execute(
                "INSERT INTO alerts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id, node_id) DO UPDATE SET"
                " state = excluded.state, changed_ns = excluded.changed_ns, record = excluded.record"
                " WHERE excluded.changed_ns >= changed_ns",
                (alert.id, node_id, *alert.columns, alert.text),
            )
        if delivery.order is not None:
            order = delivery.order
            self._connection.execute(
                "INSERT INTO orders (id, node_id, asset, priority, created_ns, revision, record)"
                " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id, node_id) DO UPDATE SET"
                " priority = excluded.priority, revision = excluded.revision, record = excluded.record"
                " WHERE excluded.revision >= revision",
                (order.id, node_id, *order.columns, order.text),
            )

    # ---- what is held -----------------------------------------------------------------------------------------------

    def _held_of(self, key: StreamKey, base: int = 0) -> Held:
        """What is held of a stream. One that the file does not know begins behind `base`."""
        if key not in self._held:
            row = self._connection.execute(
                "SELECT held FROM streams WHERE node_id = ? AND epoch = ? AND stream = ?", key
            ).fetchone()
            spans = self._connection.execute(
                "SELECT first, last FROM ahead WHERE node_id = ? AND epoch = ? AND stream = ?", key
            ).fetchall()
            if row is None:
                self._connection.execute("INSERT INTO streams VALUES (?, ?, ?, ?, ?)", (*key, base, base + 1))
            self._held[key] = Held(base if row is None else row[0], dict(spans))
        return self._held[key]

    def _save_held(self) -> None:
        for key in self._unsaved:
            held = self._held[key]
            self._connection.execute(
                "UPDATE streams SET held = ? WHERE node_id = ? AND epoch = ? AND stream = ?", (held.upto, *key)
            )
            self._connection.execute("DELETE FROM ahead WHERE node_id = ? AND epoch = ? AND stream = ?", key)
            self._connection.executemany(
                "INSERT INTO ahead VALUES (?, ?, ?, ?, ?)", [(*key, first, last) for first, last in held.ahead.items()]
            )
        self._unsaved.clear()

    def _acknowledgement(self, group: str, node: str, epoch: str) -> Acknowledgement:
        node_id = self._node_id(group, node)
        held = {stream: self._held.get((node_id, epoch, stream)) for stream in STREAMS}
        return Acknowledgement(group, node, epoch, {s: found.upto for s, found in held.items() if found is not None})

    def _node_id(self, group: str, node: str) -> int:
        key = (group, node)
        if key not in self._node_ids:
            row: Any = self._connection.execute('SELECT id FROM nodes WHERE "group" = ? AND node = ?', key).fetchone()
            self._node_ids[key] = row[0]
        return self._node_ids[key]


def _locked(path: Path) -> IO[str]:
    """Hold `<path>.lock` for as long as the returned file is open. Raises StoreError where another hub holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("w")
    except OSError as error:
        raise StoreError(f"the hub's database '{path}' cannot be opened: {error}", hint="check data_dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise StoreError(
            f"the hub's database '{path}' is in use by another hub", hint="stop that one, or set another data_dir"
        ) from error
    return lock


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    try:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # works only before the first table
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript((files("millhand_hub") / "schema.sql").read_text(encoding="utf-8"))
        if not connection.execute("SELECT 1 FROM pragma_table_info('orders') WHERE name = 'revision'").fetchone():
            connection.execute("ALTER TABLE orders ADD COLUMN revision INTEGER NOT NULL DEFAULT 0")  # of an older hub
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
