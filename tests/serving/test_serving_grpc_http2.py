"""The gRPC server's HTTP/2 against peers that follow the rules in odd ways, and peers that do not."""

from __future__ import annotations

import asyncio
import gzip
import struct

import grpc.aio
import numpy as np
import pytest
from grpc_kit import Client
from http2_kit import SERVICE, Peer, Service, framed
from serving_kit import until

from millhand.serving.front_metrics import GRPC_HANDLED
from millhand.serving.grpc import connection as connection_module
from millhand.serving.grpc import frames, rpc
from millhand.serving.grpc import server as server_module
from millhand.serving.grpc.hpack import encode
from millhand.serving.grpc.server import Server
from millhand.serving.observation import Observation
from millhand.serving.tracing import Tracer

CALM, COMPRESSION, FLOW, PROTOCOL, SIZE, REFUSED, CLOSED = 11, 9, 3, 1, 6, 7, 5


@pytest.fixture
async def started(caplog):
    """Start a server: returns (service, server, connect). Every one ends without a connection left."""
    ends, peers = [], []

    async def start(**limits):
        service = Service()
        options = {"message_bytes_cap": 1 << 20, "connections_cap": 100, "streams_cap": 50, "keepalive_s": 60, **limits}
        server = Server(service.methods(), **options)
        listening = await asyncio.get_running_loop().create_server(server.new_connection, "127.0.0.1", 0)
        watch = asyncio.create_task(server.watch())
        ends.append((server, listening, watch))
        port = listening.sockets[0].getsockname()[1]

        async def connect(**options):
            peers.append(await Peer.connect(port, **options))
            return peers[-1]

        connect.address = f"127.0.0.1:{port}"
        return service, server, connect

    yield start
    for peer in peers:
        await peer.close()
    for server, listening, watch in ends:
        listening.close()
        await server.drain(0)
        await until(lambda server=server: not server.connections)
        assert server.held_bytes == 0
        watch.cancel()
    # Whatever a peer sends, nothing may surprise the server; `fail` is what a method's bug looks like.
    surprises = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [text for text in surprises if "/test.Service/fail" not in text] == []


def counted(method, code):
    key = ("unary", SERVICE, method, code)
    return GRPC_HANDLED._values.get(key, 0)


# ---- peers that follow the rules ------------------------------------------------------------------------------------


async def test_a_call_byte_by_byte(started):
    _, _, connect = await started()
    peer = await connect(greet=False)
    whole = frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0)
    whole += frames.frame(frames.HEADERS, frames.END_HEADERS, 1, peer.block())
    whole += frames.frame(frames.DATA, frames.END_STREAM, 1, framed(b"hello"))
    for byte in whole:
        peer.write(bytes([byte]))
        await peer.writer.drain()
    fields, data = await peer.answer(1)
    assert data == framed(b"hello")
    assert (fields[":status"], fields["content-type"], fields["grpc-status"]) == ("200", "application/grpc", "0")


async def test_padding_priorities_continuations_and_unknown_frames(started):
    _, _, connect = await started()
    peer = await connect()
    block = peer.block()
    peer.send(0xEE, 0xFF, 77, b"an extension")
    peer.send(frames.PRIORITY, 0, 1, bytes(5))
    first, second = block[:5], block[5:]
    peer.send(frames.HEADERS, frames.PADDED | frames.PRIORITIZED, 1, b"\3" + bytes(5) + first + b"\0\0\0")
    peer.send(frames.CONTINUATION, 0, 1, second[:4])
    peer.send(frames.CONTINUATION, frames.END_HEADERS, 1, second[4:])
    peer.send(frames.DATA, frames.PADDED, 1, b"\4" + framed(b"hello")[:3] + bytes(4))
    peer.send(frames.DATA, frames.END_STREAM, 1, framed(b"hello")[3:])
    assert (await peer.answer(1))[1] == framed(b"hello")
    peer.send(frames.PING, 0, 0, b"12345678")
    assert await peer.read() == (frames.PING, frames.ACK, 0, b"12345678")


async def test_trailers_of_a_client_end_its_message(started):
    _, _, connect = await started()
    peer = await connect()
    stream = peer.begin()
    peer.data(stream, framed(b"hello"), end=False)
    peer.send(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream, peer.encoder.encode([("x", "y")]))
    assert (await peer.answer(stream))[1] == framed(b"hello")


