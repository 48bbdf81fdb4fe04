"""The gRPC server: methods, limits, and every connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from millhand.errors import InputError, MillhandError, suggestion
from millhand.serving.grpc.connection import Connection
from millhand.serving.grpc.hpack import Fields
from millhand.serving.grpc.rpc import UNKNOWN, WINDOW_BITS, Call, Head, Method
from millhand.serving.grpc.status import Code, Refusal
from millhand.serving.inference import DEADLINE_MS_CAP
from millhand.serving.observation import Observation
from millhand.serving.tracing import Tracer

CHECK_S = 1.0
TIMEOUT_NS_CAP = int(DEADLINE_MS_CAP * 1e6)
TIMEOUT_UNITS_NS = {"H": 3_600 * 10**9, "M": 60 * 10**9, "S": 10**9, "m": 10**6, "u": 10**3, "n": 1}


class Server:
    """Serves methods to any number of connections. The owner listens, and calls `new_connection` for each."""

    def __init__(
        self,
        methods: Iterable[Method],
        *,
        message_bytes_cap: int,
        connections_cap: int,
        streams_cap: int,
        keepalive_s: float,
        observation: Observation | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.message_bytes_cap = message_bytes_cap
        self.connections_cap = connections_cap
        self.streams_cap = streams_cap
        self.keepalive_s = keepalive_s
        self.held_bytes = 0
        self.observation = observation or Observation(Tracer(), None)
        self._methods = {method.path: method for method in methods}

    def new_connection(self) -> Connection:
        """The protocol for an accepted connection."""
        return Connection(self)

    def begin(self, connection: Connection, number: int, head: Head) -> Call:
        """A new call."""
        return Call(self, connection, number, head)

    async def watch(self) -> None:
        """End what is late and what is dead, for ever."""
        while True:
            await asyncio.sleep(CHECK_S)
            now_s, now_ns = self.loop.time(), time.monotonic_ns()
            for connection in list(self.connections):
                for stream in list(connection.streams.values()):
                    assert isinstance(stream, Call)
                    stream.check(now_ns)
                connection.check(now_s)

    async def drain(self, grace_s: float) -> None:
        """Let the calls under way finish within `grace_s`, then end them as UNAVAILABLE and close everything."""
        for connection in list(self.connections):
            connection.drain()
        end_s = self.loop.time() + grace_s
        while self.connections and self.loop.time() < end_s:  # noqa: ASYNC110 (they end one by one; this runs once)
            await asyncio.sleep(0.02)
        error = Refusal(Code.UNAVAILABLE, "the server stops", hint="send the request again")
        for connection in list(self.connections):
            for stream in list(connection.streams.values()):
                assert isinstance(stream, Call)
                stream.fail(error)
            connection.close()

    def parse(self, fields: Fields) -> Head:
        """What a header block asks for; what is wrong with it becomes the head's `refusal`."""
        texts = {name.decode("latin-1"): value.decode("latin-1") for name, value in fields}
        try:
            return self._parse(texts)
        except MillhandError as error:
            return Head(self._methods.get(texts.get(":path", ""), UNKNOWN), texts, refusal=error)

    def _parse(self, texts: dict[str, str]) -> Head:
        path = texts.get(":path", "")
        if texts.get(":method") != "POST" or not texts.get("content-type", "").startswith("application/grpc"):
            raise InputError(
                f"{texts.get(':method', '')} of '{texts.get('content-type', '')}' is no gRPC call",
                hint="send POST with content-type application/grpc",
            )
        method = self._methods.get(path)
        if method is None:
            raise Refusal(
                Code.UNIMPLEMENTED,
                f"'{path}' is not served{suggestion(path, self._methods)}",
                hint="look at docs/serving.md",
            )
        encoding = texts.get("grpc-encoding", "identity")
        if encoding != "identity" and encoding not in WINDOW_BITS:
            raise Refusal(
                Code.UNIMPLEMENTED,
                f"grpc-encoding '{encoding}' is not known",
                hint=f"use identity, {', '.join(WINDOW_BITS)}",
            )
        return Head(method, texts, _timeout_ns(texts.get("grpc-timeout", "")), encoding)


def _timeout_ns(text: str) -> int:
    if not text:
        return 0
    digits, unit = text[:-1], text[-1]
    if not digits.isascii() or not digits.isdigit() or len(digits) > 8 or unit not in TIMEOUT_UNITS_NS:
        raise InputError(f"grpc-timeout '{text}' is not valid", hint="send up to 8 digits and one of H, M, S, m, u, n")
    return min(max(int(digits) * TIMEOUT_UNITS_NS[unit], 1), TIMEOUT_NS_CAP)
