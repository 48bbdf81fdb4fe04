"""HTTP/1.1 as the front speaks it: over real sockets, on both event loops, in pieces of every size."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import resource
import socket
import struct
import zlib

import pytest
import uvloop
from http_kit import chunked, local_server, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millhand.serving.front_metrics import REQUESTS
from millhand.serving.http import server as http_server
from millhand.serving.http.connection import HEAD_BYTES_CAP, KEPT_HEADS_CAP, SCRATCH_BYTES, WAITING_BYTES_CAP
from millhand.serving.http.head import HEADERS_CAP
from millhand.testing import wait_until

SWEEP_S = 0.02


@pytest.fixture(params=["uvloop", "asyncio"])
def serve(request, monkeypatch):
    """Start a LocalServer with these limits."""
    monkeypatch.setattr(http_server, "SWEEP_S", SWEEP_S)
    new_loop = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with contextlib.ExitStack() as stack:
        yield lambda **limits: stack.enter_context(local_server(new_loop, **limits))


@pytest.fixture
def server(serve):
    return serve()


def counted(status, path="other", method="other"):
    return REQUESTS._values.get((method, path, str(status)), 0)


# ---- framing --------------------------------------------------------------------------------------------------------

MESSAGES = {
    "a request without a body": (request(method="GET"), [b""]),
    "a body with a length": (request(body=b"0123456789"), [b"0123456789"]),
    "chunks": (chunked([b"01234", b"567890123456789abcdef"]), [b"01234567890123456789abcdef"]),
    "chunks with extensions and trailers": (
        chunked([b"01234", b"56"], b' ;a="b";c', b"A: 1\r\nB: 2\r\n"),
        [b"0123456"],
    ),
    "several in a row": (
        request(body=b"one") + chunked([b"t", b"wo"]) + b"\r\n" + request(method="GET") + request(body=b"four"),
        [b"one", b"two", b"", b"four"],
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_bytes_may_be_cut_anywhere(server, name):
    sent, bodies = MESSAGES[name]
    cuts = [[sent[:cut], sent[cut:]] for cut in range(1, len(sent))]
    with server.connect() as client:
        for parts in [*cuts, [bytes([byte]) for byte in sent]]:
            server.feed(parts)
            assert [client.answer().body for _ in bodies] == bodies, parts
    assert [body for *_, body in server.seen] == bodies * len(sent)


@st.composite
def streams(draw):
    """(bytes of some requests, the bodies that they must be answered with, places to cut)."""
    sent, bodies = b"", []
    for body in draw(st.lists(st.binary(max_size=600), min_size=1, max_size=6)):
        kind = draw(st.sampled_from(["length", "chunks", "gzip"]))
        if kind == "chunks":
            places = sorted(draw(st.lists(st.integers(0, len(body)), max_size=4)))
            pieces = [body[start:end] for start, end in zip([0, *places], [*places, len(body)], strict=True)]
            sent += chunked(pieces, draw(st.sampled_from([b"", b";x", b";x=1"])))
        elif kind == "gzip":
            sent += request(body=gzip.compress(body), headers=["Content-Encoding: gzip"])
        else:
            sent += request(body=body)
        bodies.append(body)
    cuts = sorted(draw(st.sets(st.integers(1, len(sent) - 1), max_size=12)))
    return sent, bodies, [sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(streams())
def test_any_requests_in_any_pieces_are_answered_in_order(server, stream):
    sent, bodies, parts = stream
    wait_until(lambda: not server.server._connections, "the end of the last connection")
    with server.connect() as client:
        server.feed(parts)
        assert [client.answer().body for _ in bodies] == bodies
    with server.connect() as client:  # and as one packet over the wire
        client.send(sent)
        assert [client.answer().body for _ in bodies] == bodies


def test_a_large_body_is_received_in_its_own_memory(server):
    body = os.urandom(SCRATCH_BYTES * 3 + 17)
    with server.connect() as client:
        for _ in range(2):
            assert client.ask(request(body=body)).body == body
    wait_until(lambda: not server.server._connections, "the end of the connection")
    assert server.server._held_bytes == 0


def test_requests_wait_while_one_is_answered(server):
    with server.connect() as client:
        client.send(request("/later") + request(body=b"next"))
        wait_until(lambda: server.waiting, "the request")
        assert len(server.seen) == 1
        server.reply(b"first")
        assert [client.answer().body, client.answer().body] == [b"first", b"next"]


def test_what_waits_behind_a_request_is_bounded(server):
    flood = request(body=b"x" * 1000)
    with server.connect() as client:
        client.send(request("/later"))
        wait_until(lambda: server.waiting, "the request")
        client.socket.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += client.socket.send(flood * 100)
        connection = server.connection()
        wait_until(lambda: connection._paused, "back-pressure")
        assert len(connection._waiting) <= WAITING_BYTES_CAP + SCRATCH_BYTES
        client.socket.settimeout(10)
        server.reply()
        assert client.answer().body == b"done"
        for _ in range(sent // len(flood)):
            assert client.answer().body == b"x" * 1000


def test_expect_100_continue(server):
    head, body = request(body=b"ping", headers=["Expect: 100-continue"])[:-4], b"ping"
    for _ in range(2):  # the second time its head is known
        with server.connect() as client:
            client.send(head)
            assert client.line() == b"HTTP/1.1 100 Continue"
            assert client.ask(body).body == body
    with server.connect() as client:  # one that does not wait is not told
        client.send(head + body)
        assert client.line().startswith(b"HTTP/1.1 200")
    with server.connect() as client:  # HTTP/1.0 does not know it
        client.send(head.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert client.ask(body).status == 200
    with server.connect() as client:  # nor is a body asked for that is too large
        too_large = f"Content-Length: {2 << 20}".encode()
        answer = client.ask(head.replace(b"Content-Length: 4", too_large))
        assert answer.status == 413


def test_head_gets_the_head_alone(server):
    with server.connect() as client:
        answer = client.ask(request("/size?1000", method="HEAD"), "HEAD")
        assert answer.headers["content-length"] == "1000"
        assert client.ask(request(body=b"next")).body == b"next"


@pytest.mark.parametrize(
    "sent",
    [
        request(method="GET", headers=["Connection: close"]),
        request(method="GET").replace(b"HTTP/1.1", b"HTTP/1.0"),
        request(method="GET", headers=["Connection: keep-alive"]).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
def test_a_connection_ends_where_the_client_does_not_keep_it(server, sent):
    with server.connect() as client:
        answer = client.ask(sent)
        assert answer.status == 200 and answer.headers["connection"] == "close"
        assert client.ended()


def test_targets(server):
    with server.connect() as client:
        for target in ("http://here:80/echo", "/%65cho", "/echo?a=b"):
            assert client.ask(request(target, b"x")).body == b"x"
        assert client.ask(request("/gr%C3%B6%C3%9Fer", b"x")).status == 404
        assert [path for _, path, _ in server.seen] == ["/echo", "/echo", "/echo", "/größer"]
        assert client.ask(request("/%FF")).status == 400


def test_heads_are_kept_within_bounds(server):
    with server.connect() as client:
        for number in range(KEPT_HEADS_CAP + 50):
            assert client.ask(request(body=b"x", headers=[f"X-Number: {number}"])).body == b"x"
        assert 0 < len(server.server.heads) <= KEPT_HEADS_CAP
        kept = len(server.server.heads)
        assert client.ask(request(body=b"x", headers=["X-Long: " + "y" * 2000])).body == b"x"
        assert len(server.server.heads) == kept


# ---- what is no request ---------------------------------------------------------------------------------------------

HOST = b"\r\nHost: here\r\n"
BAD = {
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "no HTTP/1.1 request"),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400, "no HTTP/1.1 request"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "no HTTP/1.1 request"),
    "HTTP/1.9": (b"GET / HTTP/1.9" + HOST + b"\r\n", 400, "no HTTP/1.1 request"),
    "an unknown method": (b"FETCH / HTTP/1.1" + HOST + b"\r\n", 400, "no HTTP/1.1 request"),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400, "'host' is missing"),
    "two hosts": (b"GET / HTTP/1.1" + HOST + b"Host: there\r\n\r\n", 400, "'host' is given twice"),
    "a folded header": (b"GET / HTTP/1.1" + HOST + b"A: b\r\n c\r\n\r\n", 400, "no HTTP/1.1 request"),
    "a header without a colon": (b"GET / HTTP/1.1" + HOST + b"A\r\n\r\n", 400, "no HTTP/1.1 request"),
    "a NUL": (b"GET / HTTP/1.1" + HOST + b"A: b\0c\r\n\r\n", 400, "no HTTP/1.1 request"),
    "two lengths": (
        b"POST / HTTP/1.1" + HOST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400, "Content-Length"
    ),
    "a list of lengths": (b"POST / HTTP/1.1" + HOST + b"Content-Length: 1, 1\r\n\r\nx", 400, "Content-Length"),
    "a negative length": (b"POST / HTTP/1.1" + HOST + b"Content-Length: -1\r\n\r\n", 400, "Content-Length"),
    "no length": (b"POST / HTTP/1.1" + HOST + b"Content-Length: \r\n\r\n", 400, "Content-Length"),
    "a hexadecimal length": (b"POST / HTTP/1.1" + HOST + b"Content-Length: 0x1\r\n\r\n", 400, "Content-Length"),
    "a length beyond 64 bits": (b"POST / HTTP/1.1" + HOST + b"Content-Length: 99999999999999999999\r\n\r\n", 400,
                                "Content-Length"),
    "a length of 19 digits": (b"POST / HTTP/1.1" + HOST + b"Content-Length: 1000000000000000000\r\n\r\n", 400,
                              "content-length"),
    "a huge length": (b"POST / HTTP/1.1" + HOST + b"Content-Length: 99999999999999999\r\n\r\n", 413, "1048576 bytes"),
    "length and chunks": (
        b"POST / HTTP/1.1" + HOST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nx", 400, "Content-Length"
    ),
    "chunks and length": (
        b"POST / HTTP/1.1" + HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\nx", 400, "Content-Length"
    ),
    "an unknown coding": (b"POST / HTTP/1.1" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400, "'chunked'"),
    "another unknown coding": (b"POST / HTTP/1.1" + HOST + b"Transfer-Encoding: identity\r\n\r\n", 400, "no HTTP/1.1"),
    "a header length twice": (
        b"POST / HTTP/1.1" + HOST + b"Inference-Header-Content-Length: 1\r\n" * 2 + b"\r\n", 400, "given twice"
    ),
    "an endless head": (b"GET / HTTP/1.1\r\nA: " + b"x" * HEAD_BYTES_CAP, 431, f"{HEAD_BYTES_CAP} bytes"),
    "a flood of headers": (
        b"GET / HTTP/1.1" + HOST + b"".join(b"A%d: b\r\n" % n for n in range(HEADERS_CAP)) + b"\r\n",
        431, f"{HEADERS_CAP} headers",
    ),
    "a flood of one header": (b"GET / HTTP/1.1" + HOST + b"A: b\r\n" * HEADERS_CAP + b"\r\n", 431, "headers"),
    "a chunk without a size": (chunked([])[:-5] + b"\r\n\r\n", 400, "no hexadecimal number"),
    "a chunk of a negative size": (chunked([])[:-5] + b"-1\r\n\r\n", 400, "no hexadecimal number"),
    "a chunk of an endless size": (chunked([])[:-5] + b"1" * 17 + b"\r\n", 400, "no hexadecimal number"),
    "a chunk beyond 32 bits": (chunked([])[:-5] + b"ffffffffffffffff\r\n", 413, "1048576 bytes"),
    "a size line that is too long": (chunked([])[:-5] + b"1;" + b"x" * 5000, 400, "too long"),
    "a chunk longer than its size": (chunked([])[:-5] + b"2\r\nabc\r\n", 400, "longer than its size"),
    "a chunk without its end": (chunked([])[:-5] + b"2\r\nabX\r\n", 400, "longer than its size"),
    "endless trailers": (chunked([], trailers=b"A: b\r\n" * 4000), 400, "trailers"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_request_is_refused(server, name):
    sent, status, text = BAD[name]
    for _ in range(2):
        before = sum(counted(status, method=method) for method in ("other", "POST", "GET"))
        with server.connect() as client:
            answer = client.ask(sent)
            assert answer.status == status and text in answer.text, answer.text
            assert answer.headers["connection"] == "close"
            assert client.ended()
        assert sum(counted(status, method=method) for method in ("other", "POST", "GET")) == before + 1
    assert server.seen == []


def test_a_head_and_headers_at_their_bounds_are_served(server):
    head = b"GET /echo HTTP/1.1" + HOST + b"A: "
    with server.connect() as client:
        assert client.ask(head + b"x" * (HEAD_BYTES_CAP - len(head) - 4) + b"\r\n\r\n").status == 200
        headers = b"".join(b"A%d: b\r\n" % n for n in range(HEADERS_CAP - 1))
        assert client.ask(b"GET /echo HTTP/1.1" + HOST + headers + b"\r\n").status == 200


def test_empty_lines_before_a_request_are_read_over(server):
    with server.connect() as client:
        client.send(b"\r\n\r\n\r\n")
        assert client.ask(b"\r\n" + request(body=b"x")).body == b"x"


# ---- bodies that are too large --------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_while_it_comes(serve):
    server = serve(body_bytes_cap=4096)
    for sent in (request(body=b"x" * 4097), chunked([b"x" * 1000] * 5)):
        for _ in range(2):  # the head is known the second time
            with server.connect() as client:
                client.send(sent)
                for _ in range(40):  # it goes on sending, unmoved
                    client.send(b"y" * 50_000)
                answer = client.answer()
                assert answer.status == 413 and "larger than 4096 bytes" in answer.text
                assert client.ended()
    with server.connect() as client:
        assert len(client.ask(request(body=b"x" * 4096)).body) == 4096
        assert len(client.ask(chunked([b"x" * 1024] * 4)).body) == 4096
    wait_until(lambda: not server.server._connections, "the end of the connections")
    assert server.server._held_bytes == 0


def test_bodies_that_come_at_once_are_bounded_together(serve):
    server = serve(body_bytes_cap=400_000)
    body = b"x" * 400_000
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(4)]
        for client in clients:
            client.send(request(body=body)[:-1])
        wait_until(lambda: server.server._held_bytes == 4 * 399_999, "all but their last bytes")
        refused = stack.enter_context(server.connect())
        answer = refused.ask(request(body=body))
        assert answer.status == 503 and answer.headers["retry-after"] == "1" and "at once" in answer.text
        for client in clients:
            assert client.ask(b"x").body == body
    wait_until(lambda: not server.server._connections, "the end of the connections")
    assert server.server._held_bytes == 0


# ---- codings --------------------------------------------------------------------------------------------------------


def test_compressed_bodies(server):
    text = b"0123456789" * 1000
    raw = zlib.compressobj(9, zlib.DEFLATED, -15)
    for coding, body, status, found in [
        ("gzip", gzip.compress(text, mtime=0), 200, text),
        ("GZIP", gzip.compress(text, mtime=0), 200, text),
        ("x-gzip", gzip.compress(text), 200, text),
        ("deflate", zlib.compress(text), 200, text),
        ("identity", text, 200, text),
        ("", text, 200, text),
        ("gzip", gzip.compress(text)[:-1], 400, b"cut off"),
        ("gzip", gzip.compress(text)[:20], 400, b"cut off"),
        ("gzip", gzip.compress(text) + b"more", 400, b"more follows"),
        ("gzip", b"", 400, b"cut off"),
        ("gzip", text, 400, b"is not gzip"),
        ("deflate", raw.compress(text) + raw.flush(), 400, b"is not deflate"),
        ("br", text, 400, b"content-encoding 'br' is not known"),
        ("gzip, gzip", gzip.compress(gzip.compress(text)), 400, b"is not known"),
    ]:
        with server.connect() as client:
            answer = client.ask(request(body=body, headers=[f"Content-Encoding: {coding}"]))
            assert answer.status == status and found in answer.body, (coding, answer.body)
            assert client.ask(request(body=b"next")).body == b"next"  # the connection lives


def test_a_bomb_is_not_unpacked(serve):
    server = serve(body_bytes_cap=1 << 20)
    bomb = gzip.compress(bytes(100 << 20))
    with server.connect() as client:
        answer = client.ask(request(body=bomb, headers=["Content-Encoding: gzip"]))
        assert answer.status == 413 and "unpacked body is larger than 1048576 bytes" in answer.text


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [("gzip", "gzip"), ("deflate, gzip;q=0.5, *", "gzip"), ("GZIP", "gzip"), ("gzip;q=0", ""), ("gzip; q=0.000", ""),
     ("deflate", "deflate"), ("gzip;q=0, deflate", "deflate"), ("gzipped, br", ""), ("", "")],
)  # fmt: skip
def test_answers_are_compressed_for_clients_that_accept_it(server, accepted, coding):
    unpack = {"": bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}[coding]
    with server.connect() as client:
        answer = client.ask(request("/size?10000", method="GET", headers=[f"Accept-Encoding: {accepted}"]))
        assert answer.headers.get("content-encoding", "") == coding
        assert unpack(answer.body) == b"x" * 10_000
        small = client.ask(request("/size?100", method="GET", headers=[f"Accept-Encoding: {accepted}"]))
        assert small.body == b"x" * 100 and "content-encoding" not in small.headers


# ---- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"G", request(method="GET")[:-2], request(body=b"0123")[:-1], chunked([b"0123"])[:-1]]
)
def test_a_slow_request_is_408(serve, sent):
    server = serve(request_timeout_s=0.1)
    with server.connect() as client:
        answer = client.ask(sent)
        assert answer.status == 408 and "send it faster" in answer.text
        assert client.ended()


def test_drops_do_not_wind_the_clock_back(server):
    """A head or a body that comes in many pieces has the time of one that does not come at all."""
    for sent in (b"GET / HTTP/1.1\r\nA: " + b"x" * 500, chunked([b"x"] * 100)[:-1], request(body=b"x" * 500)[:-1]):
        with server.connect():
            connection, deadlines = server.connection(), []
            for byte in sent:
                server.feed([bytes([byte])])
                if not deadlines or deadlines[-1] != connection.deadline_s:
                    deadlines.append(connection.deadline_s)
            assert len(deadlines) == (1 if sent.startswith(b"GET") else 2), "one for the head, one for the body"
        wait_until(lambda: not server.server._connections, "the end of the connection")


def test_a_head_that_begins_late_has_its_full_time(serve):
    server = serve(keep_alive_s=1.0, request_timeout_s=5.0)
    with server.connect():
        connection = server.connection()
        idle_until_s = connection.deadline_s
        server.feed([b"GET / HT"])
        assert connection.deadline_s > idle_until_s + 3
        begun_s = connection.deadline_s
        server.feed([b"TP/1.1\r\n"])
        assert connection.deadline_s == begun_s


def test_an_idle_connection_is_closed(serve):
    server = serve(keep_alive_s=0.1)
    with server.connect() as client, server.connect() as silent:
        assert client.ask(request(body=b"x")).body == b"x"
        assert client.ended() and silent.ended()


def test_a_request_under_way_is_not_idle(serve):
    server = serve(keep_alive_s=0.05, request_timeout_s=0.05)
    with server.connect() as client:
        client.send(request("/later"))
        wait_until(lambda: server.waiting, "the request")
        connection = server.connection()
        wait_until(lambda: server.server.clock() > connection.deadline_s + 5 * SWEEP_S, "a time")
        server.reply()
        assert client.answer().body == b"done"


# ---- clients that do not read ---------------------------------------------------------------------------------------


def test_a_client_that_reads_slowly_gets_everything(serve):
    server = serve(body_bytes_cap=8 << 20)
    with server.connect(receive_bytes=4096) as client:
        client.send(request("/size?4000000", method="GET") + request(body=b"next"))
        wait_until(lambda: server.connection()._blocked, "back-pressure")
        assert len(server.seen) == 1  # the next one waits
        assert len(client.answer().body) == 4_000_000
        assert client.answer().body == b"next"
    wait_until(lambda: not server.server._connections, "the end of the connection")
    assert server.server._held_bytes == 0


def test_a_slow_reader_gets_all_of_a_last_answer(serve):
    """The short time that a closed connection lingers begins when the answer has gone."""
    server = serve(body_bytes_cap=8 << 20)
    with server.connect(receive_bytes=4096) as client:
        client.send(request("/size?8000000", method="GET", headers=["Connection: close"]))
        connection = server.connection()
        wait_until(lambda: connection._blocked, "back-pressure")
        assert connection.deadline_s > server.server.clock() + 5
        assert len(client.answer().body) == 8_000_000
        assert client.ended()


def test_a_client_that_does_not_read_is_cut_off(serve):
    server = serve(body_bytes_cap=8 << 20, request_timeout_s=0.2)
    flood = request("/size?3000000", method="GET") * 50
    with server.connect(receive_bytes=4096) as client:
        client.send(flood)
        connection = server.connection()
        wait_until(lambda: connection._blocked, "back-pressure")
        assert len(server.seen) <= 2
        wait_until(lambda: not server.server._connections, "the end of the connection")
        with pytest.raises((EOFError, ConnectionError)):
            client.answer()
    assert server.server._held_bytes == 0


def test_a_client_that_sends_and_does_not_read_is_not_read_from(serve):
    server = serve(body_bytes_cap=8 << 20)
    with server.connect(receive_bytes=4096) as client:
        client.send(request("/size?8000000", method="GET"))
        connection = server.connection()
        wait_until(lambda: connection._blocked, "back-pressure")
        client.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.socket.send(request(body=b"x" * 100_000))
        wait_until(lambda: connection._paused, "back-pressure")
        assert len(connection._waiting) <= WAITING_BYTES_CAP + SCRATCH_BYTES


def test_answers_that_nobody_reads_are_bounded_together(serve):
    server = serve(body_bytes_cap=1 << 20)
    size = 8_000_000
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect(receive_bytes=4096)) for _ in range(8)]
        for client in clients:
            client.send(request(f"/size?{size}", method="GET"))
        wait_until(lambda: len(server.seen) == 8, "all requests")
        wait_until(lambda: len(server.server._connections) < 8, "the end of some")
        wait_until(lambda: server.server._held_bytes <= 4 << 20, "no more than four bodies' memory")


# ---- clients that leave ---------------------------------------------------------------------------------------------


def test_a_client_that_leaves_calls_its_request_off(server):
    before = counted(499, method="POST")
    with server.connect() as client:
        client.send(request("/later"))
        wait_until(lambda: server.waiting, "the request")
    wait_until(lambda: server.left, "the cancellation")
    server.reply()  # too late: nobody hears it
    wait_until(lambda: not server.server._connections, "the end of the connection")
    assert counted(499, method="POST") == before + 1


def test_a_client_that_is_reset_calls_its_request_off(server):
    with server.connect() as client:
        client.send(request("/later"))
        wait_until(lambda: server.waiting, "the request")
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: server.left, "the cancellation")


@pytest.mark.parametrize("sent", [request(body=bytes(900_000))[:-1], chunked([bytes(900_000)])[:-1]])
def test_a_client_that_leaves_within_its_body_leaves_nothing(server, sent):
    before = counted(499, method="POST")
    with server.connect() as client:
        client.send(sent)
        wait_until(lambda: server.server._held_bytes > 500_000, "the body")
    wait_until(lambda: not server.server._connections, "the end of the connection")
    assert server.server._held_bytes == 0 and server.seen == []
    assert counted(499, method="POST") == before + 1


# ---- many connections -----------------------------------------------------------------------------------------------


def test_connections_beyond_the_cap_are_told_so(serve):
    server = serve(connections_cap=2)
    with server.connect() as first, server.connect() as second:
        assert [client.ask(request(body=b"x")).body for client in (first, second)] == [b"x", b"x"]
        with server.connect() as third:
            answer = third.ask(request(body=b"3"))
            assert answer.status == 503 and "connections_cap" in answer.text
            assert answer.headers["retry-after"] == "1" and answer.headers["connection"] == "close"
            assert third.ended()
        assert first.ask(request(body=b"4")).body == b"4"
    wait_until(lambda: not server.server._connections, "the end of the connections")
    assert server.server._refusals == 0
    with server.connect() as client:
        assert client.ask(request(body=b"5")).body == b"5"


def test_a_flood_of_connections_is_bounded(serve, monkeypatch):
    monkeypatch.setattr(http_server, "REFUSALS_CAP", 3)
    server = serve(connections_cap=2)
    with contextlib.ExitStack() as stack:
        served = [stack.enter_context(server.connect()) for _ in range(2)]
        assert [client.ask(request(body=b"x")).body for client in served] == [b"x", b"x"]
        others = [stack.enter_context(server.connect()) for _ in range(20)]
        ends = []
        for client in others:
            try:
                ends.append(client.answer().status)
            except (EOFError, ConnectionError):
                ends.append(0)
        assert ends.count(503) >= 3 and ends.count(0) >= 1
        assert len(server.server._connections) <= 5
        assert served[0].ask(request(body=b"y")).body == b"y"


def test_without_free_descriptors_clients_wait(server, monkeypatch):
    monkeypatch.setattr(http_server, "ACCEPT_PAUSE_S", 0.05)
    tries = []
    accept = server.server._accept
    monkeypatch.setattr(server.server, "_accept", lambda: (tries.append(1), accept()))
    server.run(server.server._listen)
    client = socket.socket()
    client.settimeout(10)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        client.connect(("127.0.0.1", server.port))
        client.sendall(request(body=b"x"))
        wait_until(lambda: len(tries) >= 3, "several tries")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(tries) < 100  # it waits between them
    assert client.recv(1000).startswith(b"HTTP/1.1 200")
    client.close()


# ---- the end --------------------------------------------------------------------------------------------------------


def test_a_drain_answers_what_is_under_way(serve):
    server = serve()
    body = b"x" * 500_000
    with contextlib.ExitStack() as stack:
        idle, asking, sending, beginning = [stack.enter_context(server.connect()) for _ in range(4)]
        assert idle.ask(request(body=b"x")).body == b"x"
        asking.send(request("/later"))
        sending.send(request(body=body)[:-1])
        beginning.send(b"POST /ech")
        wait_until(lambda: server.waiting and server.server._held_bytes > 400_000, "the requests")
        ended = server.begin_drain(5.0)
        assert idle.ended() and beginning.ended()
        assert not ended.done()
        sending.send(b"x")
        answer = sending.answer()
        assert answer.body == body and answer.headers["connection"] == "close"
        server.reply()
        answer = asking.answer()
        assert answer.body == b"done" and answer.headers["connection"] == "close"
        assert asking.ended() and sending.ended()
    ended.result(5)


def test_a_drain_does_not_wait_for_ever(serve):
    server = serve()
    with server.connect() as client:
        client.send(request("/later"))
        wait_until(lambda: server.waiting, "the request")
        server.drain(0.1)
        wait_until(lambda: server.left and not server.server._connections, "the end of the connection")