async def test_answers_keep_to_the_windows_of_the_peer(started):
    _, _, connect = await started()
    peer = await connect(settings=[(frames.INITIAL_WINDOW_SIZE, 10)])
    stream = peer.call("zeros", b"95")
    kinds = [await peer.read() for _ in range(2)]
    assert [kind for kind, *_ in kinds] == [frames.HEADERS, frames.DATA]
    data = kinds[1][3]
    assert len(data) == 10
    while len(data) < 70:
        peer.send(frames.WINDOW_UPDATE, 0, stream, (20).to_bytes(4, "big"))
        kind, _, _, payload = await peer.read()
        assert (kind, len(payload)) == (frames.DATA, 20)
        data += payload
    peer.send(frames.SETTINGS, 0, 0, struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, 200))  # 190 more
    _, rest = await peer.answer(stream)
    assert data + rest == framed(bytes(95))


async def test_the_connection_window_is_shared(started):
    _, _, connect = await started()
    peer = await connect(settings=[(frames.INITIAL_WINDOW_SIZE, 1 << 20)])
    streams = [peer.call("zeros", b"50000") for _ in range(3)]
    got = dict.fromkeys(streams, 0)
    ended = set()
    while len(ended) < 3:
        if sum(got.values()) in (65_535, 131_070):
            peer.send(frames.WINDOW_UPDATE, 0, 0, (65_535).to_bytes(4, "big"))
        kind, flags, stream, payload = await peer.read()
        if kind == frames.DATA:
            got[stream] += len(payload)
        elif flags & frames.END_STREAM:
            ended.add(stream)
    assert set(got.values()) == {50_005}


async def test_a_large_message_on_a_stream_gets_its_windows(started):
    _, _, connect = await started(message_bytes_cap=20 << 20)
    client = Client(connect.address, **{"grpc.max_receive_message_length": -1})
    data = np.random.default_rng(1).bytes(18 << 20)  # more than the connection's window
    assert await client.call("echo", data, SERVICE) == data
    call = client.channel.stream_stream(f"/{SERVICE}/stream")()
    await call.write(data)
    assert await call.read() == data
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    await client.close()


async def test_a_stream_that_nobody_reads_holds_the_client_back(started):
    """The client may send one window while the server cannot write; then it must wait."""
    _, server, connect = await started()
    peer = await connect(settings=[(frames.INITIAL_WINDOW_SIZE, 0)])
    stream = peer.begin("stream")
    sent, message = 0, framed(bytes(frames.FRAME_BYTES - 5))
    while sent + len(message) <= frames.WINDOW:
        peer.send(frames.DATA, 0, stream, message)
        sent += len(message)
    await until(lambda: server.held_bytes >= sent - len(message))
    peer.send(frames.DATA, 0, stream, message)
    kinds = [await peer.read(), await peer.read()]
    assert kinds[0][0] == frames.HEADERS  # of the answer that waits for its window
    assert (kinds[1][0], int.from_bytes(kinds[1][3], "big")) == (frames.RST_STREAM, FLOW)


async def test_a_slow_reader_does_not_fill_the_memory(started):
    _, server, connect = await started(message_bytes_cap=1 << 24)
    peer = await connect(settings=[(frames.INITIAL_WINDOW_SIZE, (1 << 31) - 1)])
    peer.send(frames.WINDOW_UPDATE, 0, 0, (1 << 30).to_bytes(4, "big"))
    streams = [peer.call("zeros", b"10000000") for _ in range(10)]
    await until(lambda: len(server.connections) == 1)
    (connection,) = server.connections
    await until(lambda: connection.paused and len(connection.blocked) == 10)
    assert connection._transport.get_write_buffer_size() < 1 << 20
    got = dict.fromkeys(streams, 0)
    ended = 0
    while ended < 10:
        kind, flags, stream, payload = await peer.read()
        got[stream] += len(payload) if kind == frames.DATA else 0
        ended += kind == frames.HEADERS and bool(flags & frames.END_STREAM)
    assert set(got.values()) == {10_000_005}


async def test_a_reset_cancels_the_call_and_is_counted(started):
    service, _, connect = await started()
    peer = await connect()
    before = counted("wait", "Canceled")
    stream = peer.call("wait")
    await until(lambda: service.waiting == 1)
    peer.send(frames.RST_STREAM, 0, stream, frames.CANCEL.to_bytes(4, "big"))
    await until(lambda: service.left == 1)
    assert counted("wait", "Canceled") == before + 1
    assert await peer.works()
    peer.call("wait")
    await until(lambda: service.waiting == 2)
    await peer.close()
    await until(lambda: service.left == 2)
    assert counted("wait", "Canceled") == before + 2


