"""The session against servers on real sockets that lie, hang, drip, refuse, die and come back."""

from __future__ import annotations

import json
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millhand.errors import DeadlineError, InputError, ModelError, WorkerError
from millhand.testing import wait_until
from millhand_plugins.remote.backend import RemoteBackend, RemoteSession
from millhand_plugins.remote.settings import RemoteSettings

Load = Callable[..., RemoteSession]
X = {"x": np.array([[1, 2.5]], np.float32)}
TWICE, THRICE = [[2, 5]], [[3, 7.5]]


def in_ms(milliseconds: float) -> int:
    return time.monotonic_ns() + int(milliseconds * 1e6)


def states(session: RemoteSession) -> list[str]:
    return [upstream.breaker.state for upstream in session._upstreams]


# ---- what is asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
def test_an_upstream_answers_in_its_own_form(server: Any, load: Load, binary: bool) -> None:
    server.extensions = ["binary_tensor_data"] if binary else []
    session = load(server.url)
    deadline_ns = in_ms(800)
    assert session.run_until(X, deadline_ns)["y"].tolist() == TWICE
    (request,) = server.inferred
    assert request.path == "/v2/models/press/infer"
    assert request.binary is binary
    assert request.headers["host"] == f"127.0.0.1:{server.port}"
    assert 1 <= request.json["parameters"]["deadline_ms"] <= 800
    assert 1000 <= request.json["parameters"]["timeout"] <= 800_000
    assert session.counts == {
        "upstream": 1, "local": 0, "unanswered": 0, "upstream_failures": 0, "circuit_open": 0, "circuit_closed": 0
    }  # fmt: skip


def test_version_path_and_token_go_along(server: Any, load: Load, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\nnot this\n")
    server.infer = lambda _, request: server.twice(request, model_version="3")
    session = load(f"{server.url}/proxy/", lines='version = "3"\ntoken_file = "token"')
    assert session.run(X)["y"].tolist() == TWICE
    assert [request.path for request in server.got] == [
        "/proxy/v2",
        "/proxy/v2/models/press/versions/3",
        "/proxy/v2/models/press/versions/3/infer",
    ]
    assert {request.headers["authorization"] for request in server.got} == {"Bearer s3cret"}


def test_one_connection_serves_many_requests(server: Any, load: Load) -> None:
    session = load(server.url)
    for _ in range(20):
        session.run(X)
    assert server.connections == 1


def test_several_requests_run_at_once(server: Any, load: Load) -> None:
    together = threading.Barrier(4)

    def infer(_: Any, request: Any) -> bytes:
        together.wait(60)
        return server.twice(request)

    server.infer = infer
    session = load(server.url)
    assert session.concurrent
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        answers[number] = session.run_until({"x": np.full((1, 2), number, np.float32)}, in_ms(5000))["y"].tolist()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [[2 * number, 2 * number]] for number in range(4)}
    assert session.counts["upstream"] == 4


def test_a_chunked_answer_is_read(server: Any, load: Load) -> None:
    def infer(_: Any, request: Any) -> bytes:
        head, _, body = server.twice(request).partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
        chunks = (
            b"".join(b"%x;note\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:])) + b"0\r\nA: b\r\n\r\n"
        )
        return b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b""]) + chunks

    server.infer = infer
    session = load(server.url)
    assert [session.run(X)["y"].tolist() for _ in range(2)] == [TWICE, TWICE]
    assert server.connections == 1


def test_an_answer_that_ends_with_its_connection_is_read(server: Any, load: Load) -> None:
    def infer(connection: socket.socket, request: Any) -> None:
        connection.sendall(server.twice(request).replace(b"content-length", b"x-length"))

    server.infer = infer
    session = load(server.url)
    assert [session.run(X)["y"].tolist() for _ in range(2)] == [TWICE, TWICE]


def test_a_connection_that_was_closed_while_idle_costs_nothing(server: Any, load: Load) -> None:
    session = load(server.url)
    session.run(X)
    server.drop()
    assert session.run(X)["y"].tolist() == TWICE

    def closes_after(connection: socket.socket, request: Any) -> None:
        connection.sendall(server.twice(request))

    server.infer = closes_after
    assert [session.run(X)["y"].tolist() for _ in range(5)] == [TWICE] * 5
    assert session.counts["upstream_failures"] == 0


def test_wrong_tensors_are_not_sent(server: Any, load: Load) -> None:
    session = load(server.url)
    with pytest.raises(InputError, match="'x'"):
        session.run({"x": np.zeros((1, 3), np.float32)})
    assert not server.inferred


# ---- lies -----------------------------------------------------------------------------------------------------------


def close(*_: Any) -> None:
    """Close the connection."""


