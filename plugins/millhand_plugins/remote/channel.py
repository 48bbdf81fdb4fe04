"""Keep-alive HTTP/1.1 (RFC 9112) to one address: every wait, from the name look-up to the last byte, ends by one time.

http.client gives each read a timeout of its own, so a server that drips a byte a second outlasts any deadline; here
each wait gets what is left. Redirects are not followed, proxies are not used, sizes are bounded before memory is taken.
"""

from __future__ import annotations

import queue
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from millhand import __version__
from millhand.errors import WorkerError
from millhand_plugins.remote.options import port_of, split

HEAD_BYTES_CAP = 64 << 10
LINE_BYTES_CAP = 1 << 10
"""A chunk's size, or one line of a trailer."""
ERROR_BYTES_CAP = 64 << 10
"""So much of an answer is read that is no 200."""
READ_BYTES = 64 << 10
JOIN_BYTES = 64 << 10
"""Smaller requests are sent in one piece."""

STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5]\d\d)(?: [^\r\n]*)?")
FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?")
ONCE = ("content-length", "transfer-encoding", "content-encoding", "inference-header-content-length")
"""Header fields whose repetition would leave a body's meaning open."""


class UpstreamError(WorkerError):
    """The upstream did not answer as it must; retriable."""

    counted = True
    """Whether it speaks against the upstream's health."""


class UpstreamLate(UpstreamError):
    """The upstream had not answered when the time was over."""


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytearray


