"""A gRPC server with methods for tests, and the other side of HTTP/2, frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import hpack

from millhand.errors import InputError
from millhand.serving.grpc import frames
from millhand.serving.grpc.rpc import Method

SERVICE = "test.Service"


class Service:
    """Methods to call: echo, double (as many zeros as asked for), wait (until released), fail, echo of a stream."""

    def __init__(self):
        self.release = asyncio.Event()
        self.waiting = self.left = 0

    def methods(self):
        for name in ("echo", "zeros", "wait", "fail", "refuse"):
            yield Method(SERVICE, name, unary=getattr(self, name))
        yield Method(SERVICE, "stream", streaming=self.stream)

    async def echo(self, call, message):
        return message

    async def zeros(self, call, message):
        return bytes(int(message))

    async def wait(self, call, message):
        self.waiting += 1
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        return message

    async def fail(self, call, message):
        raise ZeroDivisionError

    async def refuse(self, call, message):
        raise InputError("é" * 5000, hint="100 % ü")

    async def stream(self, call):
        async for message in call.messages():
            await call.write(message)


class Peer:
    """The client's side, frame by frame."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.next = 1

    @classmethod
    async def connect(cls, port, settings=(), greet=True):
        peer = cls(*await asyncio.open_connection("127.0.0.1", port))
        if greet:
            payload = b"".join(struct.pack(">HI", *setting) for setting in settings)
            peer.write(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, payload))
        return peer

    async def close(self):
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def write(self, data):
        self.writer.write(data)

    def send(self, kind, flags=0, stream=0, payload=b""):
        self.write(frames.frame(kind, flags, stream, payload))

    def block(self, method="echo", **fields):
        head = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/{SERVICE}/{method}",
            ":authority": "x",
            "content-type": "application/grpc",
            "te": "trailers",
            **{name.replace("_", "-"): value for name, value in fields.items()},
        }
        return self.encoder.encode(head.items())

    def begin(self, method="echo", flags=frames.END_HEADERS, **fields):
        stream = self.next
        self.next += 2
        self.send(frames.HEADERS, flags, stream, self.block(method, **fields))
        return stream

    def call(self, method="echo", message=b"hello", **fields):
        stream = self.begin(method, **fields)
        self.data(stream, framed(message))
        return stream

    def data(self, stream, data, end=True):
        """Data as they come, in frames of the largest size."""
        pieces = [data[at : at + frames.FRAME_BYTES] for at in range(0, len(data), frames.FRAME_BYTES)] or [b""]
        for number, piece in enumerate(pieces, 1):
            self.send(frames.DATA, frames.END_STREAM if end and number == len(pieces) else 0, stream, piece)

    async def read(self):
        """The next frame: (kind, flags, stream, payload). SETTINGS and connection windows are passed over."""
        while True:
            head = await asyncio.wait_for(self.reader.readexactly(9), 10)
            high, low, kind, flags, stream = frames.HEAD.unpack(head)
            payload = await self.reader.readexactly(high << 8 | low)
            if kind != frames.SETTINGS and (kind, stream) != (frames.WINDOW_UPDATE, 0):
                return kind, flags, stream, payload

    async def answer(self, stream):
        """(fields of all header blocks, data) of one stream; other streams' frames are an error."""
        fields, data = {}, b""
        while True:
            kind, flags, number, payload = await self.read()
            assert number == stream, (kind, number, payload)
            if kind == frames.HEADERS:
                fields.update(self.decoder.decode(payload))
                if flags & frames.END_STREAM:
                    return fields, data
            elif kind == frames.DATA:
                data += payload
            elif kind == frames.RST_STREAM:
                raise AssertionError(f"reset with {int.from_bytes(payload, 'big')}")

    async def status(self, stream):
        fields, _ = await self.answer(stream)
        return fields["grpc-status"], fields.get("grpc-message", "")

    async def reset(self):
        """(stream, code) of the next RST_STREAM."""
        kind, _, stream, payload = await self.read()
        assert kind == frames.RST_STREAM
        return stream, int.from_bytes(payload, "big")

    async def goodbye(self):
        """The code of the GOAWAY that ends the connection."""
        while True:
            kind, _, _, payload = await self.read()
            if kind == frames.GOAWAY:
                assert await asyncio.wait_for(self.reader.read(), 10) == b""
                await self.close()
                return struct.unpack_from(">II", payload)[1]

    async def works(self):
        """Whether a call on this connection is answered."""
        fields, data = await self.answer(self.call())
        return fields["grpc-status"] == "0" and data == framed(b"hello")


def framed(message, flag=0):
    return bytes([flag]) + len(message).to_bytes(4, "big") + message
