"""The server's side of HTTP/2 over TCP with prior knowledge, as far as gRPC needs it: no push, no priorities.

A connection cuts bytes into frames and keeps both windows; stream.py answers, and what it does with a request's bytes
is its subclass's matter (rpc.py). Limits, so that no peer can take much: frames of 16 KiB, header blocks of
`HEADER_BYTES_CAP`, the owner's number of streams, `IDLE_FRAMES_CAP` frames between two answers, data of at least
`SMALL_BYTES` not counted: so calls that are begun and reset, or pings, cannot flood it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections.abc import Callable
from typing import Any, Protocol, cast

from millhand.serving.grpc import frames
from millhand.serving.grpc.frames import HEAD, ConnectionFault, StreamFault, frame, unpadded
from millhand.serving.grpc.hpack import Fields, HeaderDecoder, HeaderError
from millhand.serving.grpc.stream import Stream

log = logging.getLogger("millhand.grpc")

CONNECTION_WINDOW = 1 << 24
FIRST_WINDOW = 65_535
IDLE_FRAMES_CAP = 10_000
SMALL_BYTES = 1024
GREETING_S = 10.0
PING_S = 20.0
CLOSING_S = 5.0
PING_ALIVE, PING_DRAIN = b"alive?\0\0", b"drain\0\0\0"
FOREIGN = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\nThis port speaks gRPC.\n"


class Owner(Protocol):
    """Who serves the connections."""

    connections: set[Connection]
    connections_cap: int
    streams_cap: int
    keepalive_s: float

    def parse(self, fields: Fields) -> Any:
        """What a header block means; depends on the fields alone."""

    def begin(self, connection: Connection, number: int, head: Any) -> Stream:
        """A new request."""


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._rest = b""
        self._greeted = False
        self._expected: int | None = frames.SETTINGS
        """The one kind that the next frame may be."""
        self._decoder: HeaderDecoder[Any] = HeaderDecoder(owner.parse, frames.HEADER_BYTES_CAP)
        self._block: tuple[int, bool, bytearray] | None = None
        """Stream, end of stream and the bytes so far of a header block that goes on in the next frame."""
        self._last = 0
        self._uncredited = 0
        self._since = self._loop.time()
        """When the connection was made, last heard of, or began to close."""
        self._heard = False
        self._asked = False
        self._draining = False
        self._drained = False
        self.closing = False
        self.streams: dict[int, Stream] = {}
        self.blocked: dict[int, Stream] = {}
        self.window = FIRST_WINDOW
        self.peer_window = FIRST_WINDOW
        self.paused = False
        self.idle_frames = 0
        self._takers: dict[int, Callable[[int, int, bytes], None]] = {
            frames.DATA: self._take_data,
            frames.HEADERS: self._take_headers,
            frames.PRIORITY: self._take_priority,
            frames.RST_STREAM: self._take_reset,
            frames.SETTINGS: self._take_settings,
            frames.PUSH_PROMISE: self._take_push,
            frames.PING: self._take_ping,
            frames.GOAWAY: self._take_goaway,
            frames.WINDOW_UPDATE: self._take_window,
            frames.CONTINUATION: self._take_continuation,
        }

    # ---- the transport's side ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        full = len(self._owner.connections) >= self._owner.connections_cap
        self._owner.connections.add(self)
        settings = (
            (frames.MAX_CONCURRENT_STREAMS, self._owner.streams_cap),
            (frames.INITIAL_WINDOW_SIZE, frames.WINDOW),
            (frames.MAX_HEADER_LIST_SIZE, frames.HEADER_BYTES_CAP),
        )
        self.write(frame(frames.SETTINGS, 0, 0, b"".join(struct.pack(">HI", *setting) for setting in settings)))
        self.write(frame(frames.WINDOW_UPDATE, 0, 0, (CONNECTION_WINDOW - FIRST_WINDOW).to_bytes(4, "big")))
        if full:
            self._fail(ConnectionFault(frames.ENHANCE_YOUR_CALM, "too many connections; see [grpc] connections_cap"))

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        self._heard = True
        if self._rest:
            data = self._rest + data
            self._rest = b""
        try:
            position = 0 if self._greeted else self._greet(data)
            while len(data) - position >= HEAD.size and not self.closing:
                high, low, kind, flags, number = HEAD.unpack_from(data, position)
                size = high << 8 | low
                if size > frames.FRAME_BYTES:
                    raise ConnectionFault(frames.FRAME_SIZE_ERROR, f"a frame of {size} bytes came")
                start = position + HEAD.size
                if start + size > len(data):
                    break
                position = start + size
                self._take(kind, flags, number & frames.WINDOW_CAP, data[start:position])
            self._rest += data[position:]
        except ConnectionFault as fault:
            self._fail(fault)
        except Exception:  # whatever one client sends, the others are served
            log.exception("a connection is closed")
            self._fail(ConnectionFault(frames.INTERNAL_ERROR, "internal error"))

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = True
        self._owner.connections.discard(self)
        for stream in list(self.streams.values()):
            self._drop(stream)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._flush_blocked()

    # ---- the streams' and the owner's side --------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if not self.closing:
            self._transport.write(data)

    def finish(self, stream: Stream) -> None:
        """Forget a stream that was answered."""
        self.streams.pop(stream.id, None)
        if not stream.remote_ended:  # the client need not send the rest
            self.write(frame(frames.RST_STREAM, 0, stream.id, frames.NO_ERROR.to_bytes(4, "big")))
        self._end_when_drained()

    def drain(self) -> None:
        """Tell the client to take new requests elsewhere; the connection ends with its last stream."""
        if not self._draining:
            self._draining = True
            # First a last stream that no client reaches: what is on its way to us is still answered (6.8).
            self.write(frame(frames.GOAWAY, 0, 0, struct.pack(">II", frames.WINDOW_CAP, frames.NO_ERROR)))
            self.write(frame(frames.PING, 0, 0, PING_DRAIN))

    def check(self, now: float) -> None:
        """Close the connection if it is dead; called now and then."""
        if self.closing:
            if now - self._since > CLOSING_S:
                self._transport.abort()
        elif self._heard:
            self._since, self._heard, self._asked = now, False, False
        elif not self._greeted:
            if now - self._since > GREETING_S:
                self._transport.abort()
        elif self._asked:
            if now - self._since > self._owner.keepalive_s + PING_S:
                self._transport.abort()
        elif now - self._since > self._owner.keepalive_s:
            self._asked = True
            self.write(frame(frames.PING, 0, 0, PING_ALIVE))

    def close(self) -> None:
        """End at once; what was written still goes out."""
        if not self.closing:
            self._fail(ConnectionFault(frames.NO_ERROR, ""))

    # ---- frames -----------------------------------------------------------------------------------------------------

    def _greet(self, data: bytes) -> int:
        """Where the first frame begins."""
        if data.startswith(frames.PREFACE):
            self._greeted = True
            return len(frames.PREFACE)
        if frames.PREFACE.startswith(data):
            self._rest = data
        else:
            self._transport.write(FOREIGN)
            self._transport.close()
            self.closing = True
        return len(data)

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._expected not in (None, kind):
            raise ConnectionFault(frames.PROTOCOL_ERROR, f"a frame of kind {kind} came, {self._expected} is expected")
        if kind != frames.DATA or len(payload) < SMALL_BYTES:
            self.idle_frames += 1
            if self.idle_frames > IDLE_FRAMES_CAP:
                raise ConnectionFault(frames.ENHANCE_YOUR_CALM, f"{IDLE_FRAMES_CAP} frames came between two answers")
        taker = self._takers.get(kind)
        if taker is None:
            return  # an extension
        try:
            taker(flags, number, payload)
        except StreamFault as fault:
            self._reset(fault.stream, fault.code)

    def _take_data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._uncredited += size
        if self._uncredited > CONNECTION_WINDOW:
            raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "more data came than the connection's window allows")
        if self._uncredited >= CONNECTION_WINDOW // 2:
            self.write(frame(frames.WINDOW_UPDATE, 0, 0, self._uncredited.to_bytes(4, "big")))
            self._uncredited = 0
        stream = self._stream(number, "DATA")
        if flags & frames.PADDED:
            payload = unpadded(payload)
        if stream is None:
            return
        if stream.remote_ended:
            raise StreamFault(number, frames.STREAM_CLOSED)
        stream.uncredited += size
        if stream.uncredited > frames.WINDOW:
            raise StreamFault(number, frames.FLOW_CONTROL_ERROR)
        stream.remote_ended = bool(flags & frames.END_STREAM)
        stream.on_data(payload, stream.remote_ended)

    def _take_headers(self, flags: int, number: int, payload: bytes) -> None:
        if number % 2 == 0:
            raise ConnectionFault(frames.PROTOCOL_ERROR, f"HEADERS on stream {number}, which is no client's")
        if flags & frames.PADDED:
            payload = unpadded(payload)
        if flags & frames.PRIORITIZED:
            if len(payload) < 5:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, "HEADERS are too short")
            payload = payload[5:]
        if flags & frames.END_HEADERS:
            self._begin(number, payload, bool(flags & frames.END_STREAM))
        else:
            self._block = (number, bool(flags & frames.END_STREAM), bytearray(payload))
            self._expected = frames.CONTINUATION

    def _take_continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "CONTINUATION of no header block")
        _, ended, block = self._block
        block += payload
        if len(block) > frames.HEADER_BYTES_CAP:
            raise ConnectionFault(
                frames.ENHANCE_YOUR_CALM, f"a header block is larger than {frames.HEADER_BYTES_CAP} bytes"
            )
        if flags & frames.END_HEADERS:
            self._block = self._expected = None
            self._begin(number, bytes(block), ended)

    def _begin(self, number: int, block: bytes, ended: bool) -> None:
        try:
            head = self._decoder.decode(block)
        except HeaderError as error:
            raise ConnectionFault(frames.COMPRESSION_ERROR, str(error)) from error
        stream = self.streams.get(number)
        if stream is not None:  # trailers, which a gRPC client does not send
            if not ended or stream.remote_ended:
                raise StreamFault(number, frames.PROTOCOL_ERROR)
        elif number <= self._last:
            return  # trailers of a stream that was answered already
        else:
            self._last = number
            if len(self.streams) >= self._owner.streams_cap:
                raise StreamFault(number, frames.REFUSED_STREAM)
            stream = self.streams[number] = self._owner.begin(self, number, head)
        if ended:
            stream.remote_ended = True
            stream.on_data(b"", True)

    def _take_priority(self, flags: int, number: int, payload: bytes) -> None:
        if not number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "PRIORITY of the connection")
        if len(payload) != 5:
            raise StreamFault(number, frames.FRAME_SIZE_ERROR)

    def _take_reset(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "RST_STREAM has 4 bytes")
        stream = self._stream(number, "RST_STREAM")
        if stream is not None:
            self._drop(stream)
            self._end_when_drained()

    def _take_settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "SETTINGS of a stream")
        if flags & frames.ACK:
            if payload:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, "an acknowledgement of frames.SETTINGS has no bytes")
            return
        if len(payload) % 6:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "SETTINGS are multiples of 6 bytes")
        self._expected = None
        for key, value in struct.iter_unpack(">HI", payload):
            if key == frames.INITIAL_WINDOW_SIZE:
                self._change_windows(value)
        self._write_urgent(frame(frames.SETTINGS, frames.ACK, 0))

    def _take_push(self, flags: int, number: int, payload: bytes) -> None:
        raise ConnectionFault(frames.PROTOCOL_ERROR, "a client does not push")

    def _take_ping(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "PING of a stream")
        if len(payload) != 8:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "PING has 8 bytes")
        if not flags & frames.ACK:
            self._write_urgent(frame(frames.PING, frames.ACK, 0, payload))
        elif payload == PING_DRAIN and self._draining:
            self.write(frame(frames.GOAWAY, 0, 0, struct.pack(">II", self._last, frames.NO_ERROR)))
            self._drained = True
            self._end_when_drained()

    def _take_goaway(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "GOAWAY of a stream")
        self._draining = self._drained = True
        self._end_when_drained()

    def _take_window(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE has 4 bytes")
        more = int.from_bytes(payload, "big") & frames.WINDOW_CAP
        if not number:
            self.window += more
            if not more or self.window > frames.WINDOW_CAP:
                raise ConnectionFault(
                    frames.FLOW_CONTROL_ERROR if more else frames.PROTOCOL_ERROR, "WINDOW_UPDATE is out of range"
                )
            self._flush_blocked()
            return
        stream = self._stream(number, "WINDOW_UPDATE")
        if stream is None:
            return
        stream.window += more
        if not more or stream.window > frames.WINDOW_CAP:
            raise StreamFault(number, frames.FLOW_CONTROL_ERROR if more else frames.PROTOCOL_ERROR)
        stream.flush()

    # ---- windows and ends -------------------------------------------------------------------------------------------

    def _stream(self, number: int, kind: str) -> Stream | None:
        """The stream, None for one that ended. Raises ConnectionFault for one that never began."""
        if not number or number % 2 == 0 or number > self._last:
            raise ConnectionFault(frames.PROTOCOL_ERROR, f"{kind} on stream {number}, which was not begun")
        return self.streams.get(number)

    def _change_windows(self, window: int) -> None:
        if window > frames.WINDOW_CAP:
            raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "the initial window is out of range")
        change, self.peer_window = window - self.peer_window, window
        for stream in self.streams.values():
            stream.window += change
            if stream.window > frames.WINDOW_CAP:
                raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "a stream's window is out of range")
        self._flush_blocked()

    def _flush_blocked(self) -> None:
        for stream in list(self.blocked.values()):
            stream.flush()

    def _write_urgent(self, data: bytes) -> None:
        """What must be answered, window or not: a peer that asks and does not read may not fill our memory."""
        if self.paused and self.idle_frames > IDLE_FRAMES_CAP // 10:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "the client asks and does not read")
        self.write(data)

    def _reset(self, number: int, code: int) -> None:
        self.write(frame(frames.RST_STREAM, 0, number, code.to_bytes(4, "big")))
        stream = self.streams.get(number)
        if stream is not None:
            self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        self.streams.pop(stream.id, None)
        self.blocked.pop(stream.id, None)
        if stream.room is not None and not stream.room.done():
            stream.room.cancel()
        stream.on_gone()

    def _end_when_drained(self) -> None:
        if self._drained and not self.streams:
            self.close()

    def _fail(self, fault: ConnectionFault) -> None:
        if fault.code:
            log.debug("a connection is closed: %s", fault.text)
        self.write(frame(frames.GOAWAY, 0, 0, struct.pack(">II", self._last, fault.code) + fault.text.encode()))
        self.closing = True
        self._since = self._loop.time()
        # What the client still sends is read and thrown away: an end with bytes unread would lose it the reason.
        with contextlib.suppress(OSError):
            self._transport.write_eof()
        for stream in list(self.streams.values()):
            self._drop(stream)
