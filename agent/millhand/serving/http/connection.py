"""HTTP/1.1 on one connection: heads by httptools (llhttp), bodies by length or in chunks, one request at a time.

A head is cut off at its blank line and parsed by itself; a body whose length is known is then received straight into
memory of that size. Pipelined requests wait in a bounded buffer. A connection owns no timer: the server looks at
`deadline_s` once in a while.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import httptools
import numpy as np

from millhand.errors import InputError, MillhandError
from millhand.serving.http.chunks import ChunkedBody
from millhand.serving.http.content import decode_body
from millhand.serving.http.messages import BodyTooLarge, Head, Request, Response, error_response, json_response

if TYPE_CHECKING:
    from millhand.serving.http.server import HttpServer

HEAD_BYTES_CAP = 16 << 10
HEADERS_CAP = 100
KEPT_HEADS_CAP = 256
KEPT_HEAD_BYTES_CAP = 1024
"""A client on a kept connection sends the same head again and again: parsed heads are kept, by their bytes."""
WAITING_BYTES_CAP = 64 << 10
"""Bytes of further requests that are read while one is answered."""
LINGER_S = 2.0
"""After an error a client may still be sending its body; closing at once would destroy the answer on its way."""
SCRATCH_BYTES = 256 << 10

_HEAD_END = b"\r\n\r\n"


class HttpConnection(asyncio.BufferedProtocol):
    """Made by the server for each accepted socket."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._waiting = bytearray()
        self._head: Request | None = None
        self._body: memoryview | None = None
        self._filled = 0
        self._chunks: ChunkedBody | None = None
        self._serving: Request | None = None
        self._cancel: Callable[[], None] | None = None
        self._parsing = False
        self._blocked = False
        self._paused = False
        self._closing = False
        self.deadline_s = server.clock() + server.limits.keep_alive_s
        """When the server may close it: idle, or slow to send or to read."""

    # ---- asyncio ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """A body whose size is known goes where it shall stay, everything else through the server's one buffer."""
        if self._body is not None:
            return self._body[self._filled :]
        return self._server.scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._body is not None:
            self._filled += nbytes
            if self._filled == len(self._body):
                body, self._body = self._body, None
                self._complete(body)
                self._parse()
            return
        if self._closing:
            return  # lingering: what still comes is not read
        if not self._waiting and self._serving is None and self._head is None and self._take_whole(nbytes):
            return
        self._waiting += self._server.scratch[:nbytes]
        if self._serving is None:
            self._parse()
        elif len(self._waiting) > WAITING_BYTES_CAP:
            self._paused = True
            self._transport.pause_reading()

    def _take_whole(self, nbytes: int) -> bool:
        """The quick way of most requests: one that came as a whole, with a head that was seen before."""
        scratch = self._server.scratch
        end = self._server.scratch_bytes.find(_HEAD_END, 0, min(nbytes, HEAD_BYTES_CAP)) + len(_HEAD_END)
        head = self._server.heads.get(bytes(scratch[:end])) if end >= len(_HEAD_END) else None
        if head is None or head.chunked or end + head.content_length != nbytes or self._blocked:
            return False
        self._head = Request(head, time.monotonic_ns())
        self._complete(bytes(scratch[end:nbytes]))
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._server.forget(self)
        self._closing = True
        self._leave()

    def eof_received(self) -> bool:
        self._leave()
        return False

    def pause_writing(self) -> None:
        self._blocked = True
        self.deadline_s = self._server.clock() + self._server.limits.request_timeout_s

    def resume_writing(self) -> None:
        self._blocked = False
        self._rest()
        self._parse()

    # ---- for the server ---------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """`deadline_s` has passed."""
        if self._serving is not None and not self._blocked:
            return  # the request's own deadline rules
        if self._head is not None or (self._waiting and not self._closing):
            self._refuse(Response(b'{"error":"the request did not come in time (send it faster)"}', 408))
        else:
            self._transport.abort()

    def drain(self) -> None:
        """Answer what is under way, then close."""
        if self._serving is None and self._head is None:
            self._transport.close()

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _parse(self) -> None:
        """Take requests out of what waits, until one is under way or more must come."""
        if self._parsing:
            return
        self._parsing = True
        try:
            while not (self._serving or self._blocked or self._closing or self._body is not None):
                if not (self._read_body() if self._head is not None else self._read_head()):
                    break
        except MillhandError as error:
            self._refuse(error_response(error))
        finally:
            self._parsing = False

    def _read_head(self) -> bool:
        if not self._waiting:
            return False
        end = self._waiting.find(_HEAD_END, 0, HEAD_BYTES_CAP)
        if end < 0:
            if len(self._waiting) >= HEAD_BYTES_CAP:
                text = f"the head is longer than {HEAD_BYTES_CAP} bytes (send fewer or shorter headers)"
                self._refuse(json_response({"error": text}, 431))
            else:
                self._hurry()
            return False
        data = bytes(self._waiting[: end + len(_HEAD_END)])
        del self._waiting[: len(data)]
        head = self._server.heads.get(data)
        if head is None:
            head = read_head(data)
            if len(head.headers) > HEADERS_CAP:
                self._refuse(json_response({"error": f"more than {HEADERS_CAP} headers (send fewer)"}, 431))
                return False
            if len(data) <= KEPT_HEAD_BYTES_CAP:
                if len(self._server.heads) >= KEPT_HEADS_CAP:
                    self._server.heads.clear()
                self._server.heads[data] = head
        self._head = Request(head, time.monotonic_ns())
        return self._begin_body(head)

    def _begin_body(self, head: Head) -> bool:
        cap, size = self._server.limits.body_bytes_cap, head.content_length
        if head.chunked:
            self._chunks = ChunkedBody(cap)
        elif size > cap:
            raise BodyTooLarge(
                f"the body is larger than {cap} bytes", hint="send less at once, or raise [http] body_bytes_cap"
            )
        elif size > len(self._waiting):
            # Uninitialised memory: pages are taken as bytes really come, whatever size the head claims.
            self._body = np.empty(size, dtype=np.uint8).data
            self._filled = len(self._waiting)
            self._body[: self._filled] = self._waiting
            self._waiting.clear()
        if head.headers.get(b"expect", b"").lower() == b"100-continue" and (self._chunks or self._body is not None):
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._body is not None:
            self._hurry()
        return self._body is None

    def _read_body(self) -> bool:
        """Take a body that waits as a whole, or the chunks that have come. False: more must come."""
        request = self._head
        assert request is not None
        if self._chunks is None:
            size = request.head.content_length
            body = bytes(self._waiting[:size])
            del self._waiting[:size]
            self._complete(body)
            return True
        if not self._chunks.feed(self._waiting):
            self._hurry()
            return False
        body, self._chunks = bytes(self._chunks.body), None
        self._complete(body)
        return True

    def _complete(self, body: bytes | memoryview) -> None:
        request, self._head = self._head, None
        assert request is not None
        self._serving = request
        request.body = body
        encoding = request.head.headers.get(b"content-encoding")
        if encoding is not None:
            try:
                request.body = decode_body(encoding, body, self._server.limits.body_bytes_cap)
            except MillhandError as error:
                self._respond(request, error_response(error))
                return
        cancel = self._server.handle(request, functools.partial(self._respond, request))
        if self._serving is request:
            self._cancel = cancel

    def _hurry(self) -> None:
        """A request has begun: the rest of it must come in time."""
        now_s = self._server.clock()
        limit_s = now_s + self._server.limits.request_timeout_s
        if self._head is None and self.deadline_s < limit_s and len(self._waiting) > 1:
            return  # the clock runs since its first byte
        self.deadline_s = limit_s

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _respond(self, request: Request, response: Response) -> None:
        if self._serving is not request:
            return  # the client has left
        self._serving = self._cancel = None
        keep_alive = request.head.keep_alive and not self._server.draining
        self._transport.write(response.encode(request, keep_alive))
        self._server.count(request, response)
        if not keep_alive:
            self._close()
            return
        self._rest()
        if self._waiting:
            self._parse()

    def _rest(self) -> None:
        self.deadline_s = self._server.clock() + self._server.limits.keep_alive_s
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def _refuse(self, response: Response) -> None:
        """Answer what is no request that could be served; the connection cannot go on after it."""
        request, self._head = self._head, None
        self._body = self._chunks = None
        self._transport.write(response.encode(request, keep_alive=False))
        self._server.count(request, response)
        self._close()

    def _close(self) -> None:
        self._closing = True
        self._waiting.clear()
        if self._transport.can_write_eof():
            self._transport.write_eof()
            self.deadline_s = self._server.clock() + LINGER_S
        else:
            self._transport.close()

    def _leave(self) -> None:
        """The client has left: its request is cancelled."""
        request, self._serving = self._serving, None
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()
        if request is not None:
            self._server.count_left(request)


class _HeadCallbacks:
    """Callbacks for httptools."""

    __slots__ = ("headers", "twice", "url")

    def __init__(self) -> None:
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.twice = b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in self.headers:
            if name in {b"content-length", b"transfer-encoding", b"host", b"inference-header-content-length"}:
                self.twice = name
            value = self.headers[name] + b", " + value
        self.headers[name] = value


def read_head(data: bytes) -> Head:
    """Parse a head with its blank line. Raises InputError for what is none."""
    head = _HeadCallbacks()
    parser = httptools.HttpRequestParser(head)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # an offer that may be declined
    except httptools.HttpParserError as error:
        raise InputError(f"this is no HTTP/1.1 request: {error}", hint="speak HTTP/1.1") from error
    if head.twice:
        raise InputError(f"header '{head.twice.decode()}' is given twice", hint="give it once")
    if b"transfer-encoding" in head.headers:
        if b"content-length" in head.headers:
            raise InputError("the request has both content-length and transfer-encoding", hint="give one of them")
        if head.headers[b"transfer-encoding"].lower() != b"chunked":
            raise InputError("transfer-encoding must be 'chunked'", hint="use it, or give content-length")
    return Head(parser.get_method().decode(), head.url, head.headers, parser.should_keep_alive())
