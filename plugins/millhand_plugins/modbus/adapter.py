"""The adapter: polls registers at a fixed rate and reads snapshots in the time between."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from millhand.clock import stamp
from millhand.errors import AdapterError
from millhand.faults import Faults
from millhand.hookspecs import Adapter
from millhand.records import AssetState, Batch, Clock, Quality, Reading, Waveform
from millhand_plugins.modbus.asset_clock import AssetClock
from millhand_plugins.modbus.blocks import BlockReader
from millhand_plugins.modbus.client import ModbusReader, NoAnswer, Refused
from millhand_plugins.modbus.options import Location, ModbusOptions, Register, WaveformBlock
from millhand_plugins.modbus.snapshot import Snapshot, SnapshotReader
from millhand_plugins.modbus.values import Value

log = logging.getLogger("millhand.adapter.modbus")

_Found = Mapping[str, Value | AdapterError]


class ModbusKind:
    name = "modbus"
    options: type[BaseModel] = ModbusOptions

    def create(self, asset: str, options: Any) -> Adapter:
        return ModbusAdapter(asset, options)


class ModbusAdapter:
    """Reads one unit. A live source: its batches carry no cursor."""

    def __init__(self, asset: str, options: ModbusOptions) -> None:
        self._options = options
        self._faults = Faults(log, f"asset '{asset}'")
        self._reader = ModbusReader(options.host, options.port, options.unit_id, options.timeout_ms, options.retries)
        locations: dict[str, Location] = {f"register {item.name}": item for item in options.registers}
        if options.time_register is not None:
            locations["time"] = options.time_register
        if options.state_register is not None:
            locations["state"] = options.state_register
        self._poll = BlockReader(self._reader, locations, options)
        self._snapshots = [SnapshotReader(self._reader, block, options, self._faults) for block in options.waveforms]
        # Kept across reconnects: the asset's clock goes on while the network is away.
        self._clock = AssetClock(options.time_register) if options.time_register is not None else None
        self._last: tuple[Value | None, ...] = ()
        self._state: AssetState | None = None
        self._first: Batch | None = None

    @property
    def counts(self) -> Mapping[str, int]:
        """bad_values, refused, unanswered, torn, repeated and restarts since this adapter was made."""
        return self._faults.counts

    async def open(self, cursor: bytes | None) -> None:
        """Connect and read once, so that a wrong address or unit is an error now. `cursor` plays no part."""
        await self._reader.connect()
        self._last = ()
        self._first = await self._read_registers()

    async def batches(self) -> AsyncIterator[Batch]:
        loop = asyncio.get_running_loop()
        period_s = self._options.poll_ms / 1000
        next_poll_s = loop.time() + period_s
        if self._first is not None:
            yield self._first
        snapshots = _Turns(self._snapshots, loop)
        try:
            while True:
                now_s = loop.time()
                if now_s >= next_poll_s:
                    next_poll_s = max(next_poll_s + period_s, now_s)  # missed polls are not made up for
                    try:
                        batch = await self._read_registers()
                    except AdapterError:
                        yield self._batch({}, stamp(synced=False), AssetState.UNKNOWN)
                        raise
                    if batch is not None:
                        yield batch
                if snapshots.waiting():
                    waveform = await self._step(snapshots)
                    if waveform is not None:
                        yield Batch(waveforms=(waveform,), state=self._state)
                else:
                    await asyncio.sleep(max(0.0, min(next_poll_s, snapshots.next_s) - loop.time()))
        finally:
            await snapshots.close()

    async def close(self) -> None:
        self._reader.close()

    async def _read_registers(self) -> Batch | None:
        """One round over all registers; None if the asset's clock and every value stand where they stood before."""
        found = await self._poll.read()
        for error in {id(value): value for value in found.values() if isinstance(value, AdapterError)}.values():
            self._faults.note("unanswered" if isinstance(error, NoAnswer) else "refused", error.message)
        clock = self._stamp(found.get("time"))
        self._state = self._state_of(found.get("state"))
        seen = tuple(None if isinstance(value, AdapterError) else value for value in found.values())
        if clock.synced and seen == self._last:
            self._faults.counts["repeated"] += 1
            return None
        self._last = seen
        return self._batch(found, clock, self._state) if self._options.registers else None

    def _batch(self, found: _Found, clock: Clock, state: AssetState | None) -> Batch:
        readings = tuple(
            self._reading(register, found.get(f"register {register.name}"), clock)
            for register in self._options.registers
        )
        return Batch(readings, state=state if self._options.state_register is not None else None)

    def _reading(self, register: Register, raw: Value | AdapterError | None, clock: Clock) -> Reading:
        bad = Reading(register.name, None, register.unit, clock, Quality.BAD)
        if raw is None or isinstance(raw, AdapterError):
            return bad
        if isinstance(raw, bool | str):
            return Reading(register.name, raw, register.unit, clock)
        value = raw if register.scale == 1 and register.offset == 0 else raw * register.scale + register.offset
        if not math.isfinite(value) or not register.low <= value <= register.high:
            self._faults.note("bad_values", f"{self._reader.label}: register '{register.name}' tells {value}")
            return bad
        return Reading(register.name, value, register.unit, clock)

    def _stamp(self, count: Value | AdapterError | None) -> Clock:
        """The asset's own time where it tells it, else the time of receipt."""
        now = stamp(synced=False)
        if self._clock is None or not isinstance(count, int | float) or not math.isfinite(count):
            return now
        restarts = self._clock.restarts
        source_ns = self._clock.observe(count, now.receive_ns, now.monotonic_ns)
        if self._clock.restarts > restarts:
            self._faults.note("restarts", f"{self._reader.label}: its clock began anew")
        return Clock(source_ns, now.receive_ns, now.monotonic_ns, now.boot_id, synced=True)

    def _state_of(self, number: Value | AdapterError | None) -> AssetState | None:
        if self._options.state_register is None:
            return None
        if not isinstance(number, int | float):
            return AssetState.UNKNOWN
        return self._options.state_register.map.get(int(number), AssetState.UNKNOWN)

    async def _step(self, snapshots: _Turns) -> Waveform | None:
        """Send one more request for the snapshot whose turn it is; a part that cannot be read gives a BAD waveform."""
        block = snapshots.block
        try:
            snapshot = await snapshots.step()
        except (Refused, NoAnswer) as error:
            self._faults.note("unanswered" if isinstance(error, NoAnswer) else "refused", error.message)
            return Waveform(block.name, b"", 0.0, block.unit, stamp(synced=False), Quality.BAD)
        if snapshot is None:
            return None
        clock = stamp(synced=False)
        if self._clock is not None and self._clock.anchored and snapshot.time_count is not None:
            source_ns = self._clock.at(snapshot.time_count)
            clock = Clock(source_ns, clock.receive_ns, clock.monotonic_ns, clock.boot_id, synced=True)
        finite = bool(np.isfinite(snapshot.samples).all())
        if not finite:
            self._faults.note("bad_values", f"{self._reader.label}: waveform '{block.name}' holds NaN or infinity")
        quality = Quality.GOOD if finite else Quality.BAD
        return Waveform(block.name, snapshot.samples.tobytes(), snapshot.sample_rate_hz, block.unit, clock, quality)