class Channel:
    """Connections to one URL, kept for the next request. Thread-safe; each thread has a connection while it asks."""

    def __init__(self, url: str, connect_timeout_ns: int, ca_file: str | None) -> None:
        """Connects to nothing yet. Raises OSError (ssl.SSLError among them) where `ca_file` cannot be used."""
        parts = split(url)
        assert parts.hostname is not None
        self._url = url
        self._host, self._port = parts.hostname, port_of(parts)
        self._base = parts.path.rstrip("/")
        self._netloc = parts.netloc
        self._connect_timeout_ns = connect_timeout_ns
        self._context = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
        self._idle: list[_Connection] = []
        self._closed = False

    def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Sequence[Any],
        *,
        end_ns: int,
        bytes_cap: int,
    ) -> Reply:
        """Send buffers and read the answer, until `end_ns` (CLOCK_MONOTONIC).

        Raises UpstreamLate at `end_ns`, UpstreamError for what cannot be reached, breaks off, is no HTTP, or is more
        than `bytes_cap` bytes.
        """
        size = sum(memoryview(part).nbytes for part in body)
        fields = {"Host": self._netloc, "User-Agent": f"millhand/{__version__}", **headers}
        if body:
            fields["Content-Length"] = str(size)
        lines = [f"{method} {self._base}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        parts = [("\r\n".join(lines) + "\r\n\r\n").encode("ascii"), *body]
        idle = self._borrow()
        if idle is not None:
            with suppress(_Stale):
                return self._exchange(idle, parts, end_ns, bytes_cap)
        return self._exchange(self._connect(end_ns), parts, end_ns, bytes_cap)

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _borrow(self) -> _Connection | None:
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None  # another thread was quicker
            if connection.usable():
                return connection
            connection.close()
        return None

    def _exchange(self, connection: _Connection, parts: Sequence[Any], end_ns: int, bytes_cap: int) -> Reply:
        keep = False
        try:
            connection.send(parts, end_ns)
            reply, keep = connection.receive(bytes_cap, end_ns)
            return reply
        except TimeoutError as error:
            raise UpstreamLate(f"upstream '{self._url}' did not answer in time", hint="is it overloaded?") from error
        except _BadReply as error:
            raise UpstreamError(
                f"upstream '{self._url}' {error}", hint="does an inference server listen there?"
            ) from error
        except (OSError, EOFError) as error:
            if connection.reused and not connection.answered:
                raise _Stale from error
            where = "in the middle of its answer" if connection.answered else "before it answered"
            raise UpstreamError(
                f"upstream '{self._url}' closed the connection {where}", hint="see the upstream's log"
            ) from error
        finally:
            if keep and not self._closed:
                connection.reused, connection.answered = True, False
                self._idle.append(connection)
            else:
                connection.close()

    def _connect(self, end_ns: int) -> _Connection:
        limit_ns = time.monotonic_ns() + self._connect_timeout_ns
        try:
            return _Connection(self._open_socket(min(limit_ns, end_ns)))
        except TimeoutError as error:
            message = f"upstream '{self._url}' cannot be reached: it did not take the connection in time"
            kind = UpstreamLate if end_ns < limit_ns else UpstreamError
            raise kind(message, hint="check its address, and the network between") from error
        except ssl.SSLError as error:
            raise UpstreamError(
                f"upstream '{self._url}' cannot be trusted: {getattr(error, 'verify_message', '') or error}",
                hint="give the plant's own certificates by ca_file",
            ) from error
        except OSError as error:
            raise UpstreamError(
                f"upstream '{self._url}' cannot be reached: {error.strerror or error}",
                hint="is it running? check its address",
            ) from error

    def _open_socket(self, end_ns: int) -> socket.socket:
        failure: OSError = TimeoutError()
        for family, kind, protocol, _, address in _resolve(self._host, self._port, end_ns):
            plain = socket.socket(family, kind, protocol)
            try:
                plain.settimeout(_left_s(end_ns))
                plain.connect(address)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._context is None:
                    return plain
                plain.settimeout(_left_s(end_ns))
                return self._context.wrap_socket(plain, server_hostname=self._host)
            except OSError as error:
                plain.close()
                failure = error
            except BaseException:
                plain.close()
                raise
        raise failure


class _Stale(Exception):
    """The other side had closed a connection while it was idle: nothing was asked, so it is asked anew."""


class _BadReply(Exception):
    """What came is no answer of HTTP/1.1, or larger than allowed."""


class _Connection:
    """One socket and what has been read from it too far."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._rest = bytearray()
        self.reused = False
        self.answered = False
        """Whether a byte of the answer has come."""

    def usable(self) -> bool:
        """Whether an idle connection is still open and silent."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        self._socket.close()

    def send(self, parts: Sequence[Any], end_ns: int) -> None:
        views = [memoryview(part).cast("B") for part in parts]
        if sum(map(len, views)) <= JOIN_BYTES:
            views = [memoryview(b"".join(views))]
        try:
            for view in views:
                rest = view
                while rest:
                    self._socket.settimeout(_left_s(end_ns))
                    rest = rest[self._socket.send(rest) :]
        except ConnectionError:
            # A server that refuses a large request may answer and close before it has read it all.
            self._fill(end_ns)

    def receive(self, bytes_cap: int, end_ns: int) -> tuple[Reply, bool]:
        """One answer, and whether the connection may serve another request."""
        status, keep, headers = 100, True, dict[str, str]()
        while status < 200:
            status, keep, headers = _parse_head(self._read_until(b"\r\n\r\n", HEAD_BYTES_CAP, end_ns))
        body, whole = self._body(status, headers, bytes_cap, end_ns)
        return Reply(status, headers, body), keep and whole and not self._rest

    def _body(self, status: int, headers: Mapping[str, str], bytes_cap: int, end_ns: int) -> tuple[bytearray, bool]:
        """The body, and whether it has been read as a whole and its end was marked."""
        if headers.get("content-encoding", "identity") != "identity":
            raise _BadReply(f"answered in content-encoding '{headers['content-encoding']}', which was not asked for")
        if status in (204, 304):
            return bytearray(), True
        if "transfer-encoding" in headers:
            if headers["transfer-encoding"].lower() != "chunked" or "content-length" in headers:
                raise _BadReply("answered with a transfer-encoding that leaves the length open")
            return self._read_chunks(bytes_cap if status == 200 else ERROR_BYTES_CAP, end_ns), True
        announced = headers.get("content-length")
        if announced is None:
            return self._read_to_end(bytes_cap if status == 200 else ERROR_BYTES_CAP, end_ns), False
        if not announced.isdecimal() or len(announced) > 18:
            raise _BadReply(f"answered with content-length '{announced[:40]}'")
        size = int(announced)
        if status != 200:
            part = min(size, ERROR_BYTES_CAP)
            return self._read_exactly(part, end_ns), part == size
        if size > bytes_cap:
            raise _BadReply(f"announces {size} bytes, the model's outputs need at most {bytes_cap}")
        return self._read_exactly(size, end_ns), True

    def _read_chunks(self, bytes_cap: int, end_ns: int) -> bytearray:
        body = bytearray()
        while True:
            line = CHUNK_LINE.fullmatch(self._read_until(b"\r\n", LINE_BYTES_CAP, end_ns)[:-2])
            if line is None:
                raise _BadReply("answered with a chunk that has no size")
            size = int(line[1], 16)
            if len(body) + size > bytes_cap:
                raise _BadReply(f"answers more than {bytes_cap} bytes")
            if size == 0:
                break
            body += self._read_exactly(size, end_ns)
            if self._read_exactly(2, end_ns) != b"\r\n":
                raise _BadReply("answered with a chunk that is longer than its size")
        for _ in range(16):  # trailers say nothing to us
            if self._read_until(b"\r\n", LINE_BYTES_CAP, end_ns) == b"\r\n":
                return body
        raise _BadReply("does not end its answer")

    def _read_to_end(self, bytes_cap: int, end_ns: int) -> bytearray:
        with suppress(EOFError):
            while len(self._rest) <= bytes_cap:
                self._fill(end_ns)
        if len(self._rest) > bytes_cap:
            raise _BadReply(f"answers more than {bytes_cap} bytes")
        body, self._rest = self._rest, bytearray()
        return body

    def _read_until(self, mark: bytes, bytes_cap: int, end_ns: int) -> bytes:
        """Up to and with `mark`."""
        searched = 0
        while (found := self._rest.find(mark, max(searched - len(mark), 0))) < 0:
            searched = len(self._rest)
            if searched > bytes_cap:
                raise _BadReply("answers what is no HTTP")
            self._fill(end_ns)
        stop = found + len(mark)
        line = bytes(self._rest[:stop])
        del self._rest[:stop]
        return line

    def _read_exactly(self, size: int, end_ns: int) -> bytearray:
        body = bytearray(size)
        filled = min(size, len(self._rest))
        body[:filled] = self._rest[:filled]
        del self._rest[:filled]
        view = memoryview(body)
        while filled < size:
            self._socket.settimeout(_left_s(end_ns))
            count = self._socket.recv_into(view[filled:])
            if count == 0:
                raise EOFError
            self.answered = True
            filled += count
        return body

    def _fill(self, end_ns: int) -> None:
        self._socket.settimeout(_left_s(end_ns))
        data = self._socket.recv(READ_BYTES)
        if not data:
            raise EOFError
        self.answered = True
        self._rest += data


def _left_s(end_ns: int) -> float:
    left_ns = end_ns - time.monotonic_ns()
    if left_ns <= 0:
        raise TimeoutError
    return left_ns / 1e9


def _parse_head(head: bytes) -> tuple[int, bool, dict[str, str]]:
    """(status, whether the connection stays open, fields)."""
    first, *lines = head[:-4].split(b"\r\n")
    status = STATUS_LINE.fullmatch(first)
    if status is None:
        raise _BadReply("answers what is no HTTP")
    headers: dict[str, str] = {}
    for line in lines:
        field = FIELD_LINE.fullmatch(line)
        if field is None:
            raise _BadReply(f"answered with a header field that is none: {line[:40]!r}")
        name, value = field[1].decode("ascii").lower(), field[2].decode("latin-1")
        if name in headers and name in ONCE:
            raise _BadReply(f"answered with '{name}' twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    options = headers.get("connection", "").lower()
    return int(status[2]), status[1] == b"1" and "close" not in options, headers


def _resolve(host: str, port: int, end_ns: int) -> Sequence[Any]:
    """The addresses of a host. Raises OSError, TimeoutError among them: a name server may hang for half a minute."""
    with suppress(socket.gaierror):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.put(error if isinstance(error, OSError) else OSError(str(error)))

    threading.Thread(target=look_up, name="look-up", daemon=True).start()
    try:
        answer = found.get(timeout=_left_s(end_ns))
    except queue.Empty as error:
        raise TimeoutError from error
    if isinstance(answer, OSError):
        raise answer
    return answer  # type: ignore[no-any-return]
