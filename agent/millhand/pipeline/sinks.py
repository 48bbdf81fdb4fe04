"""Offers alerts and work orders to a sink, in order, again after an error, across restarts."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from millhand.errors import MillhandError, SinkError

if TYPE_CHECKING:
    from millhand.hookspecs import Sink
    from millhand.records import Alert, WorkOrder
    from millhand.store.changes import Changes

log = logging.getLogger("millhand.sinks")

BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.5, 60.0
RECORDS_AT_ONCE = 50
CLOSE_DEADLINE_S = 5.0


class SinkStore(Protocol):
    """What a sink runner needs of the store."""

    changed: Changes

    async def sink_cursor(self, name: str) -> int: ...

    async def records_after(self, cursor: int, limit: int = 100) -> Sequence[tuple[int, Alert | WorkOrder]]: ...

    async def advance_sink(self, name: str, cursor: int) -> None: ...


class SinkRunner:
    """One sink's task; a record that is refused holds up this sink alone."""

    def __init__(self, sink: Sink, store: SinkStore) -> None:
        self._sink = sink
        self._store = store
        self._delivered = 0
        self._failures = 0
        self._error: MillhandError | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"sink {self._sink.name}")

    async def stop(self) -> None:
        """A delivery that is cut off is offered again at the next start."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        with suppress(TimeoutError, MillhandError):
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await self._sink.close()

    def status(self) -> dict[str, Any]:
        return {
            "name": self._sink.name,
            "delivered": self._delivered,
            "failures": self._failures,
            "error": self._error.message if self._error else "",
            "hint": self._error.hint if self._error else "",
        }

    async def _run(self) -> None:
        delay_s = BACKOFF_FIRST_S
        while True:
            seen = self._store.changed.count
            try:
                if await self._deliver_some():
                    delay_s = BACKOFF_FIRST_S
                    continue
            except MillhandError as error:
                self._fail(error)
            except Exception as error:
                log.exception("sink %s failed", self._sink.name)
                self._fail(SinkError(f"the sink failed: {type(error).__name__}: {error}"))
            else:
                self._error = None
                await self._store.changed.after(seen)
                continue
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, not a secret
            delay_s = min(delay_s * 2, BACKOFF_LAST_S)

    async def _deliver_some(self) -> bool:
        """Deliver what waits, up to a page of it; return whether there was any."""
        name = self._sink.name
        cursor = await self._store.sink_cursor(name)
        records = await self._store.records_after(cursor, RECORDS_AT_ONCE)
        for position, record in records:
            await self._sink.deliver(record)
            await self._store.advance_sink(name, position)
            self._delivered += 1
        return bool(records)

    def _fail(self, error: MillhandError) -> None:
        self._error = error
        self._failures += 1
        log.warning("sink %s: %s", self._sink.name, error.message)
