"""The worker protocol: frames on a Unix stream socket, tensors in a ring of shared memory. See docs/worker-protocol.md.

A frame is a 20-byte head, a MessagePack body (one of the structs below), and, for tensors that do not travel in the
ring, their bytes. All integers are little-endian. Imported by workers: Python 3.10.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand import errors
from millhand.serving.tensors import DATATYPE_OF, Tensors, dtype_name

VERSION = 2
MAGIC = 0x484D  # "MH"
HEAD = struct.Struct("<HBxIIQ")  # magic, kind, body bytes, payload bytes, request id
# What differs from request to request stands before the rest of an INFER's body: deadline (CLOCK_MONOTONIC ns), slot.
INFER_HEAD = struct.Struct("<Qi")
BODY_BYTES_CAP = 1 << 20
PAYLOAD_BYTES_CAP = 256 << 20
# Below this, copying through the socket is cheaper than touching a slot (benchmarks/worker_protocol.py).
INLINE_BYTES = 2048
ALIGN_BYTES = 64
READ_BYTES = 1 << 16

HELLO, INFER, RESULT, ERROR, CANCEL, CALL, REPLY = range(1, 8)


class Hello(msgspec.Struct, array_like=True, frozen=True):
    """First frame of each side. The client's carries the ring's descriptor as SCM_RIGHTS, or 0 slots for no ring."""

    version: int
    slots: int = 0
    slot_bytes: int = 0
    pid: int = 0


class Tensor(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where one tensor lies: in its slot, or in the frame's payload."""

    name: str
    dtype: str
    """A NumPy dtype name; `object` for BYTES, whose elements are each a 4-byte length and the bytes."""
    shape: tuple[int, ...]
    offset: int
    size: int
    """Bytes."""


class Infer(msgspec.Struct, array_like=True, frozen=True):
    model: str
    version: int
    """0 for the highest that the worker has."""
    priority: int
    """Higher goes first."""
    inline: bool
    """True: the tensors are in the payload, the slot is for the answer alone."""
    tensors: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    """The outputs wanted; empty for all."""


class Result(msgspec.Struct, array_like=True, frozen=True):
    inline: bool
    """False: the tensors lie in the request's slot."""
    tensors: tuple[Tensor, ...]
    version: int
    queue_ns: int
    compute_ns: int
    rows: int
    """Rows of the batch that the request ran in."""


class Fault(msgspec.Struct, array_like=True, frozen=True):
    code: str
    message: str
    hint: str
    retriable: bool


class Call(msgspec.Struct, array_like=True, frozen=True):
    """load, unload, metadata, stats, ping, shutdown; see serving/worker.py."""

    name: str
    args: dict[str, Any]


encode = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_infer = msgspec.msgpack.Decoder(Infer).decode
decode_result = msgspec.msgpack.Decoder(Result).decode
decode_fault = msgspec.msgpack.Decoder(Fault).decode
decode_call = msgspec.msgpack.Decoder(Call).decode
decode_any = msgspec.msgpack.Decoder().decode


class ProtocolError(errors.MillhandError):
    """The other side sent something that is not the worker protocol; the connection is closed."""

    code = "protocol"


_DTYPES = {name: np.dtype(name) for name in DATATYPE_OF}


def _descendants(cls: type[errors.MillhandError]) -> Iterator[type[errors.MillhandError]]:
    for child in cls.__subclasses__():
        yield from _descendants(child)
        yield child


# Of classes with one code the one above comes last, and holds.
_CLASSES: dict[str, type[errors.MillhandError]] = {cls.code: cls for cls in _descendants(errors.MillhandError)}


def fault_of(error: BaseException) -> Fault:
    """The wire form of an error."""
    if isinstance(error, errors.MillhandError):
        return Fault(error.code, error.message, error.hint, error.retriable)
    return Fault("model", f"{type(error).__name__}: {error}", "report this to the backend's author", False)


def error_of(fault: Fault) -> errors.MillhandError:
    """The exception that the other side raised."""
    cls = _CLASSES.get(fault.code, errors.WorkerError)
    return cls(fault.message, hint=fault.hint, retriable=fault.retriable)


def frame(kind: int, request: int, body: Any, payload: Sequence[Any] = (), payload_bytes: int = 0) -> list[Any]:
    """The buffers of one frame, ready for `sendmsg`."""
    encoded = encode(body)
    return [HEAD.pack(MAGIC, kind, len(encoded), payload_bytes, request) + encoded, *payload]