class _Turns:
    """Whose turn it is: the snapshot reader that is longest due, read to its end before the next one begins."""

    def __init__(self, readers: Sequence[SnapshotReader], loop: asyncio.AbstractEventLoop) -> None:
        self._readers = readers
        self._loop = loop
        self._due_s = [loop.time()] * len(readers)
        self._index = 0
        self._steps: AsyncGenerator[Snapshot | None, None] | None = None

    @property
    def next_s(self) -> float:
        return min(self._due_s, default=math.inf)

    @property
    def block(self) -> WaveformBlock:
        return self._readers[self._index].block

    def waiting(self) -> bool:
        """Whether there is a request to send now; settles whose."""
        if self._steps is None and self.next_s <= self._loop.time():
            self._index = self._due_s.index(self.next_s)
            self._due_s[self._index] = self._loop.time() + self.block.every_ms / 1000
            self._steps = self._readers[self._index].steps()
        return self._steps is not None

    async def step(self) -> Snapshot | None:
        """Send the next request; the snapshot comes with its last one. Raises AdapterError."""
        if self._steps is None:
            return None
        try:
            return await anext(self._steps)
        except StopAsyncIteration:
            self._steps = None
            return None
        except AdapterError:
            self._steps = None
            raise

    async def close(self) -> None:
        if self._steps is not None:
            await self._steps.aclose()
