"""The hub's SQLite file: what came is stored once, and only what is committed is acknowledged."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from millhand.errors import StoreError
from millhand.store.rows import STREAMS
from millhand_hub.edge import Delivery, EdgeNode
from millhand_hub.held import Held

DAY_MS = 86_400_000
PRUNE_ROWS = 20_000


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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript((files("millhand_hub") / "schema.sql").read_text(encoding="utf-8"))
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the hub's database '{path}' cannot be opened: {error}", hint="check data_dir") from error
        self._node_ids: dict[tuple[str, str], int] = {}
        self._held: dict[tuple[int, str, str], Held] = {}
        self.duplicates = 0

    def close(self) -> None:
        self._connection.close()

    def commit(
        self, deliveries: Sequence[tuple[EdgeNode, Delivery]], nodes: Iterable[EdgeNode]
    ) -> list[Acknowledgement]:
        """Store everything in one transaction; return what may be acknowledged then. Raises StoreError."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for node in nodes:
                self._store_node(node)
            touched = {}
            for node, delivery in deliveries:
                self._store(node, delivery)
                touched[node.group, node.node, delivery.epoch] = node
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._held.clear()  # what memory says may not have been stored
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise StoreError(f"the hub could not commit: {error}", hint="free disk space", retriable=True) from error
        return [self._acknowledgement(group, name, epoch) for group, name, epoch in touched]

    def acknowledgement(self, node: EdgeNode) -> Acknowledgement:
        """What the hub holds of the node's living epoch."""
        return self._acknowledgement(node.group, node.node, node.epoch)

    def prune(self, keep_days: int) -> int:
        """Delete some of the readings and predictions older than `keep_days`; return how many."""
        limit_ms = int(time.time() * 1000) - keep_days * DAY_MS
        deleted = 0
        for table in ("readings", "predictions"):
            cursor = self._connection.execute(
                f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} WHERE time_ms < ? LIMIT ?)",  # noqa: S608
                (limit_ms, PRUNE_ROWS),
            )
            deleted += cursor.rowcount
        return deleted

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _store_node(self, node: EdgeNode) -> None:
        self._connection.execute(
            'INSERT INTO nodes ("group", node, online, version, born_ms, seen_ms) VALUES (?, ?, ?, ?, ?, ?)'
            ' ON CONFLICT ("group", node) DO UPDATE SET online = excluded.online, version = excluded.version,'
            " born_ms = excluded.born_ms, seen_ms = excluded.seen_ms",
            (node.group, node.node, node.online, node.version, node.born_ms, int(time.time() * 1000)),
        )
        node_id = self._node_id(node.group, node.node)
        for stream, base in node.base.items():
            held = self._held_of(node_id, node.epoch, stream, base)
            if base > held.upto:  # an earlier hub had them; they will not come again
                held.add(1, base)
                self._store_held(node_id, node.epoch, stream, held)

    def _store(self, node: EdgeNode, delivery: Delivery) -> None:
        node_id = self._node_id(node.group, node.node)
        gap = delivery.gap
        first, last = (gap["first"], gap["last"]) if gap else (delivery.seq, delivery.seq)
        stream = gap["stream"] if gap else delivery.stream
        held = self._held_of(node_id, delivery.epoch, stream, node.base.get(stream, 0))
        if held.has(first, last):
            self.duplicates += 1
            return
        held.add(first, last)
        self._store_held(node_id, delivery.epoch, stream, held)
        if gap:
            mark = (node_id, delivery.epoch, stream, first, last, gap["reason"])
            self._connection.execute("INSERT INTO gaps VALUES (?, ?, ?, ?, ?, ?)", mark)
        self._store_bulk(node_id, delivery)
        self._store_alerts(node_id, delivery)

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
        alert, order = delivery.alert, delivery.order
        if alert is not None:
            keys = ("asset", "kind", "severity", "state", "raised_ns", "changed_ns")
            self._connection.execute(
                "INSERT INTO alerts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
                " state = excluded.state, changed_ns = excluded.changed_ns, record = excluded.record"
                " WHERE excluded.changed_ns >= changed_ns",
                (alert["id"], node_id, *(alert[key] for key in keys), json.dumps(alert)),
            )
        if order is not None:
            columns = ("asset", "priority", "created_ns")
            self._connection.execute(
                "INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                (order["id"], node_id, *(order[column] for column in columns), json.dumps(order)),
            )

    # ---- what is held -----------------------------------------------------------------------------------------------

    def _held_of(self, node_id: int, epoch: str, stream: str, base: int) -> Held:
        key = (node_id, epoch, stream)
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

    def _store_held(self, node_id: int, epoch: str, stream: str, held: Held) -> None:
        key = (node_id, epoch, stream)
        self._connection.execute(
            "UPDATE streams SET held = ? WHERE node_id = ? AND epoch = ? AND stream = ?", (held.upto, *key)
        )
        self._connection.execute("DELETE FROM ahead WHERE node_id = ? AND epoch = ? AND stream = ?", key)
        self._connection.executemany(
            "INSERT INTO ahead VALUES (?, ?, ?, ?, ?)", [(*key, first, last) for first, last in held.ahead.items()]
        )

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