def infer_frame(
    request: int, infer: Infer, deadline_ns: int, slot: int, payload: Sequence[Any] = (), payload_bytes: int = 0
) -> list[Any]:
    """The frame of a request; `deadline_ns` is CLOCK_MONOTONIC (0: none), `slot` -1 for none: all travels inline.

    Raises InputError for one that the worker would close the connection over.
    """
    if payload_bytes > PAYLOAD_BYTES_CAP:
        raise errors.InputError(
            f"the tensors take {payload_bytes} bytes, allowed are {PAYLOAD_BYTES_CAP}",
            hint="send fewer rows",
        )
    body = INFER_HEAD.pack(deadline_ns, slot) + encode(infer)
    if len(body) > BODY_BYTES_CAP:
        raise errors.InputError(
            f"the names and shapes of tensors take {len(body)} bytes", hint="send and ask for fewer tensors"
        )
    return [HEAD.pack(MAGIC, INFER, len(body), payload_bytes, request) + body, *payload]


def split_infer(body: memoryview) -> tuple[int, int, bytes]:
    """An INFER's body as (deadline, slot, the encoded Infer). Raises ProtocolError for one that is too short."""
    if len(body) < INFER_HEAD.size:
        raise ProtocolError("a request's body is too short", hint="speak the worker protocol")
    deadline_ns, slot = INFER_HEAD.unpack_from(body)
    return deadline_ns, slot, bytes(body[INFER_HEAD.size :])


class Frame(msgspec.Struct):
    kind: int
    request: int
    body: memoryview
    payload: memoryview


class FrameReader:
    """Cuts a byte stream into frames. Raises ProtocolError on what is none, EOFError at the end."""

    def __init__(self, payload_bytes_cap: int = PAYLOAD_BYTES_CAP) -> None:
        self._payload_bytes_cap = payload_bytes_cap
        self._rest = b""
        self._target: memoryview | None = None
        self._filled = 0

    def read(self, connection: socket.socket) -> list[Frame]:
        """Receive once and return the frames that are complete (maybe none)."""
        if self._target is not None:
            count = connection.recv_into(self._target[self._filled :])
            return self._fill(count)
        return self.feed(connection.recv(READ_BYTES))

    def feed(self, chunk: bytes) -> list[Frame]:
        """Take received bytes; for use while no large frame is under way."""
        if not chunk:
            raise EOFError
        data = memoryview(self._rest + chunk if self._rest else chunk)
        frames: list[Frame] = []
        position = 0
        while len(data) - position >= HEAD.size:
            magic, kind, body_bytes, payload_bytes, request = HEAD.unpack_from(data, position)
            self._check(magic, kind, body_bytes, payload_bytes)
            total = HEAD.size + body_bytes + payload_bytes
            if len(data) - position < total:
                self._begin(data[position:], total)
                return frames
            split = position + HEAD.size + body_bytes
            frames.append(Frame(kind, request, data[position + HEAD.size : split], data[split : position + total]))
            position += total
        self._rest = bytes(data[position:])
        return frames

    def _check(self, magic: int, kind: int, body_bytes: int, payload_bytes: int) -> None:
        if magic != MAGIC or not HELLO <= kind <= REPLY:
            raise ProtocolError("the bytes are no frame of the worker protocol", hint="speak the worker protocol")
        if body_bytes > BODY_BYTES_CAP or payload_bytes > self._payload_bytes_cap:
            raise ProtocolError(
                f"a frame of {body_bytes} + {payload_bytes} bytes is too large "
                f"(allowed: {BODY_BYTES_CAP} + {self._payload_bytes_cap})",
                hint="send smaller tensors",
            )

    def _begin(self, part: memoryview, total: int) -> None:
        # Uninitialised memory: pages are taken as bytes really come, whatever size the head claims.
        self._target = np.empty(total, dtype=np.uint8).data
        self._target[: len(part)] = part
        self._filled = len(part)
        self._rest = b""

    def _fill(self, count: int) -> list[Frame]:
        if count == 0:
            raise EOFError
        assert self._target is not None
        self._filled += count
        if self._filled < len(self._target):
            return []
        data, self._target, self._filled = self._target, None, 0
        _, kind, body_bytes, _, request = HEAD.unpack_from(data)
        split = HEAD.size + body_bytes
        return [Frame(kind, request, data[HEAD.size : split], data[split:])]


