"""Offers alerts and work orders to a sink, in order, again after an error, across restarts."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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

    @property
    def epoch(self) -> str: ...

    async def sink_cursor(self, name: str) -> int: ...

    async def records_after(self, cursor: int, limit: int = 100) -> Sequence[tuple[int, Alert | WorkOrder]]: ...

    async def advance_sink(self, name: str, cursor: int) -> None: ...


@runtime_checkable
class GivesUp(Protocol):
    """A sink that passes over records which its other side refuses for good, and counts them."""

    given_up: int


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
        try:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await self._sink.close()
        except Exception as error:
            log.warning("sink %s did not close: %s", self._sink.name, error or "it took too long")

    def status(self) -> dict[str, Any]:
        return {
            "name": self._sink.name,
            "delivered": self._delivered,
            "failures": self._failures,
            "given_up": self._sink.given_up if isinstance(self._sink, GivesUp) else 0,
            "error": self._error.message if self._error else "",
            "hint": self._error.hint if self._error else "",
        }

    async def _run(self) -> None:
        delay_s = BACKOFF_FIRST_S
        while True:
            seen, delivered = self._store.changed.count, self._delivered
            try:
                if not await self._deliver_some():
                    await self._store.changed.after(seen)
                delay_s = BACKOFF_FIRST_S
                continue
            except MillhandError as error:
                self._fail(error)
            except Exception as error:
                log.exception("sink %s failed", self._sink.name)
                self._fail(
                    SinkError(
                        f"the sink failed: {type(error).__name__}: {error}", hint="report this to the plugin's author"
                    )
                )
            if self._delivered > delivered:
                delay_s = BACKOFF_FIRST_S
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, not a secret
            delay_s = min(delay_s * 2, BACKOFF_LAST_S)

    async def _deliver_some(self) -> bool:
        """Deliver what waits, up to a page of it; return whether there was any."""
        name, epoch = self._sink.name, self._store.epoch
        cursor = await self._store.sink_cursor(name)
        records = await self._store.records_after(cursor, RECORDS_AT_ONCE)
        for position, record in records:
            await self._sink.deliver(record)
            self._delivered += 1
            self._error = None
            if self._store.epoch != epoch:
                return True  # The positions are those of a file that was set aside meanwhile.
            await self._store.advance_sink(name, position)
        return bool(records)

    def _fail(self, error: MillhandError) -> None:
        self._error = error
        self._failures += 1
        log.warning("sink %s: %s", self._sink.name, error.message)
