"""One request and its answer on a connection of HTTP/2."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from millhand.serving.grpc.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES,
    HEAD,
    HEADERS,
    WINDOW,
    WINDOW_UPDATE,
    frame,
)

if TYPE_CHECKING:
    from millhand.serving.grpc.connection import Connection


class Stream:
    """One request and its answer. Subclasses say what becomes of the request's bytes."""

    __slots__ = ("connection", "id", "outbox", "remote_ended", "room", "trailers", "uncredited", "window")

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.id = number
        self.window = connection.peer_window
        self.uncredited = 0
        """Bytes received that the peer may not send anew yet."""
        self.remote_ended = False
        self.outbox: deque[memoryview] = deque()
        self.trailers: bytes | None = None
        self.room: asyncio.Future[None] | None = None

    def on_data(self, chunk: bytes, ended: bool) -> None:
        """Bytes came; `ended` says that they are the last. The subclass calls `credit` once it can take more."""
        raise NotImplementedError

    def on_gone(self) -> None:
        """The peer reset the stream, or its connection is lost; nothing can be sent any more."""
        raise NotImplementedError

    def credit(self) -> None:
        """Let the peer send as much again as came so far."""
        if self.uncredited >= WINDOW // 2 and not self.remote_ended:
            self.connection.write(frame(WINDOW_UPDATE, 0, self.id, self.uncredited.to_bytes(4, "big")))
            self.uncredited = 0

    def answer(self, head: bytes, data: bytes, trailers: bytes) -> None:
        """Send a whole answer: header block, data, trailer block."""
        connection, size = self.connection, len(data)
        if size <= connection.window and size <= self.window and size <= FRAME_BYTES and not connection.paused:
            connection.window -= size
            number = self.id
            connection.write(
                b"".join((
                    HEAD.pack(len(head) >> 8, len(head) & 0xFF, HEADERS, END_HEADERS, number), head,
                    HEAD.pack(size >> 8, size & 0xFF, DATA, 0, number), data,
                    HEAD.pack(len(trailers) >> 8, len(trailers) & 0xFF, HEADERS, END_HEADERS | END_STREAM, number),
                    trailers,
                ))
            )  # fmt: skip
            connection.idle_frames = 0
            connection.finish(self)
        else:
            self.begin(head)
            self.send(data)
            self.end(trailers)

    def begin(self, head: bytes) -> None:
        """Send the header block."""
        self.connection.write(frame(HEADERS, END_HEADERS, self.id, head))

    def send(self, data: bytes) -> None:
        """Send data as the peer's windows allow. `drained` waits until it is on its way."""
        self.outbox.append(memoryview(data))
        self.flush()

    def end(self, trailers: bytes) -> None:
        """Send the trailer block after all data; the answer's only block where nothing was sent before it."""
        self.trailers = trailers
        self.flush()

    async def drained(self) -> None:
        """Wait until everything sent so far is on its way."""
        if self.outbox:
            self.room = asyncio.get_running_loop().create_future()
            await self.room

    def flush(self) -> None:
        connection = self.connection
        while self.outbox:
            chunk = self.outbox[0]
            size = min(len(chunk), self.window, connection.window, FRAME_BYTES)
            if connection.paused or (size <= 0 and len(chunk)):
                connection.blocked[self.id] = self
                return
            self.window -= size
            connection.window -= size
            connection.write(frame(DATA, 0, self.id, chunk[:size]))
            connection.idle_frames = 0
            if size == len(chunk):
                self.outbox.popleft()
            else:
                self.outbox[0] = chunk[size:]
        connection.blocked.pop(self.id, None)
        if self.room is not None and not self.room.done():
            self.room.set_result(None)
        if self.trailers is not None:
            connection.write(frame(HEADERS, END_HEADERS | END_STREAM, self.id, self.trailers))
            connection.finish(self)
