"""What the node has seen: predictions, and readings out of the rows of the bulk stream."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from millhand.records import Prediction, Reading
from millhand.store.catalog import time_ns
from millhand.store.database import Database
from millhand.store.rows import Bulk

# Index entries looked at in one go: a reader of a long time never holds up a commit for longer than some milliseconds.
SLICE_ROWS = 250

Place = tuple[int, int]
"""Where a reader of readings stands: (until_ns, seq) of the last row seen."""


class History:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add_predictions(
        self, asset_id: int, seq: int, stored_s: int, predictions: Sequence[tuple[Prediction, bytes]]
    ) -> list[Prediction]:
        """Insert (prediction, its MessagePack); return those that were new. Call inside a transaction."""
        connection = self._database.connection
        new = []
        for prediction, body in predictions:
            cursor = connection.execute(
                "INSERT OR IGNORE INTO prediction (asset_id, model, window_end_ns, seq, stored_s, body) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (asset_id, prediction.model, prediction.window_end_ns, seq, stored_s, body),
            )
            if cursor.rowcount:
                new.append(prediction)
        return new

    def predictions(
        self, asset_id: int, model: str | None, since_ns: int, until_ns: int, limit: int
    ) -> list[Prediction]:
        """The newest `limit` predictions whose window ended in the given time, oldest first."""
        rows = self._database.connection.execute(
            "SELECT body FROM prediction WHERE asset_id = ?1 AND (?2 IS NULL OR model = ?2) "
            "AND window_end_ns BETWEEN ?3 AND ?4 ORDER BY window_end_ns DESC, id DESC LIMIT ?5"
            if model is None
            else "SELECT body FROM prediction WHERE asset_id = ?1 AND model = ?2 "
            "AND window_end_ns BETWEEN ?3 AND ?4 ORDER BY window_end_ns DESC LIMIT ?5",
            (asset_id, model, since_ns, until_ns, limit),
        ).fetchall()
        return [msgspec.msgpack.decode(body, type=Prediction) for (body,) in reversed(rows)]

    def readings(
        self, asset_id: int, names: Collection[str] | None, since_ns: int, until_ns: int, place: Place | None
    ) -> tuple[list[Reading], Place | None]:
        """Readings of the next slice after `place`, and the place after it; None when there is no more."""
        connection = self._database.connection
        start = place or (since_ns, 0)
        entries = connection.execute(
            "SELECT seq, since_ns, until_ns FROM bulk WHERE asset_id = ? AND (until_ns, seq) > (?, ?) "
            "ORDER BY until_ns, seq LIMIT ?",
            (asset_id, *start, SLICE_ROWS),
        ).fetchall()
        found: list[Reading] = []
        for seq, first_ns, _ in entries:
            if first_ns > until_ns:
                continue
            (body,) = connection.execute("SELECT body FROM bulk WHERE seq = ?", (seq,)).fetchone()
            found += [
                reading
                for reading in msgspec.msgpack.decode(body, type=Bulk).readings
                if since_ns <= time_ns(reading.clock) <= until_ns and (names is None or reading.name in names)
            ]
        more = len(entries) == SLICE_ROWS
        return found, (entries[-1][2], entries[-1][0]) if more else None
