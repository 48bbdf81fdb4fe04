"""Per-minute rollups: what history and charts read."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from millhand.records import Quality, Reading
from millhand.store.catalog import time_ns
from millhand.store.database import Database

MINUTE_NS = 60_000_000_000
# Sums of a minute stay finite for any number of readings below this; larger values are no measurement.
VALUE_CAP = 1e300


class Rollup(msgspec.Struct, frozen=True):
    """GOOD numeric readings of one metric in the minute that begins at `minute_ns`, by source time."""

    minute_ns: int
    low: float
    high: float
    total: float
    count: int
    last: float

    @property
    def mean(self) -> float:
        return self.total / self.count


class Rollups:
    """Folds readings into minutes as they are committed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, readings: Iterable[tuple[int, Reading]]) -> None:
        """Fold in (metric number, reading), oldest first; booleans, texts, NaN and infinities are left out."""
        cells: dict[tuple[int, int], list[float]] = {}
        for number, reading in readings:
            value = reading.value
            if reading.quality != Quality.GOOD or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            value = float(value)
            if not -VALUE_CAP < value < VALUE_CAP:
                continue
            key = (time_ns(reading.clock) // MINUTE_NS, number)
            cell = cells.get(key)
            if cell is None:
                cells[key] = [*key, value, value, value, 1, value]
                continue
            cell[2] = min(cell[2], value)
            cell[3] = max(cell[3], value)
            cell[4] += value
            cell[5] += 1
            cell[6] = value
        if cells:
            self._upsert(list(cells.values()))

    def _upsert(self, cells: list[list[float]]) -> None:
        # One statement for all: each call into SQLite lets other threads take the interpreter.
        self._database.connection.execute(
            "INSERT INTO rollup (minute, metric_id, low, high, total, readings, newest, stored_s) "
            "SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'), "
            "json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'), "
            "json_extract(value, '$[6]'), ?2 FROM json_each(?1) WHERE true "
            "ON CONFLICT (minute, metric_id) DO UPDATE SET low = min(low, excluded.low), "
            "high = max(high, excluded.high), total = total + excluded.total, "
            "readings = readings + excluded.readings, newest = excluded.newest, stored_s = excluded.stored_s",
            (msgspec.json.encode(cells).decode(), self._database.clock.now_s()),
        )

    def read(self, metric_id: int, since_ns: int, until_ns: int, limit: int) -> list[Rollup]:
        """At most `limit` minutes from `since_ns` to `until_ns`, both included, oldest first."""
        # Steps from one stored minute to the next: the key begins with the minute, shared by all metrics.
        rows = self._database.connection.execute(
            "WITH RECURSIVE step (minute) AS ("
            "  SELECT min(minute) FROM rollup WHERE minute >= ?2"
            "  UNION ALL"
            "  SELECT (SELECT min(minute) FROM rollup WHERE minute > step.minute) FROM step"
            "  WHERE step.minute IS NOT NULL AND step.minute < ?3"
            ") SELECT minute * ?5, low, high, total, readings, newest FROM step JOIN rollup USING (minute) "
            "WHERE metric_id = ?1 AND minute <= ?3 LIMIT ?4",
            (metric_id, since_ns // MINUTE_NS, until_ns // MINUTE_NS, limit, MINUTE_NS),
        )
        return [Rollup(*row) for row in rows]
