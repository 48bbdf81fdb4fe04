"""A load generator for HTTP/1.1 in pure Python: prebuilt bytes on raw sockets, all latencies kept, all answers checked.

Closed loop: each connection asks again as soon as it was answered. Open loop: requests fall due at a given rate whether
or not the server keeps up, and a latency counts from that moment, so a stall is seen by all that had to wait. By hand:

    python benchmarks/load.py --url http://127.0.0.1:8080 --model cnn --shape 1,2048 --connections 8 --rate 500
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
from figures import parser, percentile
from wire import Headers, request

Check = Callable[[int, Headers, bytes], bool]
"""(index of the request, headers in lower case, body) of a 200 -> whether the answer is right."""

RECONNECT_S = 0.05
READ_BYTES = 1 << 18
BODIES_KEPT = 5
LATE_S = 1.0


@dataclass
class Result:
    """What a load saw. A request has exactly one outcome: a status, `lost` or `hung`."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    """Answers with status 200 that `check` refused."""
    lost: int = 0
    """Connections that were closed or refused in place of an answer."""
    hung: int = 0
    """No answer within the time limit."""
    late: int = 0
    """Sent more than a second after they fell due: all connections were taken."""
    latencies_ms: array[float] = field(default_factory=lambda: array("d"))
    """Of answers with status 200."""
    bodies: dict[str, list[str]] = field(default_factory=dict)
    """The beginnings of the first wrong answers, and of the first of every status but 200."""
    failures_s: list[float] = field(default_factory=list)
    """time.monotonic() of every outcome but a 200."""

    def take(self, index: int, status: int, headers: Headers, body: bytes, seconds: float, check: Check) -> None:
        """Count one answer."""
        self.statuses[status] += 1
        if status != 200:
            self.failures_s.append(time.monotonic())
            self._keep(str(status), body)
            return
        self.latencies_ms.append(seconds * 1e3)
        if not check(index, headers, body):
            self.wrong += 1
            self._keep("wrong", body)

    def fail(self, kind: str) -> None:
        """Count a request that got no answer: `lost` or `hung`."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.failures_s.append(time.monotonic())

    def _keep(self, kind: str, body: bytes) -> None:
        kept = self.bodies.setdefault(kind, [])
        if len(kept) < BODIES_KEPT:
            kept.append(body[:300].decode(errors="replace"))

    @property
    def requests(self) -> int:
        return sum(self.statuses.values()) + self.lost + self.hung

    @property
    def right(self) -> int:
        return self.statuses[200] - self.wrong

    @property
    def requests_per_s(self) -> float:
        """Right answers a second."""
        return self.right / self.seconds if self.seconds else 0.0

    def percentile_ms(self, percent: float) -> float | None:
        return percentile(list(self.latencies_ms), percent)

    def to_dict(self) -> dict[str, object]:
        spread = {f"p{name}_ms": self.percentile_ms(float(name)) for name in ("50", "90", "99", "99.9", "100")}
        return {
            "requests": self.requests,
            "requests_per_s": round(self.requests_per_s, 1),
            **{name: None if value is None else round(value, 3) for name, value in spread.items()},
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "wrong": self.wrong,
            "lost": self.lost,
            "hung": self.hung,
            "late": self.late,
            "bodies": self.bodies,
        }


class Connection:
    """One kept connection with at most one request under way."""

    __slots__ = ("buffer", "due_s", "index", "sent_s", "socket", "unsent")

    def __init__(self, address: tuple[str, int]) -> None:
        """Raises OSError where nothing listens."""
        self.socket = socket.create_connection(address, timeout=5)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.buffer = bytearray()
        self.unsent = memoryview(b"")
        self.index = 0
        self.due_s = self.sent_s = 0.0

    def send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]

    def receive(self) -> tuple[int, dict[str, str], bytes] | None:
        """One whole answer, or None so far. Raises ConnectionError where it was closed or is no HTTP/1.1."""
        data = self.socket.recv(READ_BYTES)
        if not data:
            raise ConnectionError("closed")
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "content-length" not in headers:
            raise ConnectionError(f"an answer without Content-Length: {first}")
        size = end + 4 + int(headers["content-length"])
        if len(self.buffer) < size:
            return None
        body = bytes(self.buffer[end + 4 : size])
        del self.buffer[:size]
        return int(first.split(" ", 2)[1]), headers, body


