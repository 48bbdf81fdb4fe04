"""A waveform: many requests, accepted only if the device did not change it meanwhile."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millhand.errors import AdapterError
from millhand.faults import Faults
from millhand_plugins.modbus.blocks import BlockReader, read_words
from millhand_plugins.modbus.client import ModbusReader, Refused
from millhand_plugins.modbus.options import Location, ModbusOptions, WaveformBlock
from millhand_plugins.modbus.values import Layout, Value

_TRIES = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one complete snapshot holds. `time_count`: the asset's counter when it was taken, if it tells."""

    samples: NDArray[np.float32]
    sample_rate_hz: float
    time_count: float | None


class SnapshotReader:
    """Reads one waveform block again and again."""

    def __init__(self, reader: ModbusReader, block: WaveformBlock, options: ModbusOptions, faults: Faults) -> None:
        self.block = block
        self._reader = reader
        self._faults = faults
        self._max_count = options.max_count
        named = {
            "counter": block.counter_register,
            "time": block.time_register,
            "rate": block.sample_rate_register,
            "scale": block.scale_register,
        }
        locations: dict[str, Location] = {key: place for key, place in named.items() if place is not None}
        self._header = BlockReader(reader, locations, options) if locations else None
        self._layout = Layout(
            block.type,
            word_order=block.word_order or options.word_order,
            byte_order=block.byte_order or options.byte_order,
        )
        self._counter: Value | None = None

    async def steps(self) -> AsyncGenerator[Snapshot | None, None]:
        """Read one snapshot, one request a step, so that others may read in between; yields it last, if there is one.

        Nothing comes if the counter has not moved, or if the device changed the snapshot under each of three tries.
        Raises AdapterError if a part cannot be read.
        """
        for _ in range(_TRIES):
            before = await self._read_header()
            yield None
            if "counter" in before and before["counter"] == self._counter:
                return
            rate_hz, scale = self._scales(before)
            words: list[int] = []
            for start in range(0, self.block.size, self._max_count):
                count = min(self._max_count, self.block.size - start)
                words += await read_words(self._reader, self.block.kind, self.block.address + start, count)
                yield None
            after = await self._read_header() if "counter" in before else before
            if after.get("counter") == before.get("counter"):
                self._counter = before.get("counter")
                time_count = float(before["time"]) if "time" in before else None
                yield Snapshot(self._layout.samples(words, scale), rate_hz, time_count)
                return
            self._faults.note("torn", f"waveform '{self.block.name}': the device changed it while it was read")

    async def _read_header(self) -> dict[str, Value]:
        if self._header is None:
            return {}
        found = await self._header.read()
        values: dict[str, Value] = {}
        for key, value in found.items():
            if isinstance(value, AdapterError):
                raise value
            values[key] = value
        return values

    def _scales(self, header: dict[str, Value]) -> tuple[float, float]:
        """Sample rate in Hz and scale. A snapshot whose header makes no sense is passed over: raises Refused."""
        rate_hz = float(header.get("rate", self.block.sample_rate_hz))
        scale = float(header.get("scale", self.block.scale))
        if math.isfinite(rate_hz) and rate_hz > 0 and math.isfinite(scale) and scale != 0:
            return rate_hz, scale
        self._counter = header.get("counter")
        raise Refused(
            f"{self._reader.label}: waveform '{self.block.name}': the device tells a sample rate of {rate_hz:g} Hz and"
            f" a scale of {scale:g}",
            hint="if it is so with each snapshot, check address, type and word_order of these registers",
        )
