"""Assets and metrics: their small numbers inside the file, resume points and newest values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from millhand.records import Clock, Quality, Reading
from millhand.store.database import Database
from millhand.store.rows import MetricSpec


def time_ns(clock: Clock) -> int:
    """The time that a value is filed under: the asset's own, or the node's where the asset's clock is not set."""
    return clock.source_ns if clock.synced else clock.receive_ns


class Catalog:
    """Numbers for names. The maps in memory mirror the file; load a new one after a roll-back."""

    def __init__(self, database: Database) -> None:
        self._database = database
        connection = database.connection
        self._assets: dict[str, int] = dict(connection.execute("SELECT name, id FROM asset ORDER BY id"))
        self._metrics: dict[tuple[int, str], tuple[int, str]] = {
            (asset_id, name): (metric_id, unit)
            for asset_id, name, metric_id, unit in connection.execute("SELECT asset_id, name, id, unit FROM metric")
        }

    def assets(self) -> list[str]:
        return list(self._assets)

    def find_asset(self, asset: str) -> int | None:
        return self._assets.get(asset)

    def find_metric(self, asset: str, name: str) -> int | None:
        asset_id = self._assets.get(asset)
        found = None if asset_id is None else self._metrics.get((asset_id, name))
        return None if found is None else found[0]

    def asset_id(self, asset: str) -> int:
        """The number of `asset`, made on first sight. Call inside a transaction."""
        found = self._assets.get(asset)
        if found is None:
            cursor = self._database.connection.execute("INSERT INTO asset (name) VALUES (?)", (asset,))
            found = self._assets[asset] = int(cursor.lastrowid or 0)
        return found

    def metric_id(self, asset_id: int, name: str, unit: str) -> int:
        """The number of a metric, made on first sight; a changed unit is noted. Call inside a transaction."""
        found = self._metrics.get((asset_id, name))
        if found is not None and found[1] == unit:
            return found[0]
        connection = self._database.connection
        if found is None:
            cursor = connection.execute(
                "INSERT INTO metric (asset_id, name, unit) VALUES (?, ?, ?)", (asset_id, name, unit)
            )
            number = int(cursor.lastrowid or 0)
            connection.execute("INSERT INTO newest (metric_id, value, time_ns) VALUES (?, 'null', 0)", (number,))
        else:
            number = found[0]
            connection.execute("UPDATE metric SET unit = ? WHERE id = ?", (unit, number))
        self._metrics[asset_id, name] = (number, unit)
        return number

    def save_newest(self, readings: Iterable[tuple[int, Reading]]) -> None:
        """Keep the newest GOOD value of each metric. `readings`: (metric number, reading), oldest first."""
        newest = {
            number: (number, _json(reading.value), time_ns(reading.clock))
            for number, reading in readings
            if reading.quality == Quality.GOOD
        }
        if newest:
            # One statement for all: each call into SQLite lets other threads take the interpreter.
            self._database.connection.execute(
                "REPLACE INTO newest (metric_id, value, time_ns) "
                "SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]') "
                "FROM json_each(?)",
                (msgspec.json.encode(list(newest.values())).decode(),),
            )

    def save_resume_points(self, points: Sequence[tuple[int, bytes | None, bytes]]) -> None:
        """Keep (asset number, cursor, state). A step without a cursor leaves the last one in place."""
        self._database.connection.executemany(
            "UPDATE asset SET cursor = coalesce(?2, cursor), state = ?3 WHERE id = ?1", points
        )

    def resume_point(self, asset: str) -> tuple[bytes | None, bytes | None]:
        row = self._database.connection.execute("SELECT cursor, state FROM asset WHERE name = ?", (asset,)).fetchone()
        return (None, None) if row is None else (row[0], row[1])

    def metric_specs(self) -> list[MetricSpec]:
        rows = self._database.connection.execute(
            "SELECT asset.name, metric.name, metric.unit, newest.value, newest.time_ns FROM metric "
            "JOIN asset ON asset.id = metric.asset_id JOIN newest ON newest.metric_id = metric.id ORDER BY metric.id"
        )
        return [
            MetricSpec(asset=asset, name=name, unit=unit, value=msgspec.json.decode(value), time_ns=time)
            for asset, name, unit, value, time in rows
        ]


def _json(value: Any) -> str:
    """`value` as JSON text; NaN and infinities, which JSON has no words for, as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return msgspec.json.encode(value).decode()
