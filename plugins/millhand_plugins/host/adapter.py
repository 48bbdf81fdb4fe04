"""The adapter: all probes in rounds; one that fails or hangs costs its own readings only."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from millhand.clock import stamp
from millhand.faults import Faults
from millhand.hookspecs import Adapter
from millhand.records import Batch, Clock, Quality, Reading
from millhand_plugins.host.options import HostOptions
from millhand_plugins.host.sensors import Probe, Sample, probes

log = logging.getLogger("millhand.adapter.host")

# What a probe that hangs may hold up the others, as a share of the period.
_WAIT_SHARE = 0.5


class HostKind:
    name = "host"
    options: type[BaseModel] = HostOptions

    def create(self, asset: str, options: Any) -> Adapter:
        return HostAdapter(asset, options)


class HostAdapter:
    """Reads the node. A live source: its batches carry no cursor."""

    def __init__(self, asset: str, options: HostOptions) -> None:
        self._options = options
        self._faults = Faults(log, f"asset '{asset}'")
        self._sensors = [_Sensor(name, probe, self._faults) for name, probe in probes(options).items()]

    @property
    def counts(self) -> Mapping[str, int]:
        """failed and hung probes since this adapter was made."""
        return self._faults.counts

    async def open(self, cursor: bytes | None) -> None:
        """Read once, so that rates have a past. `cursor` plays no part. Never fails: a sensor may come later."""
        await self._round()

    async def batches(self) -> AsyncIterator[Batch]:
        loop = asyncio.get_running_loop()
        period_s = self._options.every_ms / 1000
        next_s = loop.time() + period_s
        while True:
            await asyncio.sleep(max(0.0, next_s - loop.time()))
            next_s = max(next_s + period_s, loop.time())
            readings = await self._round()
            if readings:
                yield Batch(tuple(readings))

    async def close(self) -> None:
        """Nothing is held open; a probe that hangs ends with the process."""

    async def _round(self) -> list[Reading]:
        runs = {sensor.run() for sensor in self._sensors}
        await asyncio.wait(runs, timeout=self._options.every_ms / 1000 * _WAIT_SHARE)
        clock = stamp(synced=False)
        return [reading for sensor in self._sensors for reading in sensor.readings(clock)]


class _Sensor:
    """One probe with what it has shown so far: a reading that was there once is BAD when it fails, not absent."""

    def __init__(self, name: str, probe: Probe, faults: Faults) -> None:
        self._name = name
        self._probe = probe
        self._faults = faults
        self._units: dict[str, str] = {}
        self._run: asyncio.Future[list[Sample]] | None = None

    def run(self) -> asyncio.Future[list[Sample]]:
        """Start the probe, unless it still hangs from an earlier round."""
        if self._run is None:
            self._run = _in_thread(self._probe)
        return self._run

    def readings(self, clock: Clock) -> list[Reading]:
        """What the round gave."""
        samples: dict[str, Sample] = {}
        if self._run is None or not self._run.done():
            self._faults.note("hung", f"sensor '{self._name}' does not answer")
        elif error := self._run.exception():
            self._faults.note("failed", f"sensor '{self._name}' cannot be read: {type(error).__name__}: {error}")
            self._run = None
        else:
            samples = {sample.name: sample for sample in self._run.result()}
            self._run = None
        self._units |= {sample.name: sample.unit for sample in samples.values()}
        return [_reading(name, samples.get(name), unit, clock) for name, unit in self._units.items()]


def _reading(name: str, sample: Sample | None, unit: str, clock: Clock) -> Reading:
    if sample is None or sample.value is None:
        return Reading(name, None, unit, clock, Quality.BAD)
    return Reading(name, sample.value, unit, clock)


def _in_thread(probe: Probe) -> asyncio.Future[list[Sample]]:
    """Run `probe` in a daemon thread: a dead network mount may hold it for ever, also when the agent wants to end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[Sample]] = loop.create_future()

    def settle(samples: list[Sample] | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(samples or [])

    def work() -> None:
        try:
            samples, error = probe(), None
        except Exception as caught:  # whatever psutil raises on a board that it does not know
            samples, error = None, caught
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, samples, error)

    threading.Thread(target=work, name="millhand-host", daemon=True).start()
    return future
