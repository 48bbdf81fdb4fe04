"""A plain SQLite file of what the store holds, for any tool that reads SQLite."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from millhand.errors import StoreError
from millhand.records import Prediction
from millhand.store.catalog import time_ns
from millhand.store.store import END_NS, Store

PAGE_ROWS = 5_000
KEYS = {
    "alerts": ("id",),
    "orders": ("id",),
    "predictions": ("asset", "model", "window_end_ns"),
    "rollups": ("asset", "name", "minute_ns"),
    "readings": None,
}


async def export(store: Store, path: Path, since_ns: int = 0, until_ns: int = END_NS) -> dict[str, int]:
    """Write alerts, orders, predictions, rollups and readings of the given time into a new file at `path`.

    One table each, a column a field, nested fields as JSON, times in Unix nanoseconds. Returns the rows a table. The
    store goes on meanwhile. Raises StoreError if `path` exists or cannot be written; nothing is left there then.
    """
    loop = asyncio.get_running_loop()
    # One thread, since SQLite connections stay with the thread that made them.
    with ThreadPoolExecutor(1, thread_name_prefix="export") as thread:
        try:
            file = await loop.run_in_executor(thread, ExportFile, path)
            try:
                async for table, rows in _tables(store, since_ns, until_ns):
                    await loop.run_in_executor(thread, file.add, table, rows)
                return await loop.run_in_executor(thread, file.finish)
            finally:
                await loop.run_in_executor(thread, file.close)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"'{path}' cannot be written: {error}", hint="check folder and disk") from error


class ExportFile:
    """The file being written, under another name until it is whole. Raises OSError, sqlite3.Error and StoreError."""

    def __init__(self, path: Path) -> None:
        # Loaded here: no other part of the daemon needs it.
        from sqlite_utils import Database

        if path.exists():
            raise StoreError(f"'{path}' exists already", hint="name a new file")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"folder '{path.parent}' does not exist")
        self._path = path
        self._partial = path.with_name(path.name + ".part")
        self._partial.unlink(missing_ok=True)
        self._database = Database(self._partial, execute_plugins=False)

    def add(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; one that is there already (by its key) is left out. New fields become new columns."""
        key = KEYS[table]
        options: dict[str, Any] = {} if key is None else {"pk": key if len(key) > 1 else key[0], "ignore": True}
        self._database.table(table).insert_all((dict(row) for row in rows), alter=True, **options)

    def finish(self) -> dict[str, int]:
        """Give the file its name and return the rows a table."""
        counts = {name: self._database.table(name).count for name in self._database.table_names()}
        self._database.close()
        self._partial.rename(self._path)
        return counts

    def close(self) -> None:
        """Drop what is not finished."""
        self._database.close()
        self._partial.unlink(missing_ok=True)


async def _tables(store: Store, since_ns: int, until_ns: int) -> AsyncIterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """(table, rows) in pages."""
    alerts = await store.alerts(limit=END_NS)
    orders = await store.orders(limit=END_NS)
    yield "alerts", [_fields(alert) for alert in alerts if since_ns <= alert.raised_ns <= until_ns]
    yield "orders", [_fields(order) for order in orders if since_ns <= order.created_ns <= until_ns]
    metrics = await store.metric_specs()
    for metric in metrics:
        rollups = await store.rollups(metric.asset, metric.name, since_ns, until_ns)
        named = {"asset": metric.asset, "name": metric.name, "unit": metric.unit}
        yield "rollups", [{**named, **_fields(rollup)} for rollup in rollups]
    for asset in await store.assets():
        async for predictions in _prediction_pages(store, asset, since_ns, until_ns):
            yield "predictions", [_fields(prediction) for prediction in predictions]
        async for readings in store.readings(asset, None, since_ns, until_ns):
            yield (
                "readings",
                [
                    {
                        "asset": asset,
                        "time_ns": time_ns(reading.clock),
                        "name": reading.name,
                        "value": reading.value,
                        "unit": reading.unit,
                        "quality": int(reading.quality),
                    }
                    for reading in readings
                ],
            )


async def _prediction_pages(store: Store, asset: str, since_ns: int, until_ns: int) -> AsyncIterator[list[Prediction]]:
    """Pages from new to old. The oldest time of a page is read again, for it may have been cut in two."""
    while True:
        page = await store.predictions(asset, None, since_ns, until_ns, PAGE_ROWS)
        yield page
        if len(page) < PAGE_ROWS or page[0].window_end_ns == until_ns:
            return
        until_ns = page[0].window_end_ns


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(record)
    return fields
