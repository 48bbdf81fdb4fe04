"""The load generator of benchmarks/ judges the server, so it is judged first: each outcome counts as what it was."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REQUEST = b"POST /ask HTTP/1.1\r\nHost: here\r\nContent-Length: 4\r\n\r\nping"


def answer(status: int, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} Text\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


class Scripted:
    """A server that gives its n-th request the n-th outcome, then only `right`: bytes, None to close, ... to hang."""

    def __init__(self, outcomes: list[Any]) -> None:
        self._outcomes = iter(outcomes)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.requests = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        received = b""
        with connection:
            while True:
                while len(received) < len(REQUEST):
                    data = connection.recv(4096)
                    if not data:
                        return
                    received += data
                received = received[len(REQUEST) :]
                with self._lock:
                    self.requests += 1
                    outcome = next(self._outcomes, answer(200, b"right"))
                if outcome is None:
                    return
                if outcome is ...:
                    connection.recv(4096)  # until the client gives up
                    return
                for part in (outcome[:20], outcome[20:]):
                    connection.sendall(part)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import load

    yield load


def is_right(index: int, headers: Any, body: bytes) -> bool:
    return headers["content-length"] == "5" and body == b"right"


def test_a_closed_loop_counts_each_outcome_once(load: Any) -> None:
    outcomes = [answer(200, b"wrong"), answer(503, b"later"), None, answer(504, b"late"), ..., answer(200, b"wrong")]
    server = Scripted(outcomes)
    result = load.Load(server.address, [REQUEST], is_right, 3, timeout_s=0.5).closed(1.5)
    server.close()
    assert result.statuses[503] == result.statuses[504] == result.lost == result.hung == 1
    assert result.wrong == 2
    assert result.statuses[200] == len(result.latencies_ms) == result.right + 2
    assert result.requests == server.requests
    assert len(result.failures_s) == 4
    assert result.bodies["503"] == ["later"]
    assert result.right > 100
    assert 1.4 < result.seconds < 1.6


def test_an_open_loop_keeps_its_rate_and_counts_a_stall_from_when_requests_fell_due(load: Any) -> None:
    server = Scripted([answer(200, b"right")] * 20 + [...])
    result = load.Load(server.address, [REQUEST], is_right, 1, timeout_s=0.3).open(1.5, 100)
    server.close()
    assert result.hung == 1
    assert abs(result.requests - 150) <= 5
    waited = sorted(result.latencies_ms)[-25:]  # those that fell due during the stall
    assert waited[-1] > 250
    assert waited[0] > 10
    assert result.percentile_ms(30) < 100


def test_a_server_that_is_not_there_is_lost_and_not_a_crash(load: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()[:2]
    result = load.Load(address, [REQUEST], is_right, 2).closed(0.3)
    assert result.lost >= 3
    assert result.right == result.requests_per_s == 0
