"""A worker's client for processes without an event loop."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from millhand.errors import MillhandError, WorkerError
from millhand.serving import protocol
from millhand.serving.exchange import Answer, Exchange, late, lost, read_answer
from millhand.serving.tensors import Tensors

# The worker says itself what is late. The time-out is for one that says nothing at all, and ends the connection.
DEADLINE_GRACE_S = 0.02


class BlockingWorkerClient:
    """For processes without an event loop; one request at a time, not thread-safe."""

    def __init__(
        self, connection: socket.socket, name: str, slots: int = 2, slot_bytes: int = 1 << 20, timeout_s: float = 10.0
    ) -> None:
        """Take over a connected stream socket and exchange hellos. Raises WorkerError or ProtocolError."""
        self._name = name
        self._timeout_s = timeout_s
        self._exchange = Exchange(slots, slot_bytes)
        self._reader = protocol.FrameReader()
        self._next = 0
        self._socket = connection
        try:
            self._socket.settimeout(timeout_s)
            self._exchange.hello(self._socket)
            self._receive(0)
        except OSError as error:
            self.close()
            raise lost(name) from error
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
        parts, slot = self._exchange.infer_frame(self._next, (model, version), tensors, deadline, priority, wanted)
        try:
            if deadline:
                left_s = (deadline - time.monotonic_ns()) / 1e9 + DEADLINE_GRACE_S
                self._socket.settimeout(max(left_s, DEADLINE_GRACE_S))
            self._send(parts)
            frame = self._receive(self._next)
            result = protocol.decode_result(frame.body)
            return read_answer(result, self._exchange.memory(result, frame.payload, slot))
        except TimeoutError as error:
            self.close()
            raise late(model) from error
        finally:
            self._exchange.release(slot)
            if deadline and self._socket.fileno() >= 0:
                self._socket.settimeout(self._timeout_s)

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Make a control call (`ping`, `stats`, `metadata`). Raises what the worker raised, or WorkerError."""
        self._next += 1
        self._send(protocol.frame(protocol.CALL, self._next, protocol.Call(name, arguments)))
        return protocol.decode_any(self._receive(self._next).body)

    def close(self) -> None:
        self._socket.close()
        self._exchange.ring = None

    def _send(self, parts: list[Any]) -> None:
        try:
            sent = self._socket.sendmsg(parts)
            if sent < sum(memoryview(part).nbytes for part in parts):
                self._socket.sendall(b"".join(parts)[sent:])
        except TimeoutError:
            raise
        except OSError as error:
            self.close()
            raise lost(self._name) from error

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
            raise lost(self._name) from error
