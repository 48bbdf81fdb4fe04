"""Accepts connections on the socket that the daemon handed over, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from millhand.serving.front_metrics import REQUESTS, SECONDS
from millhand.serving.http.connection import SCRATCH_BYTES, HttpConnection
from millhand.serving.http.messages import CLIENT_LEFT, Head, Request, Response

log = logging.getLogger("millhand.http")

SWEEP_S = 0.5
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""The others are counted as one: a client may make up any number of them."""
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: 88\r\n"
    b"connection: close\r\n\r\n"
    b'{"error":"too many connections (come again later, or raise [http] connections_cap)     "}'
)


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may ask for."""

    body_bytes_cap: int
    connections_cap: int
    keep_alive_s: float
    request_timeout_s: float


Handler = Callable[[Request, Callable[[Response], None]], "Callable[[], None] | None"]


class HttpServer:
    """One process's connections."""

    def __init__(self, listener: socket.socket, handle: Handler, limits: HttpLimits) -> None:
        """`handle(request, reply)` answers, now or later; it may return what calls a later answer off."""
        self.handle = handle
        self.limits = limits
        self.scratch_bytes = bytearray(SCRATCH_BYTES)
        self.scratch = memoryview(self.scratch_bytes)
        self.heads: dict[bytes, Head] = {}
        self.draining = False
        self.observe: Callable[[Request, Response], None] | None = None
        """Called with every request and its answer, after it was written."""
        self._loop = asyncio.get_running_loop()
        self.clock = self._loop.time
        self._listener = listener
        self._connections: set[HttpConnection] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._all_closed = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept from now on."""
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)
        self._sweep()

    async def stop(self, grace_s: float) -> None:
        """Accept no more, answer what is under way within `grace_s`, and close."""
        self._loop.remove_reader(self._listener)
        self.draining = True
        if not self._connections:
            self._all_closed.set()
        for connection in list(self._connections):
            connection.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._all_closed.wait()
        if self._sweeper is not None:
            self._sweeper.cancel()

    def forget(self, connection: HttpConnection) -> None:
        """A connection is closed."""
        self._connections.discard(connection)
        if self.draining and not self._connections:
            self._all_closed.set()

    def count(self, request: Request | None, response: Response) -> None:
        """A response was written; None: to something that was no request."""
        if request is None:
            REQUESTS.inc(method="other", path="other", status=response.status)
            return
        method = request.head.method if request.head.method in METHODS else "other"
        REQUESTS.merge((method, request.route, str(response.status)), 1)
        SECONDS.observe_in((request.route,), (time.monotonic_ns() - request.started_ns) / 1e9)
        if self.observe is not None:
            self.observe(request, response)

    def count_left(self, request: Request) -> None:
        """The client left before its answer."""
        self.count(request, Response(status=CLIENT_LEFT))

    def _accept(self) -> None:
        # One at a time: the processes that share the socket share the connections too.
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return  # another process took it, the client left already, or no descriptor is free
        if len(self._connections) >= self.limits.connections_cap:
            accepted.setblocking(False)
            with accepted:
                try:
                    accepted.send(REFUSAL)
                except OSError:
                    return
            return
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = HttpConnection(self)
        self._connections.add(connection)
        task = self._loop.create_task(self._attach(connection, accepted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attach(self, connection: HttpConnection, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError as error:
            log.warning("a connection could not be taken: %s", error)
            accepted.close()
            self.forget(connection)

    def _sweep(self) -> None:
        now_s = self.clock()
        for connection in [c for c in self._connections if c.deadline_s < now_s]:
            connection.expire()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
