"""Accepts connections on the socket that the daemon handed over, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from millhand.serving.front_metrics import REQUESTS, SECONDS
from millhand.serving.http.connection import SCRATCH_BYTES, HttpConnection
from millhand.serving.http.head import Head
from millhand.serving.http.messages import CLIENT_LEFT, Request, Response

log = logging.getLogger("millhand.http")

SWEEP_S = 0.5
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""The others are counted as one: a client may make up any number of them."""
REFUSALS_CAP = 64
"""Connections beyond the cap that are told so, at once; more are closed without a word."""
HELD_BODIES = 4
"""Bodies of the largest size that a process holds at most while they come, or while their answers wait to be read."""
ACCEPT_PAUSE_S = 0.5
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


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
        self._refusals = 0
        self._held_bytes = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._all_closed = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept from now on."""
        self._listener.setblocking(False)
        self._listen()
        self._sweep()

    async def stop(self, grace_s: float) -> None:
        """Accept no more, answer what is under way within `grace_s`, and close; what is left then is cut off."""
        self._loop.remove_reader(self._listener)
        self.draining = True
        await asyncio.gather(*self._tasks)  # of what was accepted a moment ago
        if not self._connections:
            self._all_closed.set()
        for connection in list(self._connections):
            connection.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._all_closed.wait()
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)  # so that it happens
        if self._sweeper is not None:
            self._sweeper.cancel()

    def forget(self, connection: HttpConnection) -> None:
        """A connection is closed."""
        if connection in self._connections:
            self._connections.remove(connection)
            self._refusals -= connection.refused
        if self.draining and not self._connections:
            self._all_closed.set()

    def hold(self, nbytes: int) -> bool:
        """Count memory that a connection takes (or, below 0, gives back); False: it is too much."""
        self._held_bytes += nbytes
        return self._held_bytes <= HELD_BODIES * self.limits.body_bytes_cap

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

    def _listen(self) -> None:
        if not self.draining:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        # One at a time: the processes that share the socket share the connections too.
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:  # another process took it, or the client left already
            if error.errno in _NO_ROOM:
                log.warning("no connection can be accepted: %s", error.strerror)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(ACCEPT_PAUSE_S, self._listen)
            return
        refused = len(self._connections) - self._refusals >= self.limits.connections_cap
        if refused and self._refusals >= REFUSALS_CAP:
            accepted.close()
            return
        self._refusals += refused
        connection = HttpConnection(self, refused)
        self._connections.add(connection)
        task = self._loop.create_task(self._attach(connection, accepted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attach(self, connection: HttpConnection, accepted: socket.socket) -> None:
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError as error:
            log.warning("a connection could not be taken: %s", error)
            accepted.close()
            self.forget(connection)

    def _sweep(self) -> None:
        now_s = self.clock()
        for connection in [found for found in self._connections if found.deadline_s < now_s]:
            connection.expire()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
