"""Clients of a worker: one for asyncio, one that blocks. Both speak serving/protocol.py and own their ring's slots."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from millhand.errors import DeadlineError, MillhandError, WorkerError
from millhand.serving import protocol
from millhand.serving.ring import Ring
from millhand.serving.tensors import Tensors

# The worker drops expired work itself; the client's own timer is for a worker that says nothing at all.
DEADLINE_GRACE_S = 0.02


class Answer(msgspec.Struct, frozen=True):
    """What an inference gave. `rows` is the batch that the request ran in."""

    outputs: dict[str, NDArray[Any]]
    version: int
    queue_ns: int
    compute_ns: int
    rows: int


def deadline_ns(budget_ms: float) -> int:
    """The CLOCK_MONOTONIC time `budget_ms` from now, comparable between the processes of one machine."""
    return time.monotonic_ns() + int(budget_ms * 1e6)


class _Session:
    """What both clients share: the ring, and making and reading frames. Sends and receives nothing."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.ring: Ring | None = None
        self._hello = protocol.Hello(protocol.VERSION, slots, slot_bytes, os.getpid())

    def hello(self, connection: socket.socket) -> None:
        """Send the hello with the ring's descriptor; a new connection takes it in one piece."""
        parts = protocol.frame(protocol.HELLO, 0, self._hello)
        if not self._hello.slots:
            connection.sendmsg(parts)
            return
        self.ring, fd = Ring.create(self._hello.slots, self._hello.slot_bytes)
        try:
            socket.send_fds(connection, parts, [fd])
        finally:
            os.close(fd)

    def infer_frame(
        self,
        request: int,
        target: tuple[str, int],
        tensors: Tensors,
        deadline: int,
        priority: int,
        wanted: tuple[str, ...],
    ) -> tuple[list[Any], int]:
        """The frame's buffers and the leased slot (-1 for none)."""
        slot = self.ring.lease() if self.ring else -1
        try:
            memory = self.ring.slot(slot) if self.ring and slot >= 0 else None
            placed, payload, size = protocol.place(tensors, memory)
            infer = protocol.Infer(*target, deadline, priority, slot, size >= 0, placed, wanted)
            return protocol.frame(protocol.INFER, request, infer, payload, max(size, 0)), slot
        except BaseException:
            self.release(slot)
            raise

    def release(self, slot: int) -> None:
        if self.ring:
            self.ring.release(slot)

    def answer(self, frame: protocol.Frame, slot: int) -> Answer:
        """Read a RESULT; its tensors are copies, so that the slot may be freed."""
        result = protocol.decode_result(frame.body)
        if result.inline:
            outputs = protocol.fetch(result.tensors, frame.payload)
        else:
            if self.ring is None:
                raise protocol.ProtocolError("the worker answered in a ring that does not exist")
            views = protocol.fetch(result.tensors, self.ring.slot(slot))
            outputs = {name: view.copy() for name, view in views.items()}
        return Answer(outputs, result.version, result.queue_ns, result.compute_ns, result.rows)


def _lost(name: str) -> WorkerError:
    return WorkerError(f"the connection to worker '{name}' is lost", hint="send the request again")


def _late(model: str) -> DeadlineError:
    return DeadlineError(
        f"model '{model}' did not answer before the deadline",
        hint="give it more time, or look at 'millhand model show'",
    )


class _Pending:
    __slots__ = ("future", "slot", "timer")

    def __init__(self, future: asyncio.Future[Any], slot: int = -1) -> None:
        self.future = future
        self.slot = slot
        self.timer: asyncio.TimerHandle | None = None


