"""The one door to the wire: four read functions, and nothing that could write.

Written for pymodbus 3.10 and later (the `device_id` argument).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from millhand.errors import AdapterError

if TYPE_CHECKING:
    from pymodbus.client import AsyncModbusTcpClient

# Picks a read function of a client.
_Function = Callable[["AsyncModbusTcpClient"], Callable[..., Awaitable[Any]]]

# Modbus Application Protocol V1.1b3, section 6: the functions that read bits and registers.
READ_FUNCTIONS = {"coil": 1, "discrete": 2, "holding": 3, "input": 4}
_HEADER_BYTES = 7  # the MBAP header: transaction, protocol, length, unit

# Section 7 of the same: exception codes, with what a technician can do.
_EXCEPTIONS = {
    1: ("illegal function", "the device has no such table; try another 'kind'"),
    2: ("illegal data address", "check 'address' in the device's manual: here it counts from 0, so 30001 is input 0"),
    3: ("illegal data value", "the device takes fewer registers at once; lower 'max_count' or 'gap'"),
    4: ("device failure", "the device reports a fault of its own; look at its display or log"),
    5: ("acknowledge, still working", "raise 'poll_ms'"),
    6: ("device busy", "raise 'poll_ms', or let fewer masters read it"),
    8: ("memory parity error", "the device reports a fault of its own; look at its display or log"),
    10: ("gateway path unavailable", "check 'unit_id' and the gateway's routing"),
    11: ("gateway target failed to respond", "check 'unit_id', and that this device is powered and wired"),
}
# What a device says to a request that spans addresses it lacks, or more than it can give at once.
SPLITTABLE = (2, 3)


class Refused(AdapterError):
    """The device answered a request with a Modbus exception, or with another number of values."""

    def __init__(self, message: str, *, hint: str, exception: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.exception = exception


class NoAnswer(AdapterError):
    """A request got no answer in time, although the connection stands."""


class ModbusReader:
    """A connection to one unit. It has four methods to read, and its wire lets no other function pass."""

    def __init__(self, host: str, port: int, unit_id: int, timeout_ms: int, retries: int) -> None:
        self._host, self._port, self._unit = host, port, unit_id
        self._timeout_ms, self._retries = timeout_ms, retries
        self._client: AsyncModbusTcpClient | None = None
        self._lost: asyncio.Future[AdapterError] | None = None
        self._sent = b""

    @property
    def label(self) -> str:
        return f"modbus {self._host}:{self._port} unit {self._unit}"

    async def connect(self) -> None:
        """Raises AdapterError naming address and reason."""
        from pymodbus.client import AsyncModbusTcpClient

        noise = logging.getLogger("pymodbus")
        if noise.level == logging.NOTSET:
            noise.setLevel(logging.CRITICAL)  # what it logs as an error reaches us as an exception
        self.close()
        self._lost = asyncio.get_running_loop().create_future()
        client = AsyncModbusTcpClient(
            self._host,
            port=self._port,
            timeout=self._timeout_ms / 1000,
            retries=self._retries,
            reconnect_delay=0,  # the core reconnects
            trace_packet=self._inspect,
            trace_connect=self._connected,
        )
        self._client = client
        reason = await _connect(client)
        if reason is not None:
            self.close()
            raise AdapterError(
                f"{self.label}: cannot connect: {reason or f'no answer within {self._timeout_ms} ms'}",
                hint="check 'host' and 'port', that the device is on, and that no firewall stands between",
            )

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    async def coils(self, address: int, count: int) -> list[bool]:
        """Function 1. Raises Refused, NoAnswer, or AdapterError when the connection is gone."""
        answer = await self._read("coil", address, count, lambda client: client.read_coils)
        return cast(list[bool], answer.bits[:count])

    async def discrete(self, address: int, count: int) -> list[bool]:
        """Function 2. Raises as `coils` does."""
        answer = await self._read("discrete", address, count, lambda client: client.read_discrete_inputs)
        return cast(list[bool], answer.bits[:count])

    async def holding(self, address: int, count: int) -> list[int]:
        """Function 3. Raises as `coils` does."""
        answer = await self._read("holding", address, count, lambda client: client.read_holding_registers)
        return cast(list[int], answer.registers)

    async def input(self, address: int, count: int) -> list[int]:
        """Function 4. Raises as `coils` does."""
        answer = await self._read("input", address, count, lambda client: client.read_input_registers)
        return cast(list[int], answer.registers)

    async def _read(self, kind: str, address: int, count: int, function: _Function) -> Any:
        where = f"{self.label}: {kind} {address}" + (f" to {address + count - 1}" if count > 1 else "")
        if self._client is None or self._lost is None:
            raise AdapterError(f"{where}: not connected", hint="open the adapter first")
        if self._lost.done():
            raise self._lost.result()
        answer = asyncio.ensure_future(self._ask(function(self._client), address, count, where))
        try:
            await asyncio.wait({answer, self._lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise self._lost.result()
            return _accepted(answer.result(), kind, count, where)
        finally:
            answer.cancel()

    async def _ask(self, ask: Callable[..., Awaitable[Any]], address: int, count: int, where: str) -> Any:
        from pymodbus.exceptions import ModbusException

        try:
            return await ask(address, count=count, device_id=self._unit)
        except ModbusException as error:
            raise NoAnswer(
                f"{where}: no answer within {self._timeout_ms} ms, {self._retries + 1} times",
                hint="check 'unit_id' and the cable, or raise 'timeout_ms'",
            ) from error

    def _connected(self, connected: bool) -> None:
        if not connected:
            self._fail("the connection is gone", "check that the device is on and allows one more connection")

    def _fail(self, reason: str, hint: str) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(AdapterError(f"{self.label}: {reason}", hint=hint))

    def _inspect(self, sending: bool, packet: bytes) -> bytes:
        """See every packet before it leaves and before pymodbus reads it; b"" keeps one away from pymodbus."""
        if sending:
            if packet[_HEADER_BYTES] not in READ_FUNCTIONS.values():
                raise AdapterError(
                    f"{self.label}: function {packet[_HEADER_BYTES]} does not read and was not sent",
                    hint="this adapter never writes; report this",
                    retriable=False,
                )
            self._sent = packet
            return packet
        problem = self._problem(packet)
        if problem is not None:
            self._fail(*problem)
            return b""
        return packet

    def _problem(self, data: bytes) -> tuple[str, str] | None:
        """Look for what is no answer to the request: reason and remedy, or None. `data` may hold half a frame."""
        garbled = "check that this port speaks Modbus TCP (not RTU over TCP), and the cable"
        while len(data) >= _HEADER_BYTES + 1:
            length = int.from_bytes(data[4:6], "big")
            if data[2:4] != b"\x00\x00" or not 2 <= length <= 254:
                return f"answered with what is no Modbus TCP frame: {data[:12].hex(' ')}", garbled
            if len(data) < 6 + length:
                return None
            frame, data = data[: 6 + length], data[6 + length :]
            if frame[:2] not in (self._sent[:2], b"\x00\x00"):
                continue  # a late answer to an earlier request
            unit, function, body = frame[6], frame[7], frame[8:]
            if self._unit and unit != self._unit:
                return f"unit {unit} answered instead", f"set unit_id = {unit} if that is the device you mean"
            if function & 0x7F != self._sent[7] or not body or (function < 0x80 and body[0] != len(body) - 1):
                return f"answered with a garbled frame: {frame[:12].hex(' ')}", garbled
        return None


async def _connect(client: AsyncModbusTcpClient) -> str | None:
    """Connect; return None, or the reason why not ("" for a time-out), which pymodbus itself keeps to its log."""
    reasons: list[str] = []
    create = client.ctx.call_create

    async def remember() -> Any:
        try:
            return await create()
        except OSError as error:
            number = error.errno or 0
            named = os.strerror(number) if number > 0 else error.strerror  # a failed look-up has a number below 0
            reasons.append(named or str(error))
            raise

    client.ctx.call_create = remember
    if await client.connect():
        return None
    return reasons[0] if reasons else ""


def _accepted(response: Any, kind: str, count: int, where: str) -> Any:
    if response.isError():
        code = response.exception_code
        name, hint = _EXCEPTIONS.get(code, ("unknown exception", "see the device's manual"))
        raise Refused(f"{where}: {name} (exception {code})", hint=hint, exception=code)
    given = len(response.bits) if kind in ("coil", "discrete") else len(response.registers)
    wanted = (count + 7) // 8 * 8 if kind in ("coil", "discrete") else count
    if given != wanted:
        raise Refused(
            f"{where}: the answer holds {given} values instead of {wanted}",
            hint="the device cannot give so many at once; lower 'max_count' or 'gap'",
            exception=3,
        )
    return response
