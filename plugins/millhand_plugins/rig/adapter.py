"""The rig in this process, without a socket: the same readings and waveforms as over Modbus, at any speed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import numpy as np
from pydantic import AwareDatetime, BaseModel, Field, field_validator

from millhand.clock import stamp
from millhand.errors import AdapterError
from millhand.hookspecs import Adapter
from millhand.records import Batch, Clock, Quality, Reading, Waveform
from millhand.validation import StrictTable
from millhand_plugins.rig.asset import Fault
from millhand_plugins.rig.operation import END_MS
from millhand_plugins.rig.registers import CHANNELS, OPEN_CIRCUIT, PROCESS, STATES
from millhand_plugins.rig.simulator import SNAPSHOT_MS, Simulator
from millhand_plugins.rig.vibration import SAMPLE_RATE_HZ


class RigOptions(StrictTable):
    seed: int = Field(default=7, ge=0)
    """Which rig of all: its traits, duty and noise."""
    fault: Fault = "bearing_outer"
    """How its life ends; `none` stays healthy."""
    speed: Literal["full"] | float = 1.0
    """full, or rig seconds a second; 1.0: a life in 35 s."""
    period_ms: int = Field(default=50, ge=10, le=SNAPSHOT_MS)
    """The rig's clock between two batches."""
    start: AwareDatetime = datetime(2026, 1, 1, tzinfo=UTC)
    """The source time of the rig's first millisecond."""

    @field_validator("speed")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise ValueError("must be 'full' or a factor above 0")
        return value


class Position(msgspec.Struct, frozen=True, array_like=True):
    """The cursor: the next step of one life."""

    seed: int
    fault: str
    period_ms: int
    step: int


class RigKind:
    name = "rig"
    options: type[BaseModel] = RigOptions

    def create(self, asset: str, options: Any) -> Adapter:
        return RigAdapter(asset, options)


class RigAdapter:
    """Plays one life. Step n happens at n * period_ms and carries `sequence` n + 1; the last one ends the source."""

    def __init__(self, asset: str, options: RigOptions) -> None:
        self._asset = asset
        self._options = options
        self._start_ns = int(options.start.timestamp() * 1000) * 1_000_000
        self._simulator: Simulator | None = None
        self._step = 0

    @property
    def steps(self) -> int:
        """How many steps a life has."""
        return END_MS // self._options.period_ms + 1

    async def open(self, cursor: bytes | None) -> None:
        """Resume behind `cursor`. Raises AdapterError if it belongs to another life."""
        options = self._options
        self._step = 0
        if cursor is not None:
            position = _position(cursor)
            if position is None or (position.seed, position.fault, position.period_ms) != (
                options.seed,
                options.fault,
                options.period_ms,
            ):
                raise AdapterError(
                    f"asset '{self._asset}': the kept place is not of the life seed = {options.seed}, "
                    f"fault = '{options.fault}', period_ms = {options.period_ms}",
                    hint="give the asset another name for another life, or set the options back",
                    retriable=False,
                )
            self._step = position.step
        self._simulator = await asyncio.to_thread(Simulator, options.seed, options.fault)

    async def batches(self) -> AsyncIterator[Batch]:
        if self._simulator is None:
            raise AdapterError(f"asset '{self._asset}': the rig is not open", hint="call open first", retriable=False)
        loop = asyncio.get_running_loop()
        first, started_s = self._step, loop.time()
        for step in range(first, self.steps):
            if self._options.speed == "full":
                await asyncio.sleep(0)
            else:
                due_s = started_s + (step - first) * self._options.period_ms / 1000 / self._options.speed
                await asyncio.sleep(max(0.0, due_s - loop.time()))
            self._step = step + 1
            yield self._batch(self._simulator, step)

    async def close(self) -> None:
        self._simulator = None

    def _batch(self, simulator: Simulator, step: int) -> Batch:
        time_ms = step * self._options.period_ms
        values = simulator.process(time_ms)
        clock = self._stamp(time_ms)
        readings = [Reading("sequence", step + 1, "1", clock)]
        for field in PROCESS:
            raw = values[field.name]
            broken = field.type == "int16" and raw == OPEN_CIRCUIT
            value = None if broken else raw * field.scale
            readings.append(Reading(field.name, value, field.unit, clock, Quality.BAD if broken else Quality.GOOD))
        counter = simulator.counter(time_ms)
        fresh = step == 0 or counter != simulator.counter(time_ms - self._options.period_ms)
        return Batch(
            tuple(readings),
            self._waveforms(simulator, counter) if fresh else (),
            cursor=msgspec.msgpack.encode(
                Position(self._options.seed, self._options.fault, self._options.period_ms, step + 1)
            ),
            state=STATES[values["state"]],
        )

    def _waveforms(self, simulator: Simulator, counter: int) -> tuple[Waveform, ...]:
        snapshot = simulator.snapshot(counter)
        valid = snapshot.g_per_count == snapshot.g_per_count
        samples = snapshot.counts * np.float32(snapshot.g_per_count if valid else 0.0)
        clock = self._stamp(snapshot.time_ms)
        quality = Quality.GOOD if valid else Quality.BAD
        return tuple(
            Waveform(name, channel.astype("<f4").tobytes(), SAMPLE_RATE_HZ, "g", clock, quality)
            for name, channel in zip(CHANNELS, samples, strict=True)
        )

    def _stamp(self, time_ms: int) -> Clock:
        return stamp(self._start_ns + time_ms * 1_000_000)


def _position(cursor: bytes) -> Position | None:
    try:
        return msgspec.msgpack.decode(cursor, type=Position)
    except msgspec.DecodeError:
        return None