async def test_a_drain_in_two_steps(started):
    service, server, connect = await started()
    peer = await connect()
    stream = peer.call("wait")
    await until(lambda: service.waiting == 1)
    drain = asyncio.create_task(server.drain(10))
    kind, _, _, payload = await peer.read()
    assert (kind, *struct.unpack(">II", payload)) == (frames.GOAWAY, frames.WINDOW_CAP, frames.NO_ERROR)
    late = peer.call()  # on its way before the client read that
    kind, _, _, payload = await peer.read()
    assert kind == frames.PING
    peer.send(frames.PING, frames.ACK, 0, payload)
    assert (await peer.answer(late))[1] == framed(b"hello")
    kind, _, _, payload = await peer.read()
    assert (kind, *struct.unpack(">II", payload)) == (frames.GOAWAY, late, frames.NO_ERROR)
    service.release.set()
    assert (await peer.answer(stream))[1] == framed(b"hello")
    assert await peer.goodbye() == frames.NO_ERROR
    await drain


class KeepingTracer(Tracer):
    enabled = True

    def __init__(self):
        self.traces = []

    def record(self, trace):
        self.traces.append(trace)
        return ""


async def test_every_call_is_handed_to_the_tracer(started):
    tracer = KeepingTracer()
    _, _, connect = await started(observation=Observation(tracer, None))
    peer = await connect()
    await peer.answer(peer.call(traceparent="00-what-the-caller-says-01"))
    await peer.answer(peer.call("refuse"))
    good, bad = tracer.traces
    assert (good.method, good.status, good.grpc) == (f"{SERVICE}/echo", 0, True)
    assert (good.traceparent, bad.traceparent) == ("00-what-the-caller-says-01", "")
    assert good.start_ns < good.end_ns <= bad.end_ns and bad.status == 3


# ---- calls that are wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({":method": "GET"}, "3", "no gRPC call"),
        ({"content-type": "application/json"}, "3", "no gRPC call"),
        ({":path": "/test.Service/ecko"}, "12", "did you mean '/test.Service/echo'?"),
        ({"grpc-timeout": "5x"}, "3", "grpc-timeout '5x'"),
        ({"grpc-timeout": "123456789S"}, "3", "grpc-timeout"),
        ({"grpc-timeout": "S"}, "3", "grpc-timeout"),
        ({"grpc-timeout": "-1S"}, "3", "grpc-timeout"),
        ({"grpc-encoding": "br"}, "12", "grpc-encoding 'br'"),
        ({"grpc-timeout": "1n", ":path": "/test.Service/wait"}, "4", "deadline"),
    ],
)
async def test_wrong_heads(started, fields, status, text, monkeypatch):
    monkeypatch.setattr(server_module, "CHECK_S", 0.02)
    _, _, connect = await started()
    peer = await connect()
    stream = peer.next
    peer.next += 2
    head = {":method": "POST", ":path": f"/{SERVICE}/echo", "content-type": "application/grpc", **fields}
    peer.send(frames.HEADERS, frames.END_HEADERS, stream, peer.encoder.encode(head.items()))
    peer.data(stream, framed(b"hello"))
    found = await peer.status(stream)
    assert (found[0], text in found[1]) == (status, True), found
    assert await peer.works()


@pytest.mark.parametrize(
    ("data", "status", "text"),
    [
        (b"", "3", "0 bytes are not one message"),
        (b"\0\0\0", "3", "3 bytes are not one message"),
        (framed(b"hello")[:-1], "3", "9 bytes are not one message"),
        (framed(b"hello") + framed(b"hello"), "3", "20 bytes are not one message"),
        (framed(gzip.compress(b"hello", mtime=0), 1), "3", "no grpc-encoding"),
        (b"\0\xff\xff\xff\xff", "8", "message_bytes_cap"),
        (framed(bytes((1 << 20) + 1)), "8", "message_bytes_cap"),
    ],
)
@pytest.mark.parametrize("method", ["echo", "stream"])
async def test_wrong_messages(started, data, status, text, method):
    _, _, connect = await started()
    peer = await connect()
    stream = peer.begin(method)
    peer.data(stream, data)
    if method == "stream" and (not data or "20 bytes" in text):
        assert (await peer.answer(stream))[0]["grpc-status"] == "0"  # none, and two, are what a stream may have
    else:
        found = await peer.status(stream)
        assert found[0] == status and (text in found[1] or method == "stream"), found
    ended, rest = False, b""
    while not ended:  # of what was sent after the end, nothing disturbs the next call
        number = peer.call()
        while True:
            kind, flags, got, payload = await peer.read()
            if got == number and kind == frames.DATA:
                rest += payload
            if got == number and flags & frames.END_STREAM and kind == frames.HEADERS:
                ended = True
                break
    assert rest == framed(b"hello")


