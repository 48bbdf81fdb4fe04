"""A Modbus TCP device for tests, on a real socket, that can misbehave in every way a real one does."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable

import pytest

EXCEPTION = 0x80
TABLES = {1: "coil", 2: "discrete", 3: "holding", 4: "input"}


class Device:
    """`words[table][address]` holds the values; addresses that are not there are illegal.

    Misbehaviour: `refuse[(table, address)]` = exception code for each request that covers the address; `silent`:
    requests that cover one of these get no answer; `mangle(frame)` changes each answer (None: the connection is
    reset); `before(table, address)` runs before an answer is made.
    """

    def __init__(self) -> None:
        self.words: dict[str, dict[int, int]] = {"coil": {}, "discrete": {}, "holding": {}, "input": {}}
        self.refuse: dict[tuple[str, int], int] = {}
        self.silent: set[tuple[str, int]] = set()
        self.mangle: Callable[[bytes], bytes | None] = lambda frame: frame
        self.before: Callable[[str, int], None] = lambda table, address: None
        self.requests: list[tuple[int, int, int]] = []
        self.connections = 0
        self.most_registers = 125
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()
        self.port = 0

    def put(self, address: int, value: float, code: str = "H", table: str = "input", order: str = ">") -> None:
        raw = struct.pack(f"{order}{code}", value)
        for place in range(0, len(raw), 2):
            self.words[table][address + place // 2] = int.from_bytes(raw[place : place + 2], "big")

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()
        await asyncio.gather(*self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self._tasks.add(asyncio.current_task())
        self.connections += 1
        try:
            while True:
                header = await reader.readexactly(7)
                pdu = await reader.readexactly(int.from_bytes(header[4:6], "big") - 1)
                answer = self._answer(pdu)
                if answer is None:
                    continue
                frame = header[:4] + struct.pack(">H", len(answer) + 1) + header[6:7] + answer
                mangled = self.mangle(frame)
                if mangled is None:
                    writer.transport.abort()
                    return
                writer.write(mangled)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(asyncio.current_task())
            writer.close()

    def _answer(self, pdu: bytes) -> bytes | None:
        function, address, count = struct.unpack(">BHH", pdu[:5])
        self.requests.append((function, address, count))
        table = TABLES.get(function)
        if table is None:
            return bytes([function | EXCEPTION, 1])
        self.before(table, address)
        places = [(table, place) for place in range(address, address + count)]
        if self.silent.intersection(places):
            return None
        if table in ("holding", "input") and count > self.most_registers:
            return bytes([function | EXCEPTION, 3])
        for place in places:
            if place in self.refuse:
                return bytes([function | EXCEPTION, self.refuse[place]])
            if place[1] not in self.words[table]:
                return bytes([function | EXCEPTION, 2])
        values = [self.words[table][place] for _, place in places]
        if table in ("coil", "discrete"):
            body = bytearray((count + 7) // 8)
            for index, value in enumerate(values):
                body[index // 8] |= bool(value) << index % 8
        else:
            body = b"".join(value.to_bytes(2, "big") for value in values)
        return bytes([function, len(body)]) + bytes(body)


@pytest.fixture
async def device() -> AsyncIterator[Device]:
    device = Device()
    await device.start()
    yield device
    await device.stop()
