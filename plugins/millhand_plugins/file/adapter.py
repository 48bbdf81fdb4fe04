"""The adapter: rows at their pace, as batches with a cursor."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from pydantic import BaseModel

from millhand.clock import stamp
from millhand.faults import Faults
from millhand.hookspecs import Adapter
from millhand.records import Batch, Reading
from millhand_plugins.file.options import FileOptions
from millhand_plugins.file.rows import Row, RowReader

log = logging.getLogger("millhand.adapter.file")


class FileKind:
    name = "file"
    options: type[BaseModel] = FileOptions

    def create(self, asset: str, options: Any) -> Adapter:
        return FileAdapter(asset, options)


class FileAdapter:
    """Replays one file. The cursor is the place behind the last row of the batch."""

    def __init__(self, asset: str, options: FileOptions) -> None:
        self._options = options
        self._faults = Faults(log, f"asset '{asset}'")
        self._reader = RowReader(options, self._faults)

    @property
    def counts(self) -> Mapping[str, int]:
        """bad_rows, bad_cells and restarts since this adapter was made."""
        return self._faults.counts

    async def open(self, cursor: bytes | None) -> None:
        await asyncio.to_thread(self._reader.open, cursor)

    async def batches(self) -> AsyncIterator[Batch]:
        pace = _Pace(self._options.speed)
        while True:
            rows, at_end = await asyncio.to_thread(self._reader.take, self._options.batch_rows)
            waiting = deque(rows)
            while waiting:
                await pace.wait(waiting[0].parsed.time_ns)
                yield _batch(_due(waiting, pace))
            if not at_end or rows:
                continue
            if not self._options.follow:
                return
            await asyncio.sleep(self._options.poll_ms / 1000)
            await asyncio.to_thread(self._reader.refresh)

    async def close(self) -> None:
        await asyncio.to_thread(self._reader.close)


class _Pace:
    """When a row is due: its source time since the first row, divided by the speed."""

    def __init__(self, speed: float | str) -> None:
        self._speed = float("inf") if isinstance(speed, str) else speed
        self._start: tuple[float, int] | None = None

    def delay_s(self, time_ns: int) -> float:
        if self._speed == float("inf"):
            return 0.0
        now_s = asyncio.get_running_loop().time()
        if self._start is None:
            self._start = (now_s, time_ns)
        started_s, first_ns = self._start
        return started_s + (time_ns - first_ns) / 1e9 / self._speed - now_s

    async def wait(self, time_ns: int) -> None:
        await asyncio.sleep(max(0.0, self.delay_s(time_ns)))


def _due(waiting: deque[Row], pace: _Pace) -> list[Row]:
    """Take the rows that are due now and share one asset state; at least one."""
    rows = [waiting.popleft()]
    state = rows[0].parsed.state
    while waiting and waiting[0].parsed.state == state and pace.delay_s(waiting[0].parsed.time_ns) <= 0:
        rows.append(waiting.popleft())
    return rows


def _batch(rows: list[Row]) -> Batch:
    readings: list[Reading] = []
    for parsed, _ in rows:
        clock = stamp(parsed.time_ns)
        readings += [Reading(cell.name, cell.value, cell.unit, clock, cell.quality) for cell in parsed.cells]
    return Batch(tuple(readings), cursor=msgspec.msgpack.encode(rows[-1].position), state=rows[0].parsed.state)
