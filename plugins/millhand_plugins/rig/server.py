"""The rig behind a real Modbus TCP socket: read functions only, and a log of all that was served.

Wire format: "MODBUS Messaging on TCP/IP Implementation Guide V1.0b" (header) and "MODBUS Application Protocol
Specification V1.1b3" (functions 3 and 4, exceptions). The server is small and its own so that a line of the log is on
its way to the file before the answer that it counts is sent, which a general-purpose server gives no place for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import struct
import time
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import Any, cast

from millhand_plugins.rig import registers
from millhand_plugins.rig.operation import END_MS
from millhand_plugins.rig.registers import CHANNELS, PROCESS
from millhand_plugins.rig.simulator import Simulator, Snapshot
from millhand_plugins.rig.vibration import SAMPLE_RATE_HZ, SAMPLES

log = logging.getLogger("millhand.rig")

READ_HOLDING, READ_INPUT = 3, 4
ILLEGAL_FUNCTION, ILLEGAL_ADDRESS, ILLEGAL_VALUE, DEVICE_FAILURE, NO_SUCH_UNIT = 1, 2, 3, 4, 11
UNITS = frozenset({0, 1, 255})
"""1, and the two that Modbus TCP uses for the device at the socket itself."""
MOST_REGISTERS = 125


class RigLog:
    """JSON lines: a header with the ground truth, each counted answer, each snapshot when first served, an end."""

    def __init__(self, path: Path | None, truth: dict[str, Any]) -> None:
        # Unbuffered: a line that could not be written is not kept for later.
        self._file: RawIOBase | None = path.open("wb", buffering=0) if path is not None else None
        self._newest_snapshot = -1
        self.write({"kind": "header", **truth, "started_ns": time.time_ns()})

    def write(self, line: dict[str, Any]) -> None:
        """Hand one line to the operating system. Raises OSError if it does not take it."""
        if self._file is not None:
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def snapshot(self, snapshot: Snapshot) -> None:
        """Log a snapshot the first time that it is served."""
        if snapshot.counter > self._newest_snapshot:
            valid = not math.isnan(snapshot.g_per_count)
            self.write({"kind": "snapshot", "counter": snapshot.counter, "time_ms": snapshot.time_ms, "valid": valid})
            self._newest_snapshot = snapshot.counter

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class RigServer:
    """Serves one simulator. `clock_ms` gives the rig's time; every request is answered as of one moment of it."""

    def __init__(
        self,
        simulator: Simulator,
        clock_ms: Callable[[], int],
        rig_log: RigLog,
        on_request: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_request` is called before each request is answered."""
        self._simulator = simulator
        self._clock_ms = clock_ms
        self._log = rig_log
        self._on_request = on_request
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.sequence = 0

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port (a free one for port 0). Raises OSError if the address cannot be bound."""
        self._server = await asyncio.start_server(self._serve, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and end every connection; return when the last one has ended."""
        if self._server is not None:
            self._server.close()
        connections = dict(self._connections)
        for writer in connections.values():
            writer.close()
        await asyncio.gather(*connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._connections[task] = writer
        try:
            while True:
                transaction, protocol, length, unit = struct.unpack(">HHHB", await reader.readexactly(7))
                if protocol != 0 or not 2 <= length <= 254:
                    break  # no Modbus: the stream cannot be followed any further
                answer = self.answer(unit, await reader.readexactly(length - 1))
                writer.write(struct.pack(">HHHB", transaction, 0, len(answer) + 1, unit) + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client left, or the rig ends
        finally:
            del self._connections[task]
            writer.close()

    def answer(self, unit: int, request: bytes) -> bytes:
        """Answer one request (function code and data) with the same or an exception, never with a change."""
        self._on_request()
        function = request[0]
        refusal = _refusal(unit, request)
        if refusal is not None:
            return bytes((function | 0x80, refusal))
        address, count = struct.unpack(">HH", request[1:])
        try:
            words = self._read(address, count)
        except OSError as error:
            log.error("the rig's log cannot be written: %s", error)
            return bytes((function | 0x80, DEVICE_FAILURE))
        if words is None:
            return bytes((function | 0x80, ILLEGAL_ADDRESS))
        return bytes((function, 2 * count)) + words

    def _read(self, address: int, count: int) -> bytes | None:
        """The words address..address+count, or None where the map has a gap. Logs what it serves."""
        for start, length, block in (
            (registers.SEQUENCE, registers.PROCESS_LENGTH, self._process),
            (registers.COUNTER, registers.HEAD_LENGTH, self._snapshot_head),
        ):
            if start <= address and address + count <= start + length:
                return block(address)[2 * (address - start) :][: 2 * count]
        for channel, start in enumerate(CHANNELS.values()):
            if start <= address and address + count <= start + SAMPLES:
                samples = self._snapshot().counts[channel, address - start : address - start + count]
                return samples.astype(">i2").tobytes()
        return None

    def _process(self, address: int) -> bytes:
        time_ms = self._clock_ms()
        values = self._simulator.process(time_ms)
        if address == registers.SEQUENCE:
            self._log.write({"kind": "served", "sequence": self.sequence + 1, "time_ms": time_ms})
            self.sequence += 1
        words = [values[field.name] & 0xFFFF for field in PROCESS]
        return struct.pack(">II", self.sequence, time_ms) + struct.pack(f">{len(words) + 1}H", *words, values["state"])

    def _snapshot_head(self, address: int) -> bytes:
        snapshot = self._snapshot()
        self._log.snapshot(snapshot)
        head = (snapshot.counter, snapshot.time_ms, SAMPLE_RATE_HZ, snapshot.g_per_count, SAMPLES, len(CHANNELS))
        return struct.pack(">IIffHH", *head)

    def _snapshot(self) -> Snapshot:
        return self._simulator.snapshot(self._simulator.counter(self._clock_ms()))


def _refusal(unit: int, request: bytes) -> int | None:
    """The exception code for a request that is wrong whatever the map holds."""
    if unit not in UNITS:
        return NO_SUCH_UNIT
    if request[0] not in (READ_HOLDING, READ_INPUT):
        return ILLEGAL_FUNCTION
    if len(request) != 5 or not 1 <= struct.unpack(">H", request[3:])[0] <= MOST_REGISTERS:
        return ILLEGAL_VALUE
    return None


class RigClock:
    """Rig milliseconds since its start, `scale` of them a wall millisecond, standing still before and at the end of
    life."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._start: float | None = None

    def start(self) -> None:
        """Let the life begin."""
        self._start = time.monotonic()

    def __call__(self) -> int:
        if self._start is None:
            return 0
        return min(int((time.monotonic() - self._start) * 1000 * self._scale), END_MS)