class WorkerClient:
    """For asyncio: many requests in flight on one connection, on the loop's own reader callback (no streams)."""

    def __init__(self, connection: socket.socket, name: str, slots: int = 16, slot_bytes: int = 1 << 20) -> None:
        """Take over a connected stream socket. Call `start` next."""
        connection.setblocking(False)
        self.name = name
        self.on_close: Callable[[], None] | None = None
        """Called once when the connection is lost or closed."""
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._session = _Session(slots, slot_bytes)
        self._reader = protocol.FrameReader()
        self._pending: dict[int, _Pending] = {}
        self._next = 1
        self._unsent = bytearray()
        self.closed = False

    @classmethod
    async def connect(cls, path: Path, name: str, slots: int = 16, slot_bytes: int = 1 << 20) -> WorkerClient:
        """Connect to a worker's socket. Raises WorkerError where none answers."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.connect(os.fspath(path))
        except OSError as error:
            connection.close()
            raise WorkerError(f"worker '{name}' does not answer on '{path}'", hint="send the request again") from error
        client = cls(connection, name, slots, slot_bytes)
        await client.start()
        return client

    async def start(self, timeout_s: float = 10.0) -> int:
        """Exchange hellos and return the worker's process id. Raises WorkerError or ProtocolError."""
        self._loop.add_reader(self._socket, self._on_readable)
        pending = _Pending(self._loop.create_future())
        self._pending[0] = pending
        try:
            self._session.hello(self._socket)
            async with asyncio.timeout(timeout_s):
                pid: int = await pending.future
        except TimeoutError as error:
            self.close()
            raise WorkerError(f"worker '{self.name}' did not say hello", hint="look at its log") from error
        except OSError as error:
            self.close()
            raise _lost(self.name) from error
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
        if self.closed:
            raise _lost(self.name)
        request = self._take_id()
        parts, slot = self._session.infer_frame(request, (model, version), tensors, deadline, priority, wanted)
        pending = _Pending(self._loop.create_future(), slot)
        self._pending[request] = pending
        if deadline:
            delay_s = (deadline - time.monotonic_ns()) / 1e9 + DEADLINE_GRACE_S
            pending.timer = self._loop.call_later(delay_s, self._expire, request, model)
        self._send(parts)
        return await self._wait(request, pending)

    async def call(self, name: str, /, timeout_s: float = 10.0, **arguments: Any) -> Any:
        """Make a control call. Raises what the worker raised, or WorkerError where it does not answer in time."""
        if self.closed:
            raise _lost(self.name)
        request = self._take_id()
        pending = _Pending(self._loop.create_future())
        self._pending[request] = pending
        self._send(protocol.frame(protocol.CALL, request, protocol.Call(name, arguments)))
        try:
            async with asyncio.timeout(timeout_s):
                return await pending.future
        except TimeoutError as error:
            raise WorkerError(f"worker '{self.name}' did not answer '{name}' within {timeout_s:g} s") from error
        finally:
            if not self.closed and pending.future.cancelled():
                self._pending.pop(request, None)

    def close(self) -> None:
        """Close the connection; requests in flight get a WorkerError."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for pending in self._pending.values():
            self._settle(pending, _lost(self.name))
        self._pending.clear()
        self._session.ring = None
        if self.on_close is not None:
            self.on_close()

    async def _wait(self, request: int, pending: _Pending) -> Answer:
        try:
            answer: Answer = await pending.future
            return answer
        except asyncio.CancelledError:
            self._cancel(request)
            raise

    def _cancel(self, request: int) -> None:
        """Ask the worker to forget a request. The slot stays leased until it has answered: it may be writing there."""
        if not self.closed and request in self._pending:
            self._send(protocol.frame(protocol.CANCEL, request, None))

    def _expire(self, request: int, model: str) -> None:
        pending = self._pending.get(request)
        if pending is not None and not pending.future.done():
            pending.future.set_exception(_late(model))
            self._cancel(request)

    def _take_id(self) -> int:
        request = self._next
        self._next += 1
        return request

    def _send(self, parts: list[Any]) -> None:
        sent = 0
        if not self._unsent:
            try:
                sent = self._socket.sendmsg(parts)
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
        for part in parts:
            view = memoryview(part).cast("B")
            if sent < len(view):
                self._unsent += view[sent:]
            sent = max(sent - len(view), 0)
        if self._unsent:
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
        try:
            if frame.kind == protocol.RESULT:
                self._settle(pending, self._session.answer(frame, pending.slot))
            elif frame.kind == protocol.REPLY:
                self._settle(pending, protocol.decode_any(frame.body))
            elif frame.kind == protocol.HELLO:
                self._settle(pending, protocol.decode_hello(frame.body).pid)
            elif frame.kind == protocol.ERROR:
                self._settle(pending, protocol.error_of(protocol.decode_fault(frame.body)))
        finally:
            self._session.release(pending.slot)

    @staticmethod
    def _settle(pending: _Pending, outcome: Any) -> None:
        if pending.timer is not None:
            pending.timer.cancel()
        if pending.future.done():
            return  # the caller left, or its deadline passed
        if isinstance(outcome, Exception):
            pending.future.set_exception(outcome)
        else:
            pending.future.set_result(outcome)


class BlockingWorkerClient:
    """For processes without an event loop; one request at a time, not thread-safe."""

    def __init__(
        self, connection: socket.socket, name: str, slots: int = 2, slot_bytes: int = 1 << 20, timeout_s: float = 10.0
    ) -> None:
        """Take over a connected stream socket and exchange hellos. Raises WorkerError or ProtocolError."""
        self._name = name
        self._timeout_s = timeout_s
        self._session = _Session(slots, slot_bytes)
        self._reader = protocol.FrameReader()
        self._next = 0
        self._socket = connection
        try:
            self._socket.settimeout(timeout_s)
            self._session.hello(self._socket)
            self._receive(0)
        except OSError as error:
            self.close()
            raise _lost(name) from error
        except MillhandError:
            self.close()
            raise

    @classmethod
    def connect(cls, path: Path, slots: int = 2, slot_bytes: int = 1 << 20) -> BlockingWorkerClient:
        """Connect to a worker's socket. Raises WorkerError where none answers."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(os.fspath(path))
        except OSError as error:
            connection.close()
            raise WorkerError(f"no worker answers on '{path}'", hint="is the daemon running?") from error
        return cls(connection, path.stem, slots, slot_bytes)

    def infer(
        self,
        model: str,
        tensors: Tensors,
        *,
        version: int = 0,
        deadline: int = 0,
        priority: int = 0,
        wanted: tuple[str, ...] = (),
    ) -> Answer:
        """Run one request; the same errors as `WorkerClient.infer`. After a DeadlineError the client is closed."""
        self._next += 1
        parts, slot = self._session.infer_frame(self._next, (model, version), tensors, deadline, priority, wanted)
        try:
            if deadline:
                left_s = (deadline - time.monotonic_ns()) / 1e9 + DEADLINE_GRACE_S
                self._socket.settimeout(max(left_s, DEADLINE_GRACE_S))
            self._send(parts)
            return self._session.answer(self._receive(self._next), slot)
        except TimeoutError as error:
            self.close()
            raise _late(model) from error
        finally:
            self._session.release(slot)
            if deadline and self._socket.fileno() >= 0:
                self._socket.settimeout(self._timeout_s)

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Make a control call (`ping`, `stats`, `metadata`). Raises what the worker raised, or WorkerError."""
        self._next += 1
        self._send(protocol.frame(protocol.CALL, self._next, protocol.Call(name, arguments)))
        return protocol.decode_any(self._receive(self._next).body)

    def close(self) -> None:
        self._socket.close()
        self._session.ring = None

    def _send(self, parts: list[Any]) -> None:
        try:
            sent = self._socket.sendmsg(parts)
            if sent < sum(memoryview(part).nbytes for part in parts):
                self._socket.sendall(b"".join(parts)[sent:])
        except TimeoutError:
            raise
        except OSError as error:
            self.close()
            raise _lost(self._name) from error

    def _receive(self, request: int) -> protocol.Frame:
        try:
            while True:
                for frame in self._reader.read(self._socket):
                    if frame.request in (request, 0):
                        if frame.kind == protocol.ERROR:
                            raise protocol.error_of(protocol.decode_fault(frame.body))
                        return frame
        except TimeoutError:
            raise
        except (EOFError, OSError) as error:
            self.close()
            raise _lost(self._name) from error
