"""A worker's client for asyncio. It speaks serving/protocol.py and owns its ring's slots."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from millhand.errors import MillhandError, OverloadError, WorkerError
from millhand.serving import protocol
from millhand.serving.busy_poll import BusyPoll
from millhand.serving.exchange import Answer, Exchange, deadline_ns, late, lost, read_answer
from millhand.serving.tensors import Tensors

__all__ = ["Answer", "WorkerClient", "deadline_ns"]

SWEEP_LEAST_S = 0.001
"""Deadlines closer together than this are looked at together."""
TOGETHER_BYTES_CAP = 64 << 10
"""Frames beyond so many bytes do not wait for others."""
PARTS_CAP = 512
"""Buffers of one sendmsg; Linux takes 1024."""
UNSENT_BYTES_CAP = 256 << 20
"""What waits to be sent to a worker that does not read; it will be found to hang."""

Outcome = "tuple[protocol.Result, memoryview] | Exception"
"""A result and the memory where its tensors lie, valid only while the callback runs; or what went wrong."""


class _Pending:
    __slots__ = ("deadline_ns", "done", "kind", "model", "slot")

    def __init__(
        self, kind: int, done: Callable[[Any], None] | None, slot: int = -1, model: str = "", deadline: int = 0
    ) -> None:
        self.kind = kind
        self.done = done
        """None once the caller knows: it left, or its deadline passed."""
        self.slot = slot
        self.model = model
        self.deadline_ns = deadline


class WorkerClient:
    """For asyncio: many requests in flight on one connection, on the loop's own reader callback (no streams)."""

    def __init__(
        self, connection: socket.socket, name: str, slots: int = 16, slot_bytes: int = 1 << 20, busy_poll_us: int = 0
    ) -> None:
        """Take over a connected stream socket. Call `start` next. `busy_poll_us`: see busy_poll.py; 0 is never."""
        connection.setblocking(False)
        self.name = name
        self.on_close: Callable[[], None] | None = None
        """Called once when the connection is lost or closed."""
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._exchange = Exchange(slots, slot_bytes)
        self._reader = protocol.FrameReader()
        self._pending: dict[int, _Pending] = {}
        self._next = 1
        self._unsent = bytearray()
        self._outbox: list[Any] = []
        self._outbox_bytes = 0
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_ns = 0
        """The deadline that the sweep waits for."""
        self._busy_poll = BusyPoll(self._loop, busy_poll_us) if busy_poll_us else None
        self.closed = False

    @classmethod
    async def connect(
        cls, path: Path, name: str, slots: int = 16, slot_bytes: int = 1 << 20, busy_poll_us: int = 0
    ) -> WorkerClient:
        """Connect to a worker's socket. Raises WorkerError where none answers."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.connect(os.fspath(path))
        except OSError as error:
            connection.close()
            raise WorkerError(f"worker '{name}' does not answer on '{path}'", hint="send the request again") from error
        client = cls(connection, name, slots, slot_bytes, busy_poll_us)
        await client.start()
        return client

    async def start(self, timeout_s: float = 10.0) -> int:
        """Exchange hellos and return the worker's process id. Raises WorkerError or ProtocolError."""
        self._loop.add_reader(self._socket, self._on_readable)
        answered = self._loop.create_future()
        self._pending[0] = _Pending(protocol.HELLO, _settler(answered))
        try:
            self._exchange.hello(self._socket)
            async with asyncio.timeout(timeout_s):
                pid: int = await answered
        except TimeoutError as error:
            self.close()
            raise WorkerError(f"worker '{self.name}' did not say hello", hint="look at its log") from error
        except OSError as error:
            self.close()
            raise lost(self.name) from error
        except BaseException:
            self.close()
            raise
        return pid

    @property
    def in_flight(self) -> int:
        """Requests without an answer yet, those included whose caller has left."""
        return len(self._pending)

    async def infer(
        self,
        model: str,
        tensors: Tensors,
        *,
        version: int = 0,
        deadline: int = 0,
        priority: int = 0,
        wanted: tuple[str, ...] = (),
    ) -> Answer:
        """Run one request. `deadline` is CLOCK_MONOTONIC nanoseconds, 0 for none.

        A cancelled call cancels the request in the worker. Raises InputError, ModelError, OverloadError,
        DeadlineError, or WorkerError (retriable) where the worker dies.
        """
        answered = self._loop.create_future()
        slot = self.lease()
        try:
            placed, payload, size = protocol.place(tensors, self.slot(slot))
            infer = protocol.Infer(model, version, priority, size >= 0, placed, wanted)
            request = self.submit(infer, deadline, slot, payload, _settler(answered))
        except BaseException:
            self.release(slot)
            raise
        try:
            answer: Answer = await answered
            return answer
        except asyncio.CancelledError:
            self.cancel(request)
            raise

    # ---- for callers that lay the tensors out themselves -------------------------------------------------------------

    def lease(self) -> int:
        """A free slot of the ring, -1 where none is free. It is given back by `release`, or by `submit`'s answer."""
        ring = self._exchange.ring
        return ring.lease() if ring else -1

    def release(self, slot: int) -> None:
        """Give back a slot that was not submitted."""
        self._exchange.release(slot)

    def slot(self, number: int) -> memoryview | None:
        """The memory of a leased slot; None for -1."""
        ring = self._exchange.ring
        return ring.slot(number) if ring and number >= 0 else None

    def slot_bytes(self, number: int) -> int:
        """The size of a leased slot; 0 for -1."""
        ring = self._exchange.ring
        return ring.slot_bytes if ring and number >= 0 else 0

    def submit(
        self, infer: protocol.Infer, deadline: int, slot: int, payload: Sequence[Any], done: Callable[[Any], None]
    ) -> int:
        """Send a request whose tensors lie in the leased `slot`, or in `payload`. Returns its id for `cancel`.

        `done` is called once with an Outcome; errors as those that `infer` raises. From here on the slot is the
        client's, which frees it after `done`. Raises InputError for a request that is too large, OverloadError where
        the worker does not read, WorkerError where the connection is closed: then it still is the caller's.
        """
        if self.closed:
            raise lost(self.name)
        if len(self._unsent) > UNSENT_BYTES_CAP:
            raise OverloadError(f"worker '{self.name}' takes no more requests", hint="send the request again")
        request = self._next
        size = sum([memoryview(part).nbytes for part in payload]) if payload else 0
        parts = protocol.infer_frame(request, infer, deadline, slot, payload, size)
        self._next += 1
        self._pending[request] = _Pending(protocol.RESULT, done, slot, infer.model, deadline)
        if deadline and (self._sweep is None or deadline < self._sweep_ns):
            self._sweep_at(deadline)
        self._send(parts)
        if self._busy_poll is not None and len(self._pending) == 1:
            self._busy_poll.sent()
        return request

    def cancel(self, request: int) -> None:
        """The caller has left: forget its request. The slot stays leased until the worker has answered."""
        pending = self._pending.get(request)
        if pending is not None and pending.done is not None:
            pending.done = None
            self._send(protocol.frame(protocol.CANCEL, request, None))

    async def call(self, name: str, /, timeout_s: float = 10.0, **arguments: Any) -> Any:
        """Make a control call. Raises what the worker raised, or WorkerError where it does not answer in time."""
        if self.closed:
            raise lost(self.name)
        answered = self._loop.create_future()
        request = self._next
        self._next += 1
        self._pending[request] = _Pending(protocol.REPLY, _settler(answered))
        self._send(protocol.frame(protocol.CALL, request, protocol.Call(name, arguments)))
        try:
            async with asyncio.timeout(timeout_s):
                return await answered
        except TimeoutError as error:
            raise WorkerError(f"worker '{self.name}' did not answer '{name}' within {timeout_s:g} s") from error
        finally:
            if answered.cancelled():
                self._pending.pop(request, None)

    def close(self) -> None:
        """Close the connection; requests in flight get a WorkerError."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        if self._sweep is not None:
            self._sweep.cancel()
        pending, self._pending = self._pending, {}
        for entry in pending.values():
            _tell(entry, lost(self.name))
        self._exchange.ring = None
        if self.on_close is not None:
            self.on_close()

    def _sweep_at(self, deadline: int) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        delay_s = max((deadline - time.monotonic_ns()) / 1e9, SWEEP_LEAST_S)
        self._sweep, self._sweep_ns = self._loop.call_later(delay_s, self._expire), deadline

    def _expire(self) -> None:
        """Nobody waits beyond a deadline, whatever the worker does: it is told, and its answer comes to nothing."""
        now_ns = time.monotonic_ns()
        self._sweep = None
        for request, pending in list(self._pending.items()):
            if 0 < pending.deadline_ns <= now_ns and pending.done is not None:
                _tell(pending, late(pending.model))
                self._send(protocol.frame(protocol.CANCEL, request, None))
        left = [entry.deadline_ns for entry in self._pending.values() if entry.deadline_ns and entry.done is not None]
        if left and not self.closed:
            self._sweep_at(min([*left, self._sweep_ns] if self._sweep is not None else left))

    def _send(self, parts: list[Any]) -> None:
        """Send now if nothing else is under way, else together with what this turn of the loop still brings."""
        size = sum([memoryview(part).nbytes for part in parts])
        if not self._outbox and (len(self._pending) == 1 or size > TOGETHER_BYTES_CAP):
            self._write(parts)
            return
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox += parts
        self._outbox_bytes += size
        if self._outbox_bytes > TOGETHER_BYTES_CAP:
            self._flush()

    def _flush(self) -> None:
        parts, self._outbox, self._outbox_bytes = self._outbox, [], 0
        if parts:
            self._write(parts)

    def _write(self, parts: list[Any]) -> None:
        if self.closed:
            return
        if len(parts) > PARTS_CAP:
            parts = [b"".join(parts)]
        sent = 0
        if not self._unsent:
            try:
                sent = self._socket.sendmsg(parts)
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
        if sent == len(parts[0]) and len(parts) == 1:
            return
        if sent == sum([memoryview(part).nbytes for part in parts]):
            return
        for part in parts:
            view = memoryview(part).cast("B")
            if sent < len(view):
                self._unsent += view[sent:]
            sent = max(sent - len(view), 0)
        self._loop.add_writer(self._socket, self._on_writable)

    def _on_writable(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        try:
            for frame in self._reader.read(self._socket):
                self._take(frame)
        except BlockingIOError:
            return
        except (EOFError, OSError, ValueError, MillhandError, msgspec.MsgspecError):
            self.close()

    def _take(self, frame: protocol.Frame) -> None:
        pending = self._pending.pop(frame.request, None)
        if pending is None:
            return
        if self._busy_poll is not None and not self._pending:
            self._busy_poll.answered()
        try:
            if pending.done is not None:
                _tell(pending, self._outcome(frame, pending))
        except Exception:
            _tell(pending, lost(self.name))
            raise  # what came is no answer: the connection ends
        finally:
            self._exchange.release(pending.slot)

    def _outcome(self, frame: protocol.Frame, pending: _Pending) -> Any:
        if frame.kind == protocol.ERROR:
            return protocol.error_of(protocol.decode_fault(frame.body))
        if frame.kind != pending.kind:
            raise protocol.ProtocolError(f"the worker answered with a frame of kind {frame.kind}")
        if frame.kind == protocol.RESULT:
            if 0 < pending.deadline_ns < time.monotonic_ns():
                return late(pending.model)
            result = protocol.decode_result(frame.body)
            return result, self._exchange.memory(result, frame.payload, pending.slot)
        if frame.kind == protocol.HELLO:
            return protocol.decode_hello(frame.body).pid
        return protocol.decode_any(frame.body)


def _tell(pending: _Pending, outcome: Any) -> None:
    done, pending.done = pending.done, None
    if done is not None:
        done(outcome)


def _settler(answered: asyncio.Future[Any]) -> Callable[[Any], None]:
    """What puts an outcome into a future; a result's tensors are copied out of their slot."""

    def settle(outcome: Any) -> None:
        if answered.done():
            return  # the caller left
        try:
            if isinstance(outcome, tuple):
                outcome = read_answer(*outcome)
        except MillhandError as error:
            outcome = error
        if isinstance(outcome, Exception):
            answered.set_exception(outcome)
        else:
            answered.set_result(outcome)

    return settle
