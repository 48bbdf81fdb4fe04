"""The worker's end of one client connection. Imported by workers: Python 3.10."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError
from millhand.serving import protocol
from millhand.serving.batcher import Request
from millhand.serving.lanes import LoadedModel
from millhand.serving.ring import Ring

UNSENT_BYTES_CAP = 512 << 20
PLANS_CAP = 256
PARTS_CAP = 512
"""Buffers of one sendmsg; Linux takes 1024."""


class Connection:
    """Frames in by one thread at a time, frames out by any thread."""

    def __init__(self, connection: socket.socket, arm: Callable[[Connection], None], control: bool = False) -> None:
        """`arm` makes some thread call `flush` once there is room for what is unsent."""
        connection.setblocking(False)
        self.socket = connection
        self.fd = connection.fileno()
        self.control = control
        self.greeted = False
        self.closed = False
        self.pending: dict[int, Request] = {}
        self.plans: dict[tuple[bytes, int], Plan] = {}
        self._arm = arm
        self._failed = False  # by a sender that met an error or an over-full buffer; the next `flush` raises
        self._ring: Ring | None = None
        self._fds: list[int] = []
        self._reader = protocol.FrameReader()
        self._lock = threading.Lock()
        self._unsent = bytearray()

    def read(self) -> list[protocol.Frame]:
        """Receive once. Raises ProtocolError, EOFError, BlockingIOError or OSError."""
        if self.greeted:
            return self._reader.read(self.socket)
        data, fds, _, _ = socket.recv_fds(self.socket, protocol.READ_BYTES, 1)
        self._fds += fds
        return self._reader.feed(data)

    def greet(self, frame: protocol.Frame) -> None:
        """Answer the hello. Raises ProtocolError for another version, or a ring that is not as announced."""
        if frame.kind != protocol.HELLO:
            raise protocol.ProtocolError("the first frame is no hello", hint="speak the worker protocol")
        hello = protocol.decode_hello(frame.body)
        if hello.version != protocol.VERSION:
            raise protocol.ProtocolError(
                f"the client speaks worker protocol {hello.version}, this worker speaks {protocol.VERSION}",
                hint="run the same millhand on both sides",
            )
        try:
            if hello.slots and self._fds:
                self._ring = Ring.attach(self._fds[0], hello.slots, hello.slot_bytes)
            elif hello.slots:
                raise InputError("the hello announces a ring but carries no descriptor", hint="send it as SCM_RIGHTS")
        except (InputError, OSError, ValueError) as error:
            raise protocol.ProtocolError(f"the ring is refused: {error}", hint="mend the client") from error
        finally:
            self._close_fds()
        self.greeted = True
        answer = protocol.Hello(protocol.VERSION, hello.slots, hello.slot_bytes, os.getpid())
        self.send(protocol.frame(protocol.HELLO, frame.request, answer))

    def keep(self, asked: bytes, slot: int, plan: Plan) -> None:
        """A client asks the same again and again, in the same slots: what that comes to is kept."""
        if len(self.plans) >= PLANS_CAP:
            self.plans.clear()
        self.plans[asked, slot] = plan

    def slot(self, number: int) -> memoryview:
        """The memory of a slot. Raises InputError where there is none."""
        if self._ring is None:
            raise InputError(f"slot {number} is named, but the connection has no ring", hint="send tensors inline")
        return self._ring.slot(number)

    def answer(self, request_id: int, kind: int, body: Any) -> None:
        """Answer a pending request; a second answer, or one to a client that left, is none."""
        if parts := self.take_answer(request_id, kind, body):
            self.send(parts)

    def take_answer(
        self, request_id: int, kind: int, body: Any, payload: Sequence[Any] = (), size: int = 0
    ) -> list[Any]:
        """The frame that answers a pending request, which the caller sends; empty where it was answered already."""
        if self.pending.pop(request_id, None) is None:
            return []
        return protocol.frame(kind, request_id, body, payload, size)

    def send(self, parts: list[Any]) -> None:
        """Send at once what the socket takes, leave the rest to `flush`. Never blocks, never raises."""
        if len(parts) > PARTS_CAP:
            parts = [b"".join(parts)]
        with self._lock:
            if self.closed or self._failed:
                return
            sent = 0
            if not self._unsent:
                try:
                    sent = self.socket.sendmsg(parts)
                except BlockingIOError:
                    pass
                except OSError:
                    self._failed = True
            if not self._failed and not self._keep(parts, sent):
                return
        self._arm(self)

    @property
    def blocked(self) -> bool:
        """Whether `flush` should be called as soon as the socket takes more."""
        return bool(self._unsent) or self._failed

    def _keep(self, parts: list[Any], sent: int) -> bool:
        """Keep what was not sent; False where nothing is left."""
        total = len(parts[0]) if len(parts) == 1 else sum([memoryview(part).nbytes for part in parts])
        if sent == total:
            return False
        before = len(self._unsent)
        for part in parts:
            view = memoryview(part).cast("B")
            if sent < len(view):
                self._unsent += view[sent:]
            sent = max(sent - len(view), 0)
        self._failed = len(self._unsent) > UNSENT_BYTES_CAP
        return len(self._unsent) > before

    def flush(self) -> None:
        """Send more of what was kept. Raises OSError, also for what an earlier sender met."""
        with self._lock:
            if self._failed:
                raise BrokenPipeError("the client does not take its answers")
            if self._unsent:
                sent = self.socket.send(self._unsent)
                del self._unsent[:sent]

    def close(self) -> None:
        with self._lock:
            self.closed = True
            self._close_fds()
            self.socket.close()
            self._ring = None
            self.plans.clear()
            self._unsent.clear()

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


class Plan(NamedTuple):
    """What a request comes to; the values in its slot aside."""

    model: LoadedModel
    name: str
    version: int
    inputs: dict[str, NDArray[Any]]
    """Views of the slot."""
    rows: int
    priority: int
    kind: tuple[Any, ...]
    slot: memoryview | None
    wanted: Sequence[str]
    inspected: bool
    """Whether the values must be looked at each time."""
    lasts: bool
    """Whether it holds for the next request that asks the same in the same slot."""


class Origin:
    """Where a request came from and where its answer goes."""

    __slots__ = ("connection", "model", "request_id", "slot", "wanted")

    def __init__(
        self,
        connection: Connection,
        request_id: int,
        slot: memoryview | None,
        wanted: Sequence[str],
        model: LoadedModel,
    ) -> None:
        self.connection = connection
        self.request_id = request_id
        self.slot = slot
        """None: the answer travels inline."""
        self.wanted = wanted
        self.model = model

    def take_result(self, outputs: dict[str, NDArray[Any]], queue_ns: int, compute_ns: int, rows: int) -> list[Any]:
        """The answer with the outputs: in the request's slot where they fit, else inline. The caller sends it."""
        if self.wanted:
            outputs = {name: outputs[name] for name in self.wanted}
        if self.slot is not None:
            outputs = {name: _apart(array) for name, array in outputs.items()}
        try:
            tensors, payload, size = protocol.place(outputs, self.slot)
            if size > protocol.PAYLOAD_BYTES_CAP:
                raise InputError(
                    f"the outputs take {size} bytes, allowed are {protocol.PAYLOAD_BYTES_CAP}",
                    hint="send fewer rows",
                )
        except Exception as error:
            return self.connection.take_answer(self.request_id, protocol.ERROR, protocol.fault_of(error))
        result = protocol.Result(size >= 0, tensors, self.model.version, queue_ns, compute_ns, rows)
        return self.connection.take_answer(self.request_id, protocol.RESULT, result, payload, max(size, 0))

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        self.connection.answer(self.request_id, protocol.ERROR, protocol.fault_of(error))


def _apart(array: NDArray[Any]) -> NDArray[Any]:
    """The array; a copy where it may be a view of the request's slot, which is about to be written."""
    root = array if array.base is None else array.base
    return array if isinstance(root, np.ndarray) and root.flags.owndata else array.copy()
