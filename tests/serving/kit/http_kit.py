"""An HttpServer with a small handler on an event loop in a thread of its own, and blocking clients to speak to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from millhand.serving.http.connection import HttpConnection
from millhand.serving.http.messages import BINARY, Request, Response, json_response
from millhand.serving.http.server import HttpLimits, HttpServer
from millhand.testing import wait_until

TIMEOUT_S = 10.0


class Answer:
    """One response as a client reads it. Header names are lower-case."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def text(self) -> str:
        return self.body.decode()


class Client:
    """A blocking connection; reads answers one after the other."""

    def __init__(self, port: int, receive_bytes: int = 0) -> None:
        """`receive_bytes`: the size of the kernel's buffer, for a client that is slow to read."""
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(TIMEOUT_S)
        try:
            self.socket.connect(("127.0.0.1", port))
        except OSError:
            self.socket.close()
            raise
        self._read = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, data: bytes, method: str = "GET") -> Answer:
        self.send(data)
        return self.answer(method)

    def answer(self, method: str = "GET") -> Answer:
        """The next answer to a request with this method; EOFError where the connection ends before it is complete."""
        while True:
            head = self._until(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            status = int(first.split(" ", 2)[1])
            if status != 100:
                break
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        size = 0 if method == "HEAD" else int(headers["content-length"])
        return Answer(status, headers, self._take(size))

    def line(self) -> bytes:
        """What comes up to the next blank line."""
        return self._until(b"\r\n\r\n")

    def ended(self) -> bool:
        """Whether the server has closed, and nothing is left to read. Waits for it."""
        return not self._read and self._receive() == b""

    def _until(self, end: bytes) -> bytes:
        while end not in self._read:
            self._more()
        found, _, self._read = self._read.partition(end)
        return found

    def _take(self, size: int) -> bytes:
        while len(self._read) < size:
            self._more()
        found, self._read = self._read[:size], self._read[size:]
        return found

    def _more(self) -> None:
        data = self._receive()
        if not data:
            raise EOFError(self._read)
        self._read += data

    def _receive(self) -> bytes:
        return self.socket.recv(1 << 16)


class LocalServer:
    """GET|POST /echo: the body; /size?<n>: n bytes; /later: when the test says so. Everything else is a 404."""

    def __init__(self, new_loop: Callable[[], asyncio.AbstractEventLoop], **limits: Any) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        """(method, path, body) of every request."""
        self.waiting: list[tuple[Request, Callable[[Response], None]]] = []
        self.left: list[Request] = []
        """Those of /later whose client left."""
        self._loop = new_loop()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        base = {"body_bytes_cap": 1 << 20, "connections_cap": 64, "keep_alive_s": 30.0, "request_timeout_s": 10.0}
        self.server: HttpServer = self.run(lambda: self._start(HttpLimits(**{**base, **limits})))

    def _start(self, limits: HttpLimits) -> HttpServer:
        server = HttpServer(self._listener, self._handle, limits)
        server.start()
        return server

    def _handle(self, request: Request, reply: Callable[[Response], None]) -> Callable[[], None] | None:
        path = request.head.path
        self.seen.append((request.head.method, path, bytes(request.body)))
        if path == "/echo":
            reply(Response(bytes(request.body), 200, BINARY))
        elif path == "/size":
            reply(Response(b"x" * int(request.head.query), 200, BINARY))
        elif path == "/later":
            self.waiting.append((request, reply))
            return lambda: self.left.append(request)
        else:
            reply(json_response({"error": "not here"}, 404))
        return None

    def run(self, call: Callable[[], Any]) -> Any:
        """Call something on the event loop's thread."""

        async def called() -> Any:
            return call()

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result(TIMEOUT_S)

    def connect(self, **options: Any) -> Client:
        return Client(self.port, **options)

    def reply(self, body: bytes = b"done") -> None:
        """Answer the oldest request of /later."""
        _, reply = self.waiting.pop(0)
        self.run(lambda: reply(Response(body, 200, BINARY)))

    def connection(self) -> HttpConnection:
        """The server's end of the only connection."""
        return wait_until(lambda: self.run(self._connection), "a connection")

    def _connection(self) -> HttpConnection | None:
        connections = [found for found in self.server._connections if found._transport is not None]
        assert len(self.server._connections) <= 1
        return connections[0] if connections else None

    def feed(self, parts: Sequence[bytes]) -> None:
        """Hand bytes to the only connection in exactly these pieces."""
        connection = self.connection()

        def feed() -> None:
            for part in parts:
                view = memoryview(part)
                while view:
                    buffer = connection.get_buffer(-1)
                    size = min(len(buffer), len(view))
                    buffer[:size] = view[:size]
                    connection.buffer_updated(size)
                    view = view[size:]

        self.run(feed)

    def drain(self, grace_s: float) -> None:
        """Stop the server in order; returns once it has."""
        asyncio.run_coroutine_threadsafe(self.server.stop(grace_s), self._loop).result(TIMEOUT_S)

    def begin_drain(self, grace_s: float) -> Any:
        """The same; returns the future of its end."""
        return asyncio.run_coroutine_threadsafe(self.server.stop(grace_s), self._loop)

    def close(self) -> None:
        if not self.server.draining:
            self.drain(0.5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()
        self._listener.close()


@contextlib.contextmanager
def local_server(new_loop: Callable[[], asyncio.AbstractEventLoop], **limits: Any) -> Iterator[LocalServer]:
    server = LocalServer(new_loop, **limits)
    try:
        yield server
    finally:
        server.close()


def request(target: str = "/echo", body: bytes = b"", method: str = "POST", headers: Sequence[str] = ()) -> bytes:
    """A request with a content-length."""
    lines = [f"{method} {target} HTTP/1.1", "Host: here", *headers]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(chunks: Sequence[bytes], extension: bytes = b"", trailers: bytes = b"", target: str = "/echo") -> bytes:
    """A request in chunks."""
    head = f"POST {target} HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    body = b"".join([b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks if chunk])
    return head + body + b"0%b\r\n%b\r\n" % (extension, trailers)
