"""Keeps one asset running: opens its adapter, feeds its pipeline, backs off after errors, stops cleanly."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import msgspec

from millhand.errors import AdapterError, ConfigError, MillhandError
from millhand.hookspecs import Adapter, CountsFaults
from millhand.pipeline.asset import AssetPipeline
from millhand.records import Batch

log = logging.getLogger("millhand.pipeline")

BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.2, 30.0
UNSEEN_AFTER_S = 60.0
"""A machine that speaks for so long has shown all that it brings."""
STOP_GRACE_S = 1.0
"""At a stop, a batch that is on its way is waited for so long."""
STOP_DEADLINE_S = 8.0
"""A step that cannot end (a full disk, a model that does not answer) is cut off after so long; it was not committed."""
CLOSE_DEADLINE_S = 5.0

Alive = Callable[[str, bool], None]
Result = TypeVar("Result")


def _ignore(_: str, __: bool) -> None:
    """Nobody wants to know."""


class AssetRunner:
    """One asset's task. `status()["state"]`: starting, running, silent, failing, ended or stopped."""

    def __init__(self, adapter: Adapter, pipeline: AssetPipeline, *, on_alive: Alive | None = None) -> None:
        """`on_alive(asset, alive)` is called when the asset begins to speak or falls silent (DBIRTH, DDEATH)."""
        self.asset = pipeline.asset
        self.pipeline = pipeline
        self._adapter = adapter
        self._on_alive = on_alive or _ignore
        self._state = "starting"
        self._alive: bool | None = None
        self._error: MillhandError | None = None
        self._restarts = 0
        self._first_batch_s: float | None = None
        self._last_batch_s: float | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin; errors of the asset show in `status`, never here."""
        self._task = asyncio.create_task(self._run(), name=f"asset {self.asset}")

    async def stop(self) -> None:
        """Finish the step in hand, then close the adapter."""
        self._stopping.set()
        if self._task is None:
            return
        _, late = await asyncio.wait({self._task}, timeout=STOP_DEADLINE_S)
        if late:
            log.error("asset %s: its step in hand did not end; it is cut off, uncommitted", self.asset)
            self._task.cancel()
            await asyncio.wait({self._task})
            self._state = "stopped"

    @property
    def alive(self) -> bool:
        """Whether the asset speaks now."""
        return self._alive is True

    def status(self) -> dict[str, Any]:
        """What CLI, page and metrics show."""
        error = self._error or self.pipeline.last_error or self._unjudged()
        latencies = sorted(latency.latency_ms for latency in self.pipeline.latencies)
        return {
            "asset": self.asset,
            "state": self._state,
            "last_batch_age_s": None if self._last_batch_s is None else time.monotonic() - self._last_batch_s,
            "restarts": self._restarts,
            "error": error.message if error else "",
            "hint": error.hint if error else "",
            "counters": msgspec.to_builtins(self.pipeline.counters),
            "adapter_counts": dict(self._adapter.counts) if isinstance(self._adapter, CountsFaults) else {},
            "windows": self.pipeline.window_counters(),
            "latency_ms": {f"p{rank}": _rank(latencies, rank) for rank in (50, 99)},
        }

    def _unjudged(self) -> MillhandError | None:
        """An asset that speaks, but never of what a model needs, is a mistake in its options."""
        unseen = self.pipeline.unseen()
        if not unseen or self._first_batch_s is None or time.monotonic() - self._first_batch_s < UNSEEN_AFTER_S:
            return None
        model, names = next(iter(unseen.items()))
        return ConfigError(
            f"model '{model}' judges nothing: the asset never brought {', '.join(names)}",
            hint="add them, under these names, to the asset's options",
        )

    # ---- the task ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        delay_s = BACKOFF_FIRST_S
        while not self._stopping.is_set():
            batches_before = self.pipeline.counters.batches
            try:
                await self._read()
                break
            except MillhandError as error:
                self._fail(error)
            except Exception as error:
                log.exception("asset %s failed", self.asset)
                message = f"reading the asset failed: {type(error).__name__}: {error}"
                self._fail(AdapterError(message, hint="report this to the author of the adapter's plugin"))
            if self.pipeline.counters.batches > batches_before:
                delay_s = BACKOFF_FIRST_S
            if self._error is not None and not self._error.retriable:
                delay_s = BACKOFF_LAST_S
            await self._pause(delay_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, not a secret
            delay_s = min(delay_s * 2, BACKOFF_LAST_S)
        self._state = "stopped" if self._stopping.is_set() else "ended"
        if self._alive:
            self._tell_alive(False)

    async def _read(self) -> None:
        """Open, take every batch, close. Returns at the end of the source or when told to stop."""
        cursor = await self.pipeline.restore()
        try:
            async with self._stop_watch() as stop:
                await self._wait(self._adapter.open(cursor), stop)
                await self._take_batches(self._adapter.batches(), stop)
        except _StopError:
            log.debug("asset %s: told to stop while nothing came", self.asset)
        finally:
            try:
                async with asyncio.timeout(CLOSE_DEADLINE_S):
                    await self._adapter.close()
            except Exception as error:
                log.warning("asset %s: its adapter did not close: %s", self.asset, error or "it took too long")

    async def _take_batches(self, batches: AsyncIterator[Batch], stop: asyncio.Task[bool]) -> None:
        try:
            while not self._stopping.is_set():
                batch = await self._wait(anext(batches, None), stop)
                if batch is None:
                    log.info("asset %s: its source has ended", self.asset)
                    return
                await self._step(batch)
        finally:
            close = getattr(batches, "aclose", None)
            if close is not None:
                with suppress(Exception):
                    async with asyncio.timeout(CLOSE_DEADLINE_S):
                        await close()

    @asynccontextmanager
    async def _stop_watch(self) -> AsyncIterator[asyncio.Task[bool]]:
        """A task that ends when the runner is told to stop."""
        stop = asyncio.create_task(self._stopping.wait())
        try:
            yield stop
        finally:
            stop.cancel()

    async def _wait(self, work: Awaitable[Result], stop: asyncio.Task[bool]) -> Result:
        """Wait for the adapter; say so where it is silent. Raises _StopError soon after a stop where nothing came.

        The work gets a task of its own: an adapter that cancels itself or exits must not take the runner with it.
        """
        task = asyncio.ensure_future(_contained(work))
        try:
            while not task.done():
                done, _ = await asyncio.wait(
                    {task, stop}, timeout=self.pipeline.settings.silence_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    self._fall_silent()
                elif task not in done:
                    done, _ = await asyncio.wait({task}, timeout=STOP_GRACE_S)
                    if not done:
                        raise _StopError
            if task.cancelled():
                raise AdapterError("the adapter cancelled itself", hint="report this to the author of its plugin")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=CLOSE_DEADLINE_S)

    async def _step(self, batch: Batch) -> None:
        await self.pipeline.step(batch)
        self._last_batch_s = time.monotonic()
        if self._first_batch_s is None:
            self._first_batch_s = self._last_batch_s
        self._error = None
        self._state = "running"
        self._tell_alive(True)

    # ---- what it says -----------------------------------------------------------------------------------------------

    def _fail(self, error: MillhandError) -> None:
        self._state = "failing"
        self._error = error
        self._restarts += 1
        self._tell_alive(False)
        log.error("asset %s: %s", self.asset, error.message)

    def _fall_silent(self) -> None:
        self._state = "silent"
        self._error = AdapterError(
            f"no batch came for {self.pipeline.settings.silence_s:g} s",
            hint="is the machine switched off? see the adapter's address and cables",
        )
        self._tell_alive(False)

    def _tell_alive(self, alive: bool) -> None:
        if self._alive is not alive:
            self._alive = alive
            try:
                self._on_alive(self.asset, alive)
            except Exception:
                log.exception("asset %s: nobody could be told that it is %s", self.asset, "alive" if alive else "dead")

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


class _StopError(Exception):
    """The runner was told to stop, and nothing was on its way."""


async def _contained(work: Awaitable[Result]) -> Result:
    """Make an ordinary error of what would end the whole agent (`sys.exit` in an adapter)."""
    try:
        return await work
    except SystemExit as error:
        raise AdapterError(
            f"the adapter tried to end the agent: {error!r}", hint="report this to the author of its plugin"
        ) from error


def _rank(ranked: list[float], percent: int) -> float | None:
    if not ranked:
        return None
    return round(ranked[min(len(ranked) * percent // 100, len(ranked) - 1)], 3)
