"""The outbox: a cursor over the rows of each stream, with gaps where rows were dropped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec

from millhand.errors import StoreError
from millhand.store.database import Database
from millhand.store.rows import STREAMS, Gap, Row

# Not built from input: the only two table names that a stream can have.
TABLES = {"alert": "alert_row", "bulk": "bulk"}
BDSEQ_COUNT = 256


@dataclass(slots=True)
class StreamState:
    """Counters of one stream. last: newest seq given out. acked: the hub has everything up to it."""

    last: int
    acked: int
    row_count: int
    body_bytes: int


class Outbox:
    """Appends to, reads and shortens the streams. State in memory mirrors the file; load a new one after a roll-back.

    Rows leave oldest first only, so behind `acked` lie gaps without a hole between them, then rows up to `last`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.streams = {
            name: StreamState(*counters)
            for name, *counters in database.connection.execute(
                "SELECT name, last, acked, row_count, body_bytes FROM stream"
            )
        }

    def state(self, stream: str) -> StreamState:
        try:
            return self.streams[stream]
        except KeyError:
            raise StoreError(f"stream '{stream}' is not known", hint=f"use one of {', '.join(STREAMS)}") from None

    # ---- inside a transaction ---------------------------------------------------------------------------------------

    def append_bulk(self, asset_id: int, since_ns: int, until_ns: int, stored_s: int, body: bytes) -> int:
        seq = self._next_seq("bulk", len(body))
        self._database.connection.execute(
            "INSERT INTO bulk (seq, asset_id, since_ns, until_ns, created_ns, stored_s, body) VALUES (?,?,?,?,?,?,?)",
            (seq, asset_id, since_ns, until_ns, time.time_ns(), stored_s, body),
        )
        return seq

    def append_alert(self, asset_id: int, kind: str, stored_s: int, body: bytes) -> int:
        seq = self._next_seq("alert", len(body))
        self._database.connection.execute(
            "INSERT INTO alert_row (seq, asset_id, kind, created_ns, stored_s, body) VALUES (?,?,?,?,?,?)",
            (seq, asset_id, kind, time.time_ns(), stored_s, body),
        )
        return seq

    def _next_seq(self, stream: str, body_bytes: int) -> int:
        state = self.streams[stream]
        state.last += 1
        state.row_count += 1
        state.body_bytes += body_bytes
        return state.last

    def save(self) -> None:
        """Write the counters."""
        self._database.connection.executemany(
            "UPDATE stream SET last = ?, acked = ?, row_count = ?, body_bytes = ? WHERE name = ?",
            [(s.last, s.acked, s.row_count, s.body_bytes, name) for name, s in self.streams.items()],
        )

    def drop_through(self, stream: str, seq: int, reason: str) -> int:
        """Delete every row up to `seq`; unacknowledged ones leave a gap. Returns the number of rows deleted."""
        connection, state, table = self._database.connection, self.streams[stream], TABLES[stream]
        rows, unsent, body_bytes = connection.execute(
            f"SELECT count(*), count(*) FILTER (WHERE seq > ?), coalesce(sum(length(body)), 0) "  # noqa: S608
            f"FROM {table} WHERE seq <= ?",
            (state.acked, seq),
        ).fetchone()
        connection.execute(f"DELETE FROM {table} WHERE seq <= ?", (seq,))  # noqa: S608
        state.row_count -= rows
        state.body_bytes -= body_bytes
        if unsent:
            self._extend_gap(stream, seq, reason)
            connection.execute(
                "INSERT INTO dropped (stream, reason, row_count) VALUES (?, ?, ?) "
                "ON CONFLICT (stream, reason) DO UPDATE SET row_count = row_count + excluded.row_count",
                (stream, reason, unsent),
            )
        self.save()
        return int(rows)

    def _extend_gap(self, stream: str, last: int, reason: str) -> None:
        connection = self._database.connection
        newest = connection.execute(
            "SELECT last, reason FROM gap WHERE stream = ? ORDER BY last DESC LIMIT 1", (stream,)
        ).fetchone()
        if newest is not None and newest[1] == reason:
            connection.execute("UPDATE gap SET last = ? WHERE stream = ? AND last = ?", (last, stream, newest[0]))
            return
        first = max(self.streams[stream].acked, newest[0] if newest else 0) + 1
        connection.execute(
            "INSERT INTO gap (stream, first, last, reason, created_ns) VALUES (?, ?, ?, ?, ?)",
            (stream, first, last, reason, time.time_ns()),
        )

    # ---- whole calls ------------------------------------------------------------------------------------------------

    def pending(self, stream: str, after: int, limit: int) -> list[Row]:
        state, connection, epoch = self.state(stream), self._database.connection, self._database.epoch
        kind = "'bulk'" if stream == "bulk" else "kind"
        rows = connection.execute(
            f"SELECT seq, asset.name, {kind}, created_ns, body FROM {TABLES[stream]} AS row "  # noqa: S608
            "JOIN asset ON asset.id = row.asset_id WHERE seq > ? ORDER BY seq LIMIT ?",
            (max(after, 0), limit),
        )
        gaps = connection.execute(
            "SELECT first, last, reason, created_ns FROM gap WHERE stream = ? AND last > ? ORDER BY last LIMIT ?",
            (stream, after, limit),
        )
        found = [_gap_row(stream, after, epoch, *gap) for gap in gaps]
        # Rows that the hub has already stay for a while as local history: they may lie before a gap.
        found += [Row(stream, seq, asset, kind, created_ns, body, epoch) for seq, asset, kind, created_ns, body in rows]
        found.sort(key=lambda row: row.seq)
        return [row for row in found if row.seq <= state.last][:limit]

    def acknowledge(self, stream: str, upto: int, epoch: str | None) -> None:
        state = self.state(stream)
        upto = min(upto, state.last)
        if upto <= state.acked or epoch not in (None, self._database.epoch):
            return
        with self._database.transaction() as connection:
            connection.execute("UPDATE stream SET acked = ? WHERE name = ?", (upto, stream))
            connection.execute("DELETE FROM gap WHERE stream = ? AND last <= ?", (stream, upto))
            connection.execute("UPDATE gap SET first = ? WHERE stream = ? AND first <= ?", (upto + 1, stream, upto))
        state.acked = upto

    def next_bdseq(self) -> int:
        with self._database.transaction() as connection:
            row = connection.execute(
                "UPDATE identity SET bdseq = (bdseq + 1) % ? RETURNING bdseq", (BDSEQ_COUNT,)
            ).fetchone()
        return int(row[0])

    def dropped(self, stream: str) -> dict[str, int]:
        return dict(
            self._database.connection.execute("SELECT reason, row_count FROM dropped WHERE stream = ?", (stream,))
        )

    def oldest_unsent_s(self, stream: str) -> int | None:
        """Age of the oldest row that the hub has not acknowledged, by the store's clock; None when there is none."""
        row = self._database.connection.execute(
            f"SELECT stored_s FROM {TABLES[stream]} WHERE seq > ? ORDER BY seq LIMIT 1",  # noqa: S608
            (self.streams[stream].acked,),
        ).fetchone()
        return None if row is None else self._database.clock.now_s() - int(row[0])


def _gap_row(stream: str, after: int, epoch: str, first: int, last: int, reason: str, created_ns: int) -> Row:
    gap = Gap(stream=stream, first=max(first, after + 1), last=last, reason=reason)
    body: Any = msgspec.msgpack.encode(gap)
    return Row(stream, last, "", "gap", created_ns, body, epoch)