class Load:
    """Sends `requests` in turn over a number of connections."""

    def __init__(
        self,
        address: tuple[str, int],
        requests: Sequence[bytes],
        check: Check,
        connections: int,
        timeout_s: float = 10.0,
    ) -> None:
        """`timeout_s`: from sending to the answer; later is a hang, and the connection is opened anew."""
        self._address = address
        self._requests = requests
        self._check = check
        self._connections = connections
        self._timeout_s = timeout_s
        self._turn = 0

    def closed(self, seconds: float) -> Result:
        """As fast as the server answers."""
        return self._run(seconds, None)

    def open(self, seconds: float, rate: float) -> Result:
        """`rate` requests a second, evenly spaced."""
        return self._run(seconds, rate)

    def _run(self, seconds: float, rate: float | None) -> Result:
        self._result = Result()
        self._idle: deque[Connection] = deque()
        self._missing = self._connections
        self._retry_s = 0.0
        with selectors.SelectSelector() as self._selector:  # its timeout is exact to microseconds, epoll's to 1 ms
            begin = time.monotonic()
            end, sent = begin + seconds, 0
            while True:
                now = time.monotonic()
                if self._missing and now >= self._retry_s and now < end:
                    self._connect(now)
                while now < end and self._idle:
                    due = now if rate is None else begin + sent / rate
                    if due > now:
                        break
                    self._send(self._idle.popleft(), due)
                    sent += 1
                under_way = len(self._selector.get_map())
                if now >= end and not under_way:
                    break
                self._wait(now, end, None if rate is None or not self._idle else begin + sent / rate)
            self._result.seconds = min(time.monotonic(), end) - begin
            while self._idle:
                self._idle.popleft().socket.close()
        return self._result

    def _connect(self, now: float) -> None:
        while self._missing:
            try:
                self._idle.append(Connection(self._address))
            except OSError:
                self._result.fail("lost")
                self._retry_s = now + RECONNECT_S
                return
            self._missing -= 1

    def _send(self, connection: Connection, due_s: float) -> None:
        connection.index = self._turn % len(self._requests)
        self._turn += 1
        connection.due_s, connection.sent_s = due_s, time.monotonic()
        self._result.late += connection.sent_s - due_s > LATE_S
        connection.unsent = memoryview(self._requests[connection.index])
        try:
            connection.send()
        except OSError:
            self._result.fail("lost")
            self._drop(connection)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
        self._selector.register(connection.socket, events, connection)

    def _wait(self, now: float, end: float, next_due: float | None) -> None:
        until = [now + self._timeout_s / 4]
        until += [end] if now < end else []
        until += [next_due] if next_due is not None and now < end else []
        until += [self._retry_s] if self._missing and now < end else []
        for key, events in self._selector.select(max(0.0, min(until) - now)):
            connection: Connection = key.data
            try:
                if events & selectors.EVENT_WRITE:
                    connection.send()
                    if not connection.unsent:
                        self._selector.modify(connection.socket, selectors.EVENT_READ, connection)
                if events & selectors.EVENT_READ:
                    answer = connection.receive()
                    if answer is not None:
                        self._take(connection, *answer)
            except OSError:
                self._result.fail("lost")
                self._selector.unregister(connection.socket)
                self._drop(connection)
        late = time.monotonic() - self._timeout_s
        for key in list(self._selector.get_map().values()):
            if key.data.sent_s < late:
                self._result.fail("hung")
                self._selector.unregister(key.fileobj)
                self._drop(key.data)

    def _take(self, connection: Connection, status: int, headers: dict[str, str], body: bytes) -> None:
        seconds = time.monotonic() - connection.due_s
        self._result.take(connection.index, status, headers, body, seconds, self._check)
        self._selector.unregister(connection.socket)
        if headers.get("connection", "").lower() == "close":
            self._drop(connection)
        else:
            self._idle.append(connection)

    def _drop(self, connection: Connection) -> None:
        connection.socket.close()
        self._missing += 1


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--url", required=True, help="scheme, host and port of the server")
    options.add_argument("--model", required=True)
    options.add_argument("--shape", required=True, help="one row's shape, such as 1,2048; the tensor is called 'input'")
    options.add_argument("--protocol", choices=("json", "binary"), default="json")
    options.add_argument("--connections", type=int, default=8)
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--rate", type=float, help="requests a second; without it, as fast as it goes")
    chosen = options.parse_args()
    where = urlsplit(chosen.url)
    address = (where.hostname or "127.0.0.1", where.port or 80)
    shape = [int(size) for size in chosen.shape.split(",")]
    row = np.random.default_rng(1).standard_normal((1, *shape)).astype(np.float32)
    asked = request(chosen.protocol, chosen.model, row)
    load = Load(address, [asked.http1(where.netloc)], lambda *_: True, chosen.connections)
    result = load.closed(chosen.seconds) if chosen.rate is None else load.open(chosen.seconds, chosen.rate)
    print(json.dumps(result.to_dict(), indent=2))
    return 0 if result.requests == result.right else 1


if __name__ == "__main__":
    sys.exit(main())
