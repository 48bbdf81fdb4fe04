"""What every client of a worker does alike: greet, lay out a request, read an answer. Sends and receives nothing."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import msgspec
from numpy.typing import NDArray

from millhand.errors import DeadlineError, WorkerError
from millhand.serving import protocol
from millhand.serving.ring import Ring
from millhand.serving.tensors import Tensors


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


class Exchange:
    """One client's ring, and the frames around it."""

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
            infer = protocol.Infer(*target, priority, size >= 0, placed, wanted)
            return protocol.infer_frame(request, infer, deadline, slot, payload, max(size, 0)), slot
        except BaseException:
            self.release(slot)
            raise

    def release(self, slot: int) -> None:
        if self.ring:
            self.ring.release(slot)

    def memory(self, result: protocol.Result, payload: memoryview, slot: int) -> memoryview:
        """Where an answer's tensors lie. Raises ProtocolError for a ring that does not exist."""
        if result.inline:
            return payload
        if self.ring is None or slot < 0:
            raise protocol.ProtocolError("the worker answered in a ring that does not exist")
        return self.ring.slot(slot)


def read_answer(result: protocol.Result, memory: memoryview) -> Answer:
    """The answer with tensors that outlive `memory` where that is a slot."""
    outputs = protocol.fetch(result.tensors, memory)
    if not result.inline:
        outputs = {name: view.copy() for name, view in outputs.items()}
    return Answer(outputs, result.version, result.queue_ns, result.compute_ns, result.rows)


def lost(name: str) -> WorkerError:
    return WorkerError(f"the connection to worker '{name}' is lost", hint="send the request again")


def late(model: str) -> DeadlineError:
    return DeadlineError(
        f"model '{model}' did not answer before the deadline",
        hint="give it more time, or look at 'millhand model show'",
    )