async def test_compressed_messages(started):
    _, _, connect = await started()
    peer = await connect()
    for data, status in (
        (framed(gzip.compress(b"hello", mtime=0), 1), "0"),
        (framed(b"hello"), "0"),
        (framed(b"hello", 1), "3"),
        (framed(gzip.compress(bytes(2 << 20), mtime=0), 1), "8"),
    ):
        stream = peer.begin(grpc_encoding="gzip")
        peer.data(stream, data)
        fields, answer = await peer.answer(stream)
        assert fields["grpc-status"] == status
        assert answer == (framed(b"hello") if status == "0" else b"")


async def test_what_a_method_raises(started):
    _, _, connect = await started()
    client = Client(connect.address)
    for method, code, text in (("fail", "INTERNAL", "ZeroDivisionError"), ("refuse", "INVALID_ARGUMENT", "éééé")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.call(method, b"", SERVICE)
        assert (caught.value.code().name, text in caught.value.details()) == (code, True)
    await client.close()


async def test_a_message_that_does_not_come_whole_is_late(started, monkeypatch):
    monkeypatch.setattr(server_module, "CHECK_S", 0.02)
    monkeypatch.setattr(rpc, "RECEIVE_S", 0.3)
    _, _, connect = await started()
    peer = await connect()
    stream = peer.begin(grpc_timeout="100m")
    peer.data(stream, framed(b"hello")[:7], end=False)
    assert (await peer.status(stream))[0] == "4"
    assert await peer.reset() == (stream, frames.NO_ERROR)
    stream = peer.begin()
    peer.data(stream, framed(b"hello")[:7], end=False)
    assert (await peer.status(stream))[0] == "4"
    assert await peer.reset() == (stream, frames.NO_ERROR)
    peer.data(stream, b"lo")
    assert await peer.works()


async def test_messages_in_pieces_hold_a_bounded_memory(started):
    _, server, connect = await started()
    peer = await connect()
    streams = [peer.begin() for _ in range(40)]
    for stream in streams:
        peer.data(stream, framed(bytes(1 << 20))[: 200 << 10], end=False)
    refused = []
    while len(refused) < 20:
        kind, _, stream, payload = await peer.read()
        if kind == frames.HEADERS:
            assert dict(peer.decoder.decode(payload))["grpc-status"] == "14"
            refused.append(stream)
    assert refused == streams[20:]  # 4 MiB hold 20 of them
    assert server.held_bytes <= 4 << 20
    await peer.close()
    await until(lambda: server.held_bytes == 0)


# ---- peers that break the rules -------------------------------------------------------------------------------------


async def test_http1_is_told_what_this_port_speaks(started):
    _, _, connect = await started()
    peer = await connect(greet=False)
    peer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    answer = await asyncio.wait_for(peer.reader.read(), 10)
    assert b"HTTP/1.1 400" in answer and b"speaks gRPC" in answer
    await peer.close()


def _headers(peer, flags, payload, stream=1):
    peer.send(frames.HEADERS, flags, stream, payload)


FLOOD = 501


BROKEN = {
    "no SETTINGS first": (lambda p: p.send(frames.PING, 0, 0, bytes(8)), PROTOCOL, False),
    "a large frame": (lambda p: p.write(frames.HEAD.pack(0x40, 1, frames.DATA, 0, 1)), SIZE, True),
    "SETTINGS of a stream": (lambda p: p.send(frames.SETTINGS, 0, 1), PROTOCOL, True),
    "SETTINGS of 5 bytes": (lambda p: p.send(frames.SETTINGS, 0, 0, bytes(5)), SIZE, True),
    "SETTINGS acknowledged with bytes": (lambda p: p.send(frames.SETTINGS, frames.ACK, 0, bytes(6)), SIZE, True),
    "a huge window": (lambda p: p.send(frames.SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 31)), FLOW, True),
    "PING of a stream": (lambda p: p.send(frames.PING, 0, 1, bytes(8)), PROTOCOL, True),
    "PING of 7 bytes": (lambda p: p.send(frames.PING, 0, 0, bytes(7)), SIZE, True),
    "PUSH_PROMISE": (lambda p: p.send(frames.PUSH_PROMISE, 0, 1, bytes(8)), PROTOCOL, True),
    "GOAWAY of a stream": (lambda p: p.send(frames.GOAWAY, 0, 1, bytes(8)), PROTOCOL, True),
    "PRIORITY of none": (lambda p: p.send(frames.PRIORITY, 0, 0, bytes(5)), PROTOCOL, True),
    "DATA of an idle stream": (lambda p: p.send(frames.DATA, 0, 1, b"x"), PROTOCOL, True),
    "DATA of none": (lambda p: p.send(frames.DATA, 0, 0, b"x"), PROTOCOL, True),
    "RST_STREAM of an idle stream": (lambda p: p.send(frames.RST_STREAM, 0, 1, bytes(4)), PROTOCOL, True),
    "RST_STREAM of 3 bytes": (lambda p: p.send(frames.RST_STREAM, 0, 1, bytes(3)), SIZE, True),
    "WINDOW_UPDATE of an idle stream": (lambda p: p.send(frames.WINDOW_UPDATE, 0, 5, b"\0\0\0\1"), PROTOCOL, True),
    "WINDOW_UPDATE of 0": (lambda p: p.send(frames.WINDOW_UPDATE, 0, 0, bytes(4)), PROTOCOL, True),
    "WINDOW_UPDATE too far": (lambda p: p.send(frames.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), FLOW, True),
    "HEADERS of an even stream": (lambda p: _headers(p, frames.END_HEADERS, p.block(), 2), PROTOCOL, True),
    "HEADERS of none": (lambda p: _headers(p, frames.END_HEADERS, p.block(), 0), PROTOCOL, True),
    "HEADERS all padding": (lambda p: _headers(p, frames.PADDED, b"\5\0\0"), PROTOCOL, True),
    "HEADERS without their priority": (lambda p: _headers(p, frames.PRIORITIZED, b"\5\0\0"), SIZE, True),
    "HEADERS that are none": (lambda p: _headers(p, frames.END_HEADERS, b"\xff\xff\xff\xff\xff"), COMPRESSION, True),
    "HEADERS not ended": (lambda p: (_headers(p, 0, b""), p.send(frames.PING, 0, 0, bytes(8))), PROTOCOL, True),
    "CONTINUATION of nothing": (lambda p: p.send(frames.CONTINUATION, frames.END_HEADERS, 1, b""), PROTOCOL, True),
    "CONTINUATION of another": (lambda p: (_headers(p, 0, b""), p.send(frames.CONTINUATION, 4, 3)), PROTOCOL, True),
    "CONTINUATION without end": (
        lambda p: (_headers(p, 0, b""), [p.send(frames.CONTINUATION, 0, 1, bytes(9000)) for _ in range(2)]), CALM, True,
    ),
    "CONTINUATION of no bytes": (
        lambda p: (_headers(p, 0, b""), [p.send(frames.CONTINUATION, 0, 1) for _ in range(FLOOD)]), CALM, True,
    ),
    "a list of headers that grows": (
        lambda p: _headers(p, 4, encode(("x" * 60, "y" * 4000)) + b"\x3f\xe1\x1f"), COMPRESSION, True,
    ),
    "a bomb of headers": (
        lambda p: _headers(p, 4, b"\x40\1x\x7f\xb1\x1e" + bytes(4016) + b"\xbe" * 9000), COMPRESSION, True,
    ),
    "PINGs": (lambda p: [p.send(frames.PING, 0, 0, bytes(8)) for _ in range(FLOOD)], CALM, True),
    "SETTINGS again and again": (lambda p: [p.send(frames.SETTINGS) for _ in range(FLOOD)], CALM, True),
    "resets": (
        lambda p: [p.send(frames.RST_STREAM, 0, p.call("wait"), bytes(4)) for _ in range(FLOOD // 2)], CALM, True,
    ),
    "empty DATA": (lambda p: (p.begin(), [p.send(frames.DATA, 0, 1) for _ in range(FLOOD)]), CALM, True),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_connection_ends_with_its_code(started, name, monkeypatch):
    monkeypatch.setattr(connection_module, "IDLE_FRAMES_CAP", FLOOD - 1)
    breaking, code, greet = BROKEN[name]
    _, server, connect = await started()
    peer = await connect(greet=greet)
    if not greet:
        peer.write(frames.PREFACE)
    breaking(peer)
    assert await peer.goodbye() == code
    await until(lambda: not server.connections)
    assert await (await connect()).works()


async def test_a_broken_stream_is_reset_and_the_connection_lives(started):
    _, _, connect = await started(streams_cap=3)
    peer = await connect()
    stream = peer.begin()
    peer.send(frames.WINDOW_UPDATE, 0, stream, bytes(4))
    assert await peer.reset() == (stream, PROTOCOL)
    stream = peer.begin()
    peer.send(frames.WINDOW_UPDATE, 0, stream, b"\x7f\xff\xff\xff")
    assert await peer.reset() == (stream, FLOW)
    stream = peer.begin()
    peer.send(frames.PRIORITY, 0, stream, bytes(4))
    assert await peer.reset() == (stream, SIZE)
    stream = peer.call("wait")
    peer.data(stream, b"more")
    assert await peer.reset() == (stream, CLOSED)
    stream = peer.begin()
    peer.send(frames.HEADERS, frames.END_HEADERS, stream, peer.encoder.encode([("x", "y")]))
    assert await peer.reset() == (stream, PROTOCOL)
    waiting = [peer.call("wait") for _ in range(4)]
    assert await peer.reset() == (waiting[3], REFUSED)
    for number in waiting[:3]:
        peer.send(frames.RST_STREAM, 0, number, bytes(4))
    assert await peer.works()


async def test_a_stream_number_that_was_used_is_passed_over(started):
    _, _, connect = await started()
    peer = await connect()
    assert await peer.works()
    peer.send(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1, peer.block())
    peer.send(frames.DATA, 0, 1, b"x")
    peer.send(frames.RST_STREAM, 0, 1, bytes(4))
    peer.send(frames.WINDOW_UPDATE, 0, 1, b"\0\0\0\1")
    assert await peer.works()


async def test_too_many_connections(started):
    _, server, connect = await started(connections_cap=2)
    peers = [await connect() for _ in range(2)]
    for peer in peers:
        assert await peer.works()
    assert await (await connect()).goodbye() == CALM
    await peers[0].close()
    await until(lambda: len(server.connections) == 1)
    assert await (await connect()).works()


async def test_silent_connections_are_asked_then_closed(started, monkeypatch):
    monkeypatch.setattr(server_module, "CHECK_S", 0.02)
    monkeypatch.setattr(connection_module, "PING_S", 0.2)
    monkeypatch.setattr(connection_module, "GREETING_S", 0.2)
    _, server, connect = await started(keepalive_s=0.1)
    mute = await connect(greet=False)
    dead, alive = await connect(), await connect()
    for _ in range(5):
        kind, flags, _, payload = await alive.read()
        assert (kind, flags) == (frames.PING, 0)
        alive.send(frames.PING, frames.ACK, 0, payload)
    assert len(await asyncio.wait_for(mute.reader.read(), 10)) > 0  # what greets every client, then the end
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        for _ in range(3):
            await dead.read()
    assert len(server.connections) == 1


async def test_random_mutations_of_a_conversation_never_hurt(started):
    service, server, connect = await started()
    service.release.set()
    generator = np.random.default_rng(11)
    for _ in range(300):
        peer = await connect(greet=False)
        data = bytearray(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0))
        for number, method in enumerate(("echo", "wait", "stream", "refuse")):
            data += frames.frame(frames.HEADERS, frames.END_HEADERS, 2 * number + 1, peer.block(method))
            data += frames.frame(frames.DATA, frames.END_STREAM, 2 * number + 1, framed(b"12345"))
        for _ in range(generator.integers(1, 8)):
            data[generator.integers(len(data))] = generator.integers(256)
        peer.write(bytes(data))
        peer.writer.write_eof()
        await asyncio.wait_for(peer.reader.read(), 10)
        await peer.close()
    assert await (await connect()).works()
    await until(lambda: server.held_bytes == 0)