def place(tensors: Tensors, slot: memoryview | None) -> tuple[tuple[Tensor, ...], list[Any], int]:
    """Lay tensors out: into `slot` where they fit and are large enough for it to pay, else as payload buffers.

    Returns (where they lie, payload buffers, payload bytes); the latter two are empty and -1 when the slot took them.
    """
    specs, flats, offset = [], [], 0
    for name, array in tensors.items():
        flat = _flat(array)
        size = flat.nbytes
        specs.append(Tensor(name, dtype_name(array.dtype), array.shape, offset, size))
        flats.append(flat)
        offset += -(-size // ALIGN_BYTES) * ALIGN_BYTES
    if slot is not None and INLINE_BYTES < offset <= len(slot):
        for spec, flat in zip(specs, flats):  # noqa: B905 (Python 3.10; lengths equal)
            slot[spec.offset : spec.offset + spec.size] = flat.data
        return tuple(specs), [], -1
    if offset <= INLINE_BYTES:  # one small buffer is quicker to send than many
        payload = b"".join([flat.tobytes() + bytes(-flat.nbytes % ALIGN_BYTES) for flat in flats])
        return tuple(specs), [payload] if payload else [], offset
    parts: list[Any] = []
    for flat in flats:
        parts.append(flat)
        if padding := -flat.nbytes % ALIGN_BYTES:
            parts.append(bytes(padding))
    return tuple(specs), parts, offset


def _flat(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The array's bytes in C order, without a copy where possible."""
    if array.dtype == object:
        elements = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel()]
        return np.frombuffer(b"".join(struct.pack("<I", len(item)) + item for item in elements), dtype=np.uint8)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    return array.reshape(-1).view(np.uint8)


def fetch(tensors: Sequence[Tensor], memory: memoryview) -> dict[str, NDArray[Any]]:
    """Views of the tensors that lie in `memory`. Raises InputError where one lies outside, or its size is wrong."""
    return {tensor.name: _view(tensor, memory) for tensor in tensors}


def _view(tensor: Tensor, memory: memoryview) -> NDArray[Any]:
    if tensor.dtype not in DATATYPE_OF:
        raise errors.InputError(
            f"tensor '{tensor.name}' has dtype '{tensor.dtype}'{errors.suggestion(tensor.dtype, DATATYPE_OF)}",
            hint=f"use one of {', '.join(DATATYPE_OF)}",
        )
    if tensor.offset < 0 or tensor.size < 0 or tensor.offset + tensor.size > len(memory):
        raise errors.InputError(
            f"tensor '{tensor.name}' lies at {tensor.offset} with {tensor.size} bytes, outside its {len(memory)} bytes",
            hint="mend the client",
        )
    if any(size < 0 for size in tensor.shape):
        raise errors.InputError(f"tensor '{tensor.name}' has a negative shape {list(tensor.shape)}")
    count = 1
    for size in tensor.shape:
        count *= size
    if tensor.dtype == "object":
        return _strings(tensor, bytes(memory[tensor.offset : tensor.offset + tensor.size]), count)
    dtype = _DTYPES[tensor.dtype]
    if count * dtype.itemsize != tensor.size:
        raise errors.InputError(
            f"tensor '{tensor.name}' has {tensor.size} bytes, its shape {list(tensor.shape)} "
            f"of {tensor.dtype} needs {count * dtype.itemsize}",
            hint="send data that fit the shape",
        )
    array = np.frombuffer(memory, dtype, count, tensor.offset).reshape(tensor.shape)
    return array if array.flags.aligned else array.copy()


def _strings(tensor: Tensor, data: bytes, count: int) -> NDArray[Any]:
    elements, position = [], 0
    while position + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, position)
        elements.append(data[position + 4 : position + 4 + size])
        position += 4 + size
    if position != len(data) or len(elements) != count:
        raise errors.InputError(
            f"tensor '{tensor.name}' holds {len(elements)} strings, its shape {list(tensor.shape)} needs {count}",
            hint="send a 4-byte length before each string",
        )
    array = np.empty(count, dtype=object)
    array[:] = elements
    return array.reshape(tensor.shape)
