"""A gRPC call on an HTTP/2 stream: its messages, its deadline, its end.

Every call ends in exactly one of: an answer, an error's trailers, or the client's leaving. It is counted then.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from millhand.errors import DeadlineError, InputError, MillhandError
from millhand.serving.front_metrics import GRPC_HANDLED, GRPC_SECONDS
from millhand.serving.grpc.hpack import encode
from millhand.serving.grpc.status import Code, Refusal, code_of, trailers_of
from millhand.serving.grpc.stream import Stream
from millhand.serving.tracing import RequestTrace

if TYPE_CHECKING:
    from millhand.serving.grpc.connection import Connection
    from millhand.serving.grpc.server import Server

log = logging.getLogger("millhand.grpc")

PREFIX_BYTES = 5
RECEIVE_S = 60.0
"""A request whose message has not come whole after so long is ended, if its deadline does not end it before."""
HELD_MESSAGES = 4
"""Messages that come in pieces may hold so many times the largest message's size, all connections together."""
WINDOW_BITS = {"gzip": 31, "deflate": 15}
FIRST = (
    (":status", "200"),
    ("content-type", "application/grpc"),
    ("grpc-accept-encoding", "identity,deflate,gzip"),
)
ANSWER_HEAD = encode(*FIRST)
ANSWER_OK = encode(("grpc-status", "0"))

Unary = Callable[["Call", bytes], Awaitable[bytes]]
CallOff = Callable[[], object]
Starting = Callable[["Call", bytes], CallOff]
Streaming = Callable[["Call"], Awaitable[None]]


@dataclass(frozen=True)
class Method:
    """What answers a path: one of

    `unary`: message in, message out; `starting`: begins with a message, answers by `Call.reply`, and returns what calls
    it off; `streaming`: reads and writes the call.
    """

    service: str
    name: str
    unary: Unary | None = None
    starting: Starting | None = None
    streaming: Streaming | None = None

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"

    @cached_property
    def labels(self) -> dict[str, Any]:
        """The labels of its metrics."""
        kind = "unary" if self.streaming is None else "bidi_stream"
        return {"grpc_type": kind, "grpc_service": self.service, "grpc_method": self.name}


UNKNOWN = Method("unknown", "unknown")


@dataclass(frozen=True)
class Head:
    """What a header block asks for."""

    method: Method
    metadata: dict[str, str]
    timeout_ns: int = 0
    """0 for none."""
    encoding: str = "identity"
    refusal: MillhandError | None = None