def body_of(server: Any, request: Any) -> bytes:
    return server.twice(request).partition(b"\r\n\r\n")[2]


def cut(server: Any, connection: socket.socket, request: Any, size: int) -> None:
    connection.sendall(server.twice(request)[:size])


LIES: dict[str, tuple[Callable[[Any, socket.socket, Any], bytes | None], str]] = {
    "another model": (lambda s, _, r: s.twice(r, model_name="pump"), "as model 'pump'"),
    "another request": (lambda s, _, r: s.twice(r, id="1"), "answered request '1'"),
    "no output": (lambda s, _, r: s.twice(r, outputs=[]), "without output 'y'|belong to no output"),
    "wrong dtype": (lambda s, _, r: s.twice(r).replace(b"FP32", b"FP64"), "as FP64"),
    "wrong shape": (lambda s, _, r: s.twice(r).replace(b"[1, 2]", b"[2, 1]"), "in shape"),
    "wrong name": (lambda s, _, r: s.twice(r).replace(b'"y"', b'"z"'), "not asked for"),
    "html": (lambda s, *_: s.http(b"<html>"), "none of the Open"),
    "empty": (lambda s, *_: s.http(b""), "none of the Open"),
    "no http": (lambda *_: b"\x16\x03\x01 hello\r\n\r\n", "no HTTP"),
    "no status": (lambda *_: b"HTTP/1.1 OK\r\n\r\n", "no HTTP"),
    "long head": (lambda *_: b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000, "no HTTP"),
    "long line": (lambda *_: b"H" * 200_000, "no HTTP"),
    "bad field": (lambda *_: b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "header field"),
    "folded field": (lambda *_: b"HTTP/1.1 200 OK\r\na: b\r\n  c\r\n\r\n", "header field"),
    "two lengths": (lambda *_: b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\ncontent-length: 2\r\n\r\nab", "twice"),
    "length is no number": (lambda s, *_: s.http(content_length="1e3"), "content-length '1e3'"),
    "negative length": (lambda s, *_: s.http(content_length="-5"), "content-length '-5'"),
    "huge length": (lambda s, *_: s.http(content_length=str(1 << 50)), "announces 1125899906842624 bytes"),
    "absurd length": (lambda s, *_: s.http(content_length="9" * 5000), "content-length '9999"),
    "much data": (lambda s, *_: s.http(b" " * 300_000, content_length=""), "|announces|more than"),
    "gzip": (lambda s, _, r: s.http(body_of(s, r), content_encoding="gzip"), "content-encoding 'gzip'"),
    "odd transfer": (lambda s, *_: s.http(transfer_encoding="gzip, chunked", content_length=""), "leaves the length"),
    "both lengths": (lambda s, *_: s.http(b"0\r\n\r\n", transfer_encoding="chunked"), "leaves the length open"),
    "bad chunk": (lambda s, *_: s.http(b"zz\r\n", transfer_encoding="chunked", content_length=""), "chunk that has no"),
    "long chunk": (
        lambda s, *_: s.http(b"2\r\nabc\r\n", transfer_encoding="chunked", content_length=""),
        "longer than",
    ),
    "huge chunk": (lambda s, *_: s.http(b"fffffff\r\n", transfer_encoding="chunked", content_length=""), "more than"),
    "redirect": (
        lambda s, *_: s.http(status="307 Moved", Location="http://elsewhere/"),
        "redirects .307. to 'http://el",
    ),
    "500": (lambda s, *_: s.http(b'{"error": "CUDA\\u001b[2J out of memory"}', status="500 X"), "500: CUDA .2J out of"),
    "401": (lambda s, *_: s.http(status="401 X"), "answered 401"),
    "404": (lambda s, *_: s.http(b'{"error": "unknown model"}', status="404 X"), "answered 404: unknown model"),
    "429": (lambda s, *_: s.http(status="429 X"), "answered 429"),
    "503": (lambda s, *_: s.http(b"\xff" * 100_000, status="503 X"), "answered 503"),
    "204": (lambda s, *_: s.http(status="204 X", content_length=""), "answered 204"),
    "closes at once": (close, "closed the connection before it answered"),
    "closes in the head": (lambda s, c, r: cut(s, c, r, 20), "closed the connection in the middle"),
    "closes in the body": (lambda s, c, r: cut(s, c, r, -3), "closed the connection in the middle"),
    "garbage behind": (lambda s, _, r: s.twice(r) + b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", ""),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_a_retriable_error_and_never_a_tensor(server: Any, load: Load, lie: str) -> None:
    answer, says = LIES[lie]
    server.infer = lambda connection, request: answer(server, connection, request)
    session = load(server.url, failures=3, retry_ms=60_000)
    for _ in range(3):
        if lie == "garbage behind":  # the answer itself is right; what follows must not answer the next request
            assert session.run_until(X, in_ms(5000))["y"].tolist() == TWICE
            continue
        with pytest.raises(WorkerError, match=says) as caught:
            session.run_until(X, in_ms(5000))
        assert caught.value.retriable
        assert server.url in caught.value.message
        assert caught.value.hint
        assert caught.value.message.isprintable()
    assert states(session) == ["closed" if lie == "garbage behind" else "open"]


@pytest.mark.parametrize("lie", [name for name in LIES if name != "garbage behind"])
def test_a_lie_is_answered_by_the_fallback(server: Any, load: Load, lie: str) -> None:
    answer, _ = LIES[lie]
    server.infer = lambda connection, request: answer(server, connection, request)
    session = load(server.url, fallback=True)
    assert session.run_until(X, in_ms(5000))["y"].tolist() == THRICE
    assert session.counts["local"] == 1
    assert session.counts["upstream_failures"] == 1


def test_random_bytes_are_no_answer(server: Any, load: Load) -> None:
    source = random.Random(7)
    heads = [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 100 X\r\n\r\n",
    ]

    def infer(connection: socket.socket, _: Any) -> None:
        connection.sendall(source.choice(heads) + source.randbytes(source.randrange(200)))

    server.infer = infer
    session = load(server.url, failures=10_000, failure_rate=1, rate_window=10_000)
    for _ in range(300):
        with pytest.raises(WorkerError):
            session.run_until(X, in_ms(5000))
    assert session.counts["upstream_failures"] == 300


def test_lies_leave_no_socket_and_no_thread(server: Any, load: Load) -> None:
    load(server.url).close()  # what the first load imports stays
    wait_until(lambda: not server.serving, "the end of the first connection")
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    session = load(server.url, failures=10_000, failure_rate=1, rate_window=10_000)
    for answer, _ in [*LIES.values()] * 5:
        server.infer = lambda connection, request, answer=answer: answer(server, connection, request)
        with suppress(WorkerError):
            session.run_until(X, in_ms(5000))
    session.close()
    wait_until(lambda: not server.serving, "the end of the connections")
    after = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    assert after == before


# ---- the request's own fault ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["400 Bad Request", "413 Too Large", "422 No"])
def test_a_request_that_the_upstream_blames_is_an_input_error(server: Any, load: Load, status: str) -> None:
    session = load(server.url, fallback=True, failures=2)
    server.infer = lambda *_: server.http(b'{"error": "x is out of range"}', status=status)
    for _ in range(5):
        with pytest.raises(InputError, match=r"answered 4\d\d: x is out of range"):
            session.run_until(X, in_ms(5000))
    assert states(session) == ["closed"]
    assert session.counts["local"] == 0


def test_a_server_that_says_400_where_the_model_has_gone_is_seen_through(server: Any, load: Load) -> None:
    session = load(server.url, fallback=True)
    server.infer = server.metadata = lambda *_: server.http(b'{"error": "unknown model"}', status="400 X")
    with pytest.raises(InputError):
        session.run_until(X, in_ms(5000))
    assert session.run_until(X, in_ms(5000))["y"].tolist() == THRICE


def test_a_large_request_that_is_refused_unread_is_an_input_error(server: Any, load: Load) -> None:
    def refuse(connection: socket.socket) -> None:
        with connection:
            connection.recv(1000)
            connection.sendall(server.http(b'{"error": "too large"}', status="413 X"))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                continue

    session = load(server.url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: refuse(listener.accept()[0]))
        thread.start()
        channel = session._upstreams[0]._channel
        channel._port = listener.getsockname()[1]
        channel.close()
        channel._closed = False
        with pytest.raises(InputError, match="413: too large"):
            session.run_until({"x": np.zeros((1_000_000, 2), np.float32)}, in_ms(5000))
        session.close()
        thread.join(30)


# ---- time -----------------------------------------------------------------------------------------------------------


def drip(connection: socket.socket, data: bytes) -> None:
    """Send a byte every 20 ms until the client has left."""
    connection.settimeout(0.02)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            if connection.recv(1) == b"":
                return
        except TimeoutError:
            continue
        except OSError:
            return


def wait_for_the_client(connection: socket.socket) -> None:
    connection.settimeout(30)
    try:
        while connection.recv(1000):
            continue
    except OSError:
        return


HANGS: dict[str, Callable[[Any, socket.socket, Any], bytes | None]] = {
    "says nothing": lambda s, c, r: wait_for_the_client(c),
    "drips its head": lambda s, c, r: drip(c, s.twice(r)[:60] + b"x" * 5000),
    "drips its body": lambda s, c, r: drip(c, s.http(b" " * 5000)),
    "drips a chunk": lambda s, c, r: drip(
        c, s.http(b"1000\r\n" + b" " * 5000, transfer_encoding="chunked", content_length="")
    ),
    "drips informational heads": lambda s, c, r: drip(c, b"HTTP/1.1 102 Processing\r\n\r\n" * 300),
    "stops in its body": lambda s, c, r: (c.sendall(s.twice(r)[:-1]), wait_for_the_client(c))[1],
}


@pytest.mark.parametrize("hang", HANGS)
def test_the_deadline_ends_a_hang(server: Any, load: Load, hang: str) -> None:
    server.infer = lambda connection, request: HANGS[hang](server, connection, request)
    session = load(server.url, failures=1, retry_ms=60_000)
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="did not answer in time") as caught:
        session.run_until(X, in_ms(300))
    assert 0.28 < time.monotonic() - started < 2
    assert server.url in caught.value.message
    assert states(session) == ["open"]


@pytest.mark.parametrize("hang", HANGS)
def test_a_hang_leaves_the_fallback_enough_time(server: Any, load: Load, hang: str) -> None:
    server.infer = lambda connection, request: HANGS[hang](server, connection, request)
    session = load(server.url, fallback=True, fallback_reserve_ms=400)
    deadline_ns = in_ms(800)
    assert session.run_until(X, deadline_ns)["y"].tolist() == THRICE
    assert time.monotonic_ns() < deadline_ns


def test_without_a_deadline_the_timeout_ends_a_hang(server: Any, load: Load) -> None:
    server.infer = lambda connection, request: wait_for_the_client(connection)
    session = load(server.url, timeout_ms=200)
    started = time.monotonic()
    with pytest.raises(WorkerError, match="did not answer in time"):
        session.run(X)
    assert 0.18 < time.monotonic() - started < 2


def test_an_upstream_that_does_not_read_is_left_in_time(server: Any, load: Load) -> None:
    session = load(server.url, timeout_ms=300)
    server.infer = close
    with socket.create_server(("127.0.0.1", 0)) as listener:
        channel = session._upstreams[0]._channel
        channel._idle.pop().close()
        channel._port = listener.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(WorkerError, match="did not answer in time"):
            session.run({"x": np.zeros((2_000_000, 2), np.float32)})
        assert time.monotonic() - started < 2


@pytest.fixture
def full_backlog() -> Iterator[str]:
    """A URL that takes no connection: its queue is full, so that the kernel drops what asks for one."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = []
        for _ in range(20):
            client = socket.socket()
            client.settimeout(0.1)
            waiting.append(client)
            try:
                client.connect(listener.getsockname())
            except TimeoutError:
                break
        else:
            pytest.skip("this kernel's queue does not fill")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for client in waiting:
            client.close()


def test_a_connection_that_is_not_taken_is_given_up(full_backlog: str, load: Load) -> None:
    started = time.monotonic()
    session = load(full_backlog, fallback=True, connect_timeout_ms=200, retry_ms=100)
    assert time.monotonic() - started < 5
    wait_until(lambda: session._upstreams[0].breaker.passable, "the next try")
    started = time.monotonic()
    assert session.run_until(X, in_ms(2000))["y"].tolist() == THRICE
    assert 0.15 < time.monotonic() - started < 1.5
    assert states(session) == ["open"]


def test_a_name_that_nobody_knows_is_said(load: Load) -> None:
    session = load("http://no-such-host.invalid:8000", hosts=("no-such-host.invalid",), timeout_ms=3000, retry_ms=1)
    with pytest.raises(WorkerError, match=r"'http://no-such-host.invalid:8000' (cannot be reached|is left alone)"):
        session.run(X)


def test_a_short_deadline_is_not_the_upstreams_fault(server: Any, load: Load) -> None:
    server.infer = lambda connection, request: wait_for_the_client(connection)
    session = load(server.url, failures=1, patience_ms=200)
    for _ in range(3):
        with pytest.raises(DeadlineError):
            session.run_until(X, in_ms(30))
    assert states(session) == ["closed"]
    with pytest.raises(DeadlineError):
        session.run_until(X, in_ms(300))
    assert states(session) == ["open"]


def test_a_deadline_that_has_passed_asks_nobody(server: Any, load: Load) -> None:
    session = load(server.url, fallback=True, failures=1)
    with pytest.raises(DeadlineError):
        session.run_until(X, in_ms(-1))
    assert not server.inferred
    assert states(session) == ["closed"]


def test_an_upstreams_own_deadline_error_counts_as_late(server: Any, load: Load) -> None:
    session = load(server.url, failures=1, patience_ms=10_000)
    server.infer = lambda *_: server.http(b'{"error": "the deadline passed"}', status="504 X")
    with pytest.raises(WorkerError, match="504: the deadline passed"):
        session.run_until(X, in_ms(5000))
    assert states(session) == ["closed"]


# ---- circuits and several upstreams ---------------------------------------------------------------------------------


def test_an_open_circuit_asks_no_more_until_its_pause_is_over(server: Any, load: Load) -> None:
    session = load(server.url, failures=2, retry_ms=150)
    server.infer = lambda *_: server.http(status="500 X")
    for _ in range(2):
        with pytest.raises(WorkerError, match="answered 500"):
            session.run(X)
    asked = len(server.got)
    with pytest.raises(WorkerError, match=r"is left alone \(circuit open\), it is tried again in 0.\d s; last: .* 500"):
        session.run(X)
    assert len(server.got) == asked
    server.infer = lambda _, request: server.twice(request)
    wait_until(lambda: session._upstreams[0].breaker.passable, "the end of the pause")
    assert session.run(X)["y"].tolist() == TWICE
    assert states(session) == ["closed"]
    assert [request.path for request in server.got[asked:-1]] == ["/v2", "/v2/models/press"], "asked what it is again"
    assert session.counts["circuit_open"] == session.counts["circuit_closed"] == 1


def test_one_request_probes_while_the_others_fall_back(server: Any, load: Load) -> None:
    session = load(server.url, fallback=True, failures=1, retry_ms=50)
    probe, go_on = threading.Event(), threading.Event()
    server.infer = lambda *_: server.http(status="500 X")
    session.run(X)

    def infer(_: Any, request: Any) -> bytes:
        probe.set()
        go_on.wait(60)
        return server.twice(request)

    server.infer = infer
    wait_until(lambda: session._upstreams[0].breaker.passable, "the end of the pause")
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(session.run_until(X, in_ms(10_000))["y"].tolist()))
    thread.start()
    assert probe.wait(60)
    assert [session.run_until(X, in_ms(5000))["y"].tolist() for _ in range(5)] == [THRICE] * 5
    go_on.set()
    thread.join()
    assert answers == [TWICE]
    assert session.run(X)["y"].tolist() == TWICE


def test_the_next_url_answers_while_the_first_is_away(server: Any, second_server: Any, load: Load) -> None:
    session = load(server.url, second_server.url, failures=2, retry_ms=60_000)
    session.run(X)
    assert (len(server.inferred), len(second_server.inferred)) == (1, 0)
    server.infer = close
    for _ in range(5):
        assert session.run_until(X, in_ms(5000))["y"].tolist() == TWICE
    assert len(server.inferred) == 4, "once well, twice badly, and once more: the first had been an idle connection"
    assert len(second_server.inferred) == 5
    assert states(session) == ["open", "closed"]


def test_a_first_url_that_hangs_leaves_time_for_the_second(server: Any, second_server: Any, load: Load) -> None:
    server.infer = lambda connection, request: wait_for_the_client(connection)
    session = load(server.url, second_server.url)
    assert session.run_until(X, in_ms(600))["y"].tolist() == TWICE


def test_all_urls_away_names_each(server: Any, second_server: Any, load: Load) -> None:
    session = load(server.url, second_server.url)
    server.infer = second_server.infer = lambda *_: server.http(status="500 X")
    with pytest.raises(WorkerError) as caught:
        session.run(X)
    assert server.url in caught.value.message
    assert second_server.url in caught.value.message


def test_it_tells_how_its_upstreams_stand(server: Any, second_server: Any, load: Load) -> None:
    session = load(server.url, second_server.url, failures=1, retry_ms=60_000)
    first, second = f"{server.url}: circuit ", f"{second_server.url}: circuit "
    session.run(X)
    assert session.health() == (
        [
            ("upstream", f"{first}closed"),
            ("upstream", f"{second}closed"),
            ("fallback", "none"),
            ("batches", "1 answered by upstreams, 0 answered by the fallback, 0 answered by none"),
        ],
        "",
        "",
    )
    server.infer = lambda *_: server.http(status="503 X")
    session.run(X)
    health = session.health()
    assert re.fullmatch(
        rf"{first}open, tried again in \d\d\.\d s; last error: upstream '{server.url}' answered 503", health.facts[0][1]
    )
    assert (health.facts[1][1], health.trouble) == (f"{second}closed", "")
    second_server.infer = server.infer
    with pytest.raises(WorkerError):
        session.run(X)
    health = session.health()
    said = [f"upstream '{one.url}' answered 503" for one in (server, second_server)]
    assert health.trouble == f"{'; '.join(said)}, and there is no fallback"
    assert health.hint == "it is overloaded, or the model is not ready there"
    assert load(server.url, fallback=True).health().facts[-2] == ("fallback", "model.onnx")


# ---- loading --------------------------------------------------------------------------------------------------------

MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": "pump"}, "calls itself model 'pump'"),
    "input name": ({"inputs": [{"name": "z", "datatype": "FP32", "shape": [-1, 2]}]}, "has no input 'x'.* z"),
    "datatype": (
        {"inputs": [{"name": "x", "datatype": "FP16", "shape": [-1, 2]}]},
        "'x' as FP16, model.toml says FP32",
    ),
    "odd datatype": ({"inputs": [{"name": "x", "datatype": "Q", "shape": [-1, 2]}]}, "'x' as Q"),
    "shape": ({"outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]}, r"output 'y' in shape \[-1, 3\]"),
    "fixed batch": ({"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2]}]}, r"in shape \[1, 2\]"),
    "rank": ({"outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}]}, r"in shape \[-1\]"),
    "further input": (
        {"inputs": [{"name": name, "datatype": "FP32", "shape": [-1, 2]} for name in ("x", "mask")]},
        "needs input 'mask'",
    ),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_an_upstream_with_another_model_is_not_loaded(server: Any, load: Load, mismatch: str) -> None:
    change, says = MISMATCHES[mismatch]
    server.described |= change
    with pytest.raises(ModelError, match=says) as caught:
        load(server.url)
    assert not caught.value.retriable
    assert not server.inferred


def test_an_upstream_that_comes_back_as_another_model_gets_no_tensor(server: Any, load: Load) -> None:
    session = load(server.url, failures=1, retry_ms=50)
    server.infer = lambda *_: server.http(status="500 X")
    with pytest.raises(WorkerError):
        session.run(X)
    asked = len(server.inferred)
    server.described["inputs"] = server.tensor("x", "FP64")
    wait_until(lambda: session._upstreams[0].breaker.passable, "the end of the pause")
    with pytest.raises(WorkerError, match="as FP64"):
        session.run(X)
    assert len(server.inferred) == asked


def test_a_free_dimension_of_the_upstream_may_be_fixed_here(server: Any, load: Load) -> None:
    server.described |= {"inputs": server.tensor("x", shape=(-1, -1)), "outputs": server.tensor("y", shape=(-1, -1))}
    assert load(server.url).run(X)["y"].tolist() == TWICE


def test_an_upstream_that_says_nothing_of_tensors_is_taken_by_its_answers(server: Any, load: Load) -> None:
    server.described = {"name": "press", "inputs": None}
    server.server = lambda *_: server.http(status="404 X")
    assert load(server.url).run(X)["y"].tolist() == TWICE
    assert not server.inferred[0].binary


@pytest.mark.parametrize("said", [b"<html>", b'{"name": 5}', b"[]", b"", b'{"name": "press", "inputs": "x"}'])
def test_metadata_that_is_none_does_not_load_where_an_upstream_is_required(
    server: Any, load: Load, said: bytes
) -> None:
    server.metadata = lambda *_: server.http(said)
    with pytest.raises(ModelError, match="metadata that is none"):
        load(server.url, require_upstream=True)
    assert states(load(server.url)) == ["open"]


def test_a_model_loads_without_its_upstream_and_comes_good(server: Any, load: Load) -> None:
    server.metadata = lambda *_: server.http(status="404 X")
    session = load(server.url, retry_ms=100)
    assert states(session) == ["open"]
    with pytest.raises(WorkerError, match=r"left alone .*404"):
        session.run(X)
    server.metadata = lambda *_: server.http(json.dumps(server.described).encode())
    wait_until(lambda: session._upstreams[0].breaker.passable, "the next try")
    assert session.run(X)["y"].tolist() == TWICE


def test_require_upstream_refuses_to_load_without(server: Any, load: Load) -> None:
    server.stop()
    with pytest.raises(ModelError, match="cannot be reached: Connection refused"):
        load(server.url, require_upstream=True)
    server.__init__()  # type: ignore[misc]


def test_without_a_declaration_the_upstreams_own_is_taken(server: Any, tmp_path: Path) -> None:
    artifact = tmp_path / "upstream.toml"
    artifact.write_text(f"urls = ['{server.url}']\nmodel = 'press'\n")
    options = RemoteSettings(hosts=("127.0.0.1",)).model_dump(mode="json")
    session = RemoteBackend(("127.0.0.1",)).load(artifact, "cpu", options)
    assert session.inputs == {"x": ("float32", (-1, 2))}
    assert session.run(X)["y"].tolist() == TWICE
    session.close()
    session = RemoteBackend(("127.0.0.1",)).load_declared(artifact, "cpu", options, {}, {})
    assert session.outputs == {"y": ("float32", (-1, 2))}
    session.close()
    server.described["outputs"] = []
    with pytest.raises(ModelError, match="does not say what"):
        RemoteBackend(("127.0.0.1",)).load(artifact, "cpu", options)
    server.metadata = lambda *_: server.http(status="500 X")
    with pytest.raises(ModelError, match="answered 500"):
        RemoteBackend(("127.0.0.1",)).load(artifact, "cpu", options)


# ---- the fallback ---------------------------------------------------------------------------------------------------


def test_a_fallback_is_loaded_when_it_is_first_needed(server: Any, load: Load) -> None:
    session = load(server.url, fallback=True, fallback_lazy=True)
    assert session.run(X)["y"].tolist() == TWICE
    assert session._local is not None
    assert session._local._loading is None
    server.infer = close
    assert session.run(X)["y"].tolist() == THRICE
    session = load(server.url, fallback=True)
    assert session._local is not None
    assert session._local._loading is not None


def test_a_fallback_that_cannot_be_loaded_is_said_at_once(server: Any, load: Load, tmp_path: Path) -> None:
    lines = "[fallback]\nbackend = 'onnxruntime'\nartifact = 'absent.onnx'"
    with pytest.raises(ModelError, match=r"absent.onnx' does not exist"):
        load(server.url, lines=lines)
    session = load(server.url, lines=lines, fallback_lazy=True)
    server.infer = close
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"closed the connection .*; .*absent.onnx' does not exist"):
            session.run(X)
    assert session.counts["unanswered"] == 2


def test_a_fallback_of_other_tensors_is_not_loaded(server: Any, load: Load) -> None:
    specs = {"x": ("float32", (-1, 2))}, {"y": ("float64", (-1, 2))}
    server.described["outputs"] = server.tensor("y", "FP64")
    with pytest.raises(ModelError, match=r"'model.onnx': output 'y' is FP32"):
        load(server.url, fallback=True, specs=specs)


def test_what_json_cannot_carry_is_answered_locally(server: Any, load: Load) -> None:
    server.extensions = []
    session = load(server.url, fallback=True, failures=1)
    answer = session.run({"x": np.array([[1, np.nan]], np.float32)})["y"]
    np.testing.assert_array_equal(answer, np.array([[3, np.nan]], np.float32))
    assert states(session) == ["closed"]
    assert not server.inferred


# ---- privacy and trust ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [(), ("plant.example",), ("127.0.0.1:1",), ("127.0.0.2",), ("27.0.0.1",)])
def test_tensors_go_nowhere_that_the_owner_has_not_listed(server: Any, load: Load, hosts: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match=rf"may not be sent to '{server.url}'") as caught:
        load(server.url, hosts=hosts)
    assert f"add '127.0.0.1:{server.port}' to hosts and restart the agent" in caught.value.hint
    assert not server.got
    assert server.connections == 0


def test_a_host_with_its_port_is_enough(server: Any, load: Load) -> None:
    assert load(server.url, hosts=(f"127.0.0.1:{server.port}",)).run(X)["y"].tolist() == TWICE


def test_a_model_cannot_list_hosts_itself(server: Any, tmp_path: Path) -> None:
    artifact = tmp_path / "upstream.toml"
    artifact.write_text(f"urls = ['{server.url}']\nmodel = 'press'\n")
    options = {**RemoteSettings().model_dump(mode="json"), "hosts": ["127.0.0.1"]}
    with pytest.raises(ModelError, match="'hosts' under"):
        RemoteBackend(()).load(artifact, "cpu", options)
    assert server.connections == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("urls = []\nmodel = 'm'", "'urls' = "),
        ("urls = ['http://a', 'http://a']\nmodel = 'm'", "each once"),
        ("urls = ['a:8000']\nmodel = 'm'", "is no URL"),
        ("urls = ['grpc://a:8000']\nmodel = 'm'", "is no URL"),
        ("urls = ['http://a:99999']\nmodel = 'm'", "(?i)port"),
        ("urls = ['http://me:pw@a']\nmodel = 'm'", "only host, port and path"),
        ("urls = ['http://a/?x=1']\nmodel = 'm'", "only host, port and path"),
        ('urls = ["http://a/x\\r\\nX: y"]\nmodel = "m"', "is no URL"),
        ("urls = ['http://a/x y']\nmodel = 'm'", "only host, port and path"),
        ("urls = ['http://a']", "model"),
        ("urls = 'http://a'\nmodel = 'm'", "urls"),
        ("urls = ['http://a']\nmodel = 'm'\ntoken = 'x'", "unknown field `token`; did you mean 'token_file'"),
        ("urls = ['http://a']\nmodel = 'm'\ntoken_file = 't'", "for everyone on the way to read"),
        ("urls = ['http://a']\nmodel = 'm'\n[fallback]\nbackend = 'remote'\nartifact = 'x'", "a fallback is local"),
        ("urls = ['http://a']\nmodel = 'm'\n[fallback]\nbackend = 'onnxruntime'", "artifact"),
        ("urls = [", "is no TOML"),
    ],
)
def test_a_wrong_file_is_refused_naming_the_key(tmp_path: Path, text: str, says: str) -> None:
    artifact = tmp_path / "upstream.toml"
    artifact.write_text(text)
    with pytest.raises(ModelError, match=says) as caught:
        RemoteBackend(("a",)).load(artifact, "cpu", RemoteSettings(hosts=("a",)).model_dump(mode="json"))
    assert "upstream.toml" in caught.value.message


@pytest.mark.parametrize(("change", "says"), [({"timeout_m": 5}, "timeout_ms"), ({"failures": 0}, "failures")])
def test_a_wrong_option_is_refused_naming_the_key(server: Any, tmp_path: Path, change: Any, says: str) -> None:
    artifact = tmp_path / "upstream.toml"
    artifact.write_text(f"urls = ['{server.url}']\nmodel = 'press'\n")
    options = {**RemoteSettings(hosts=("127.0.0.1",)).model_dump(mode="json"), **change}
    with pytest.raises(ModelError, match=says):
        RemoteBackend(("127.0.0.1",)).load(artifact, "cpu", options)


@pytest.mark.parametrize(("content", "says"), [(None, "cannot be read"), ("\n", "holds no token"), ("Ö", "ASCII")])
def test_a_token_that_cannot_be_used_is_said_and_nothing_is_asked(
    server: Any, load: Load, tmp_path: Path, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content)
    with pytest.raises(ModelError, match=says):
        load(server.url, lines='token_file = "token"', require_upstream=True)
    assert not server.got


def test_a_new_token_is_read_when_the_circuit_is_tried_again(server: Any, load: Load, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("old")
    session = load(server.url, lines='token_file = "token"\ntoken_header = "X-Key"', failures=1, retry_ms=50)

    def infer(_: Any, request: Any) -> bytes:
        good = request.headers["x-key"] == "new"
        return server.twice(request) if good else server.http(status="401 X")

    server.infer = infer
    with pytest.raises(WorkerError, match="401"):
        session.run(X)
    (tmp_path / "token").write_text("new")
    wait_until(lambda: session._upstreams[0].breaker.passable, "the end of the pause")
    assert session.run(X)["y"].tolist() == TWICE


@pytest.fixture
def secure_server(certificates: Path, server: Any) -> Iterator[Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    secure = type(server)(context)
    yield secure
    secure.stop()


def test_https_with_the_plants_own_ca(secure_server: Any, load: Load, certificates: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    session = load(secure_server.url, lines=f'ca_file = "{certificates}/ca.pem"\ntoken_file = "token"')
    assert [session.run(X)["y"].tolist() for _ in range(3)] == [TWICE] * 3
    assert secure_server.inferred[0].headers["authorization"] == "Bearer s3cret"
    assert secure_server.connections == 1
    large = np.ones((200_000, 2), np.float32)
    np.testing.assert_array_equal(session.run_until({"x": large}, in_ms(10_000))["y"], 2 * large)


def test_a_stranger_behind_https_gets_nothing(secure_server: Any, load: Load) -> None:
    with pytest.raises(ModelError, match="cannot be trusted"):
        load(secure_server.url, require_upstream=True)
    assert not secure_server.got


def test_a_certificate_of_another_name_is_refused(secure_server: Any, load: Load, certificates: Path) -> None:
    url = secure_server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(ModelError, match="cannot be trusted"):
        load(url, lines=f'ca_file = "{certificates}/ca.pem"', require_upstream=True)


def test_a_tls_upstream_that_drips_is_left_in_time(secure_server: Any, load: Load, certificates: Path) -> None:
    session = load(secure_server.url, lines=f'ca_file = "{certificates}/ca.pem"')
    secure_server.infer = lambda connection, request: (connection.sendall(b"HTTP/1.1 2"), connection.read(1))[0]
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="did not answer in time"):
        session.run_until(X, in_ms(300))
    assert time.monotonic() - started < 2


def test_a_ca_file_that_is_none_is_named(load: Load) -> None:
    with pytest.raises(ModelError, match=r"ca_file = '.*/absent.pem' cannot be used"):
        load("https://127.0.0.1:1", lines='ca_file = "absent.pem"')
