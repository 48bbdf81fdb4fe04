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

import numpy as np

from millhand.errors import MillhandError, OverloadError
from millhand.serving.http.chunks import ChunkedBody
from millhand.serving.http.content import decode_body
from millhand.serving.http.head import Head, HeadTooLarge, read_head
from millhand.serving.http.messages import BodyTooLarge, Request, Response, error_response, json_response

if TYPE_CHECKING:
    from millhand.serving.http.server import HttpServer

HEAD_BYTES_CAP = 16 << 10
KEPT_HEADS_CAP = 256
KEPT_HEAD_BYTES_CAP = 1024
"""A client on a kept connection sends the same head again and again: parsed heads are kept, by their bytes."""
WAITING_BYTES_CAP = 64 << 10
"""Bytes of further requests that are read while one is answered."""
JOINED_BYTES_CAP = 64 << 10
"""A larger body is not copied behind its head, but written after it."""
LINGER_S = 2.0
"""After an error a client may still be sending its body; closing at once would destroy the answer on its way."""
SCRATCH_BYTES = 256 << 10

_HEAD_END = b"\r\n\r\n"


class HttpConnection(asyncio.BufferedProtocol):
    """Made by the server for each accepted socket."""

    def __init__(self, server: HttpServer, refused: bool = False) -> None:
        """`refused`: there are too many connections; this one is told so."""
        self.refused = refused
        self._server = server
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._waiting = bytearray()
        self._head: Request | None = None
        """A request whose body is still coming."""
        self._body: memoryview | None = None
        self._filled = 0
        self._chunks: ChunkedBody | None = None
        self._serving: Request | None = None
        self._cancel: Callable[[], None] | None = None
        self._held = 0
        self._parsing = False
        self._hurried = False
        self._blocked = False
        self._paused = False
        self._closing = False
        self._linger_until_s = 0.0
        self.deadline_s = server.clock() + server.limits.keep_alive_s
        """When the server may close it: idle, or slow to send or to read."""

    # ---- asyncio ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.refused:
            self._refuse(error_response(_too_many()))

    def get_buffer(self, sizehint: int) -> memoryview:
        """A body whose size is known goes where it shall stay, everything else through the server's one buffer."""
        if self._body is not None:
            return self._body[self._filled :]
        return self._server.scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._body is not None:
            self._fill(nbytes)
        elif self._closing:
            self._linger()  # what still comes is not read
        elif self._serving is not None or self._blocked:
            self._waiting += self._server.scratch[:nbytes]
            if len(self._waiting) > WAITING_BYTES_CAP:
                self._paused = True
                self._transport.pause_reading()
        elif self._waiting or self._head is not None or not self._take_whole(nbytes):
            self._waiting += self._server.scratch[:nbytes]
            self._parse()

    def _take_whole(self, nbytes: int) -> bool:
        """The quick way of most requests: one that came as a whole, with a head that was seen before."""
        scratch = self._server.scratch
        end = self._server.scratch_bytes.find(_HEAD_END, 0, min(nbytes, HEAD_BYTES_CAP)) + len(_HEAD_END)
        head = self._server.heads.get(bytes(scratch[:end])) if end >= len(_HEAD_END) else None
        if head is None or head.chunked or end + head.content_length != nbytes:
            return False
        if head.content_length > self._server.limits.body_bytes_cap:
            return False
        self._head = Request(head, time.monotonic_ns())
        self._complete(bytes(scratch[end:nbytes]))
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._server.forget(self)
        self._closing, self._blocked = True, False
        self._leave()

    def eof_received(self) -> bool:
        self._leave()
        return False

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        self._blocked = True
        self.deadline_s = self._server.clock() + self._server.limits.request_timeout_s
        if not self._hold(self._transport.get_write_buffer_size()):
            self.abort()

    def resume_writing(self) -> None:
        self._blocked = False
        self._let_go()
        self._rest()
        self._parse()

    # ---- for the server ---------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """`deadline_s` has passed."""
        if self._serving is not None and not self._blocked:
            return  # the request's own deadline rules
        if (self._head is not None or self._waiting) and not (self._blocked or self._closing):
            self._refuse(json_response({"error": "the request did not come in time (send it faster)"}, 408))
        else:
            self.abort()

    def drain(self) -> None:
        """Answer what is under way, then close."""
        if self._serving is None and self._head is None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._leave()
        self._transport.abort()

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
        if self._waiting[:2] == b"\r\n":  # RFC 9112, section 2.2: an empty line may come before a request
            self._waiting = self._waiting.lstrip(b"\r\n")
        if not self._waiting:
            return False
        end = self._waiting.find(_HEAD_END, 0, HEAD_BYTES_CAP)
        if end < 0:
            if len(self._waiting) >= HEAD_BYTES_CAP:
                raise HeadTooLarge(
                    f"the head is longer than {HEAD_BYTES_CAP} bytes", hint="send fewer or shorter headers"
                )
            self._hurry()
            return False
        data = bytes(self._waiting[: end + len(_HEAD_END)])
        del self._waiting[: len(data)]
        head = self._server.heads.get(data)
        if head is None:
            head = read_head(data)
            if len(data) <= KEPT_HEAD_BYTES_CAP:
                if len(self._server.heads) >= KEPT_HEADS_CAP:
                    self._server.heads.clear()
                self._server.heads[data] = head
        self._head = Request(head, time.monotonic_ns())
        self._hurried = False
        return self._begin_body(head)

    def _begin_body(self, head: Head) -> bool:
        cap, size = self._server.limits.body_bytes_cap, head.content_length
        if head.chunked:
            self._chunks = ChunkedBody(cap)
        elif size > cap:
            raise BodyTooLarge(cap)
        elif size > len(self._waiting):
            # Uninitialised memory: pages are taken as bytes really come, whatever size the head claims.
            self._body = np.empty(size, dtype=np.uint8).data
            self._filled = len(self._waiting)
            self._body[: self._filled] = self._waiting
            self._waiting.clear()
            self._hurry()
            if not self._hold(self._filled):
                raise _full()
        if head.headers.get(b"expect", b"").lower() == b"100-continue" and (self._chunks or self._body is not None):
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._body is None

    def _fill(self, nbytes: int) -> None:
        """More of a body whose length is known is there."""
        body = self._body
        assert body is not None
        self._filled += nbytes
        if not self._hold(nbytes):
            self._refuse(error_response(_full()))
        elif self._filled == len(body):
            self._body = None
            self._complete(body)
            self._parse()

    def _read_body(self) -> bool:
        """Take a body that waits as a whole, or the chunks that have come. False: more must come."""
        assert self._head is not None
        if self._chunks is None:
            size = self._head.head.content_length
            body = bytes(self._waiting[:size])
            del self._waiting[:size]
            self._complete(body)
            return True
        before = len(self._chunks.body)
        complete = self._chunks.feed(self._waiting)
        if not self._hold(len(self._chunks.body) - before):
            raise _full()
        if not complete:
            self._hurry()
            return False
        chunks, self._chunks = self._chunks, None
        self._complete(memoryview(chunks.body))
        return True

    def _complete(self, body: bytes | memoryview) -> None:
        request, self._head = self._head, None
        assert request is not None
        self._hurried = False
        self._serving = request
        request.body = body
        encoding = request.head.headers.get(b"content-encoding")
        if encoding is not None:
            try:
                request.body = decode_body(encoding, body, self._server.limits.body_bytes_cap)
                if not self._hold(len(request.body)):
                    raise _full()
            except MillhandError as error:
                self._respond(request, error_response(error))
                return
        cancel = self._server.handle(request, functools.partial(self._respond, request))
        if self._serving is request:
            self._cancel = cancel

    def _hurry(self) -> None:
        """A head or a body has begun: the rest of it must come in time, however many pieces it comes in."""
        if not self._hurried:
            self._hurried = True
            self.deadline_s = self._server.clock() + self._server.limits.request_timeout_s

    def _hold(self, nbytes: int) -> bool:
        """Count memory that this connection takes; False where all connections together take too much."""
        self._held += nbytes
        return self._server.hold(nbytes)

    def _let_go(self) -> None:
        """No request takes memory any more; an answer that waits to be read does."""
        if self._held or self._blocked:
            held = self._transport.get_write_buffer_size() if self._blocked else 0
            self._server.hold(held - self._held)
            self._held = held

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _respond(self, request: Request, response: Response) -> None:
        if self._serving is not request:
            return  # the client has left
        self._serving = self._cancel = None
        keep_alive = request.head.keep_alive and not self._server.draining
        self._write(request, response, keep_alive)
        self._let_go()
        if not keep_alive:
            self._close()
            return
        self._rest()
        if self._waiting:
            self._parse()

    def _refuse(self, response: Response) -> None:
        """Answer what is no request that could be served; the connection cannot go on after it."""
        request, self._head = self._head, None
        self._body = self._chunks = None
        self._write(request, response, keep_alive=False)
        self._let_go()
        self._close()

    def _write(self, request: Request | None, response: Response, keep_alive: bool) -> None:
        head, body = response.encode(request, keep_alive)
        if len(body) <= JOINED_BYTES_CAP:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        self._server.count(request, response)

    def _rest(self) -> None:
        """Wait for the next request, or for the client to close."""
        if self._blocked:
            return  # until it has read its answer
        if self._closing:
            self._linger()
        else:
            self.deadline_s = self._server.clock() + self._server.limits.keep_alive_s
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def _close(self) -> None:
        self._closing = True
        self._waiting.clear()
        self._transport.write_eof()
        self._linger_until_s = self._server.clock() + self._server.limits.request_timeout_s
        self._rest()

    def _linger(self) -> None:
        if not self._blocked:
            self.deadline_s = min(self._server.clock() + LINGER_S, self._linger_until_s)

    def _leave(self) -> None:
        """The client has left: its request is cancelled."""
        request = self._serving or self._head
        self._serving = self._head = self._body = self._chunks = None
        self._waiting.clear()
        self._let_go()
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()
        if request is not None:
            self._server.count_left(request)


def _too_many() -> OverloadError:
    return OverloadError("too many connections", hint="come again later, or raise [http] connections_cap")


def _full() -> OverloadError:
    return OverloadError("too much is being received at once", hint="send it again")