class Call(Stream):
    """One gRPC call."""

    __slots__ = (
        "_begun",
        "_buffer",
        "_cancel",
        "_held",
        "_inbox",
        "_inference",
        "_over",
        "_parts",
        "_sent_bytes",
        "_server",
        "_size",
        "_started_ns",
        "_waiter",
        "deadline_ns",
        "head",
    )  # fmt: skip

    def __init__(self, server: Server, connection: Connection, number: int, head: Head) -> None:
        super().__init__(connection, number)
        self.head = head
        self._server = server
        self._started_ns = time.monotonic_ns()
        self.deadline_ns = self._started_ns + head.timeout_ns if head.timeout_ns else 0
        """CLOCK_MONOTONIC; 0 where the client set none."""
        self._begun = False
        self._over = False
        self._parts: list[bytes] = []
        self._size = 0
        self._held = 0
        self._buffer = bytearray()
        self._inbox: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._cancel: CallOff | None = None
        self._inference: dict[str, Any] = {}
        self._sent_bytes = 0
        if head.method.streaming is not None and head.refusal is None:
            self._cancel = server.loop.create_task(self._stream(head.method.streaming)).cancel

    @property
    def remaining_ms(self) -> float | None:
        """Time until the client's deadline, None where it set none. Raises DeadlineError once it has passed."""
        if not self.deadline_ns:
            return None
        left = (self.deadline_ns - time.monotonic_ns()) / 1e6
        if left <= 0:
            raise _late()
        return left

    # ---- what the client sends --------------------------------------------------------------------------------------

    def on_data(self, chunk: bytes, ended: bool) -> None:
        if self._over:
            return
        try:
            if self.head.refusal is not None:
                raise self.head.refusal
            if self.head.method.streaming is not None:
                self._take_messages(chunk, ended)
            else:
                self._take_message(chunk, ended)
        except Exception as error:
            self.fail(error)

    def on_gone(self) -> None:
        if not self._over:
            self._finish(Code.CANCELED)
            if self._cancel is not None:
                self._cancel()

    def check(self, now_ns: int) -> None:
        """End the call if it is late; called now and then."""
        waits = self._cancel is None and now_ns - self._started_ns > RECEIVE_S * 1e9
        if not self._over and (waits or 0 < self.deadline_ns < now_ns):
            self.fail(_late())

    def _take_message(self, chunk: bytes, ended: bool) -> None:
        self._size += len(chunk)
        if len(chunk) >= PREFIX_BYTES and len(chunk) == self._size:
            self._check_size(int.from_bytes(chunk[1:PREFIX_BYTES], "big"))
        if not ended or self._parts:
            self._parts.append(chunk)
            self._hold(len(chunk))
            if not ended:
                self._check_size(self._size - PREFIX_BYTES)
                self.credit()
                return
            chunk = b"".join(self._parts)
            self._parts.clear()
        if len(chunk) < PREFIX_BYTES or len(chunk) - PREFIX_BYTES != int.from_bytes(chunk[1:PREFIX_BYTES], "big"):
            raise InputError(
                f"the call's {len(chunk)} bytes are not one message", hint="send a 5-byte prefix and one message"
            )
        message = chunk[PREFIX_BYTES:]
        if chunk[0]:
            message = self._inflate(message)
        method = self.head.method
        if method.starting is not None:
            self._cancel = method.starting(self, message)
        elif method.unary is not None:
            self.answer_later(method.unary, self, message)

    def _take_messages(self, chunk: bytes, ended: bool) -> None:
        buffer = self._buffer
        buffer += chunk
        self._hold(len(chunk))
        while len(buffer) >= PREFIX_BYTES:
            size = int.from_bytes(buffer[1:PREFIX_BYTES], "big")
            self._check_size(size)
            end = PREFIX_BYTES + size
            if len(buffer) < end:
                break
            message = bytes(buffer[PREFIX_BYTES:end])
            self._inbox.append(self._inflate(message) if buffer[0] else message)
            del buffer[:end]
        if ended and buffer:
            raise InputError(f"the stream ends inside a message, after {len(buffer)} bytes", hint="mend the client")
        if not self._inbox:
            self.credit()  # a message of more than the window must be able to come whole
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def messages(self) -> AsyncIterator[bytes]:
        """The messages of a stream as they come. While nobody asks for more, the client may send one window."""
        while True:
            while self._inbox:
                message = self._inbox.popleft()
                self._hold(-PREFIX_BYTES - len(message))
                yield message
            if self.remote_ended:
                return
            self.credit()
            self._waiter = self._server.loop.create_future()
            await self._waiter

    async def write(self, message: bytes) -> None:
        """Send one message of a stream and wait until it is on its way."""
        if not self._begun:
            self._begun = True
            self.begin(ANSWER_HEAD)
        self._sent_bytes += len(message)
        self.send(_framed(message))
        await self.drained()

    # ---- ends -------------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """End the call with an error, unless it has ended."""
        if self._over:
            return
        if not isinstance(error, MillhandError):
            log.error("a call of %s failed", self.head.method.path, exc_info=error)
        self._finish(code_of(error))
        if self._cancel is not None:
            self._cancel()
        trailers = trailers_of(error)
        self.end(encode(*trailers) if self._begun else encode(*FIRST, *trailers))

    def reply(self, message: bytes) -> None:
        """End the call with its one message, unless it has ended."""
        if not self._over:
            self._sent_bytes = len(message)
            self._finish(Code.OK)
            self.answer(ANSWER_HEAD, _framed(message), ANSWER_OK)

    def answer_later(self, work: Callable[..., Awaitable[bytes]], *arguments: Any) -> CallOff:
        """End the call with what `work` gives; returns what calls that off."""
        task = self._server.loop.create_task(self._run(work, arguments))
        self._cancel = task.cancel
        return task.cancel

    def asks_for(self, model: str) -> None:
        """Keep which model the call is about."""
        if self._server.observation.wanted:
            self._inference = {"model": model}

    def note(self, model: str, answer: Any, sent_ns: int) -> None:
        """Keep what a trace tells of an inference; `answer` has its version and times."""
        if self._server.observation.wanted:
            self._inference = {
                "model": model,
                "version": str(answer.version),
                "infer_ns": sent_ns,
                "queue_ns": answer.queue_ns,
                "compute_ns": answer.compute_ns,
            }

    async def _run(self, work: Callable[..., Awaitable[bytes]], arguments: tuple[Any, ...]) -> None:
        try:
            reply = await work(*arguments)
        except Exception as error:
            self._cancel = None
            self.fail(error)
        else:
            self.reply(reply)

    async def _stream(self, handler: Streaming) -> None:
        try:
            await handler(self)
        except Exception as error:
            self._cancel = None
            self.fail(error)
        else:
            if not self._over:
                self._finish(Code.OK)
                self.end(ANSWER_OK if self._begun else encode(*FIRST, ("grpc-status", "0")))

    def _finish(self, code: Code) -> None:
        self._over = True
        self._hold(-self._held)
        self._parts.clear()
        self._inbox.clear()
        labels = self.head.method.labels
        GRPC_HANDLED.inc(**labels, grpc_code=code.label)
        duration_ns = time.monotonic_ns() - self._started_ns
        GRPC_SECONDS.observe(duration_ns / 1e9, **labels)
        if self._server.observation.wanted:
            self._server.observation.answered(self._trace(code, duration_ns), self._sent_bytes)

    def _trace(self, code: Code, duration_ns: int) -> RequestTrace:
        end_ns = time.time_ns()
        return RequestTrace(
            method=self.head.method.path[1:],
            path=self.head.metadata.get(":path", ""),
            status=int(code),
            start_ns=end_ns - duration_ns,
            end_ns=end_ns,
            grpc=True,
            traceparent=self.head.metadata.get("traceparent", ""),
            **self._inference,
        )

    # ---- limits -----------------------------------------------------------------------------------------------------

    def _check_size(self, size: int) -> None:
        if size > self._server.message_bytes_cap:
            raise Refusal(
                Code.RESOURCE_EXHAUSTED,
                f"a message is larger than {self._server.message_bytes_cap} bytes",
                hint="send less at once, or raise [grpc] message_bytes_cap",
            )

    def _hold(self, size: int) -> None:
        """Account for bytes that wait here. Raises Refusal where all calls together hold too many."""
        size = max(size, -self._held)
        self._held += size
        self._server.held_bytes += size
        if size > 0 and self._server.held_bytes > HELD_MESSAGES * self._server.message_bytes_cap:
            raise Refusal(
                Code.UNAVAILABLE,
                f"messages under way hold {self._server.held_bytes} bytes already",
                hint="send the request again later, or fewer large ones at once",
            )

    def _inflate(self, message: bytes) -> bytes:
        bits = WINDOW_BITS.get(self.head.encoding)
        if bits is None:
            raise InputError("a message is marked as compressed, but the call names no grpc-encoding")
        cap = self._server.message_bytes_cap
        try:
            inflated = zlib.decompressobj(bits).decompress(message, cap + 1)
        except zlib.error as error:
            raise InputError(f"a message is not {self.head.encoding}: {error}", hint="mend the client") from error
        self._check_size(len(inflated))
        return inflated


def _framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def _late() -> DeadlineError:
    return DeadlineError("the call's deadline passed", hint="give it more time, or send less at once")
