"""Messages that a client sends again and again: what they and their answers are but for the data is kept.

A ModelInferRequest with raw tensors is the same bytes every time, but for the tensors' own data. Once one was read in
full, the next one of the same size that has the same bytes around its data means the same: its data are copied from
the message to the worker, and nothing is parsed. An answer is such bytes again, around the data in the worker's slot.
"""

from __future__ import annotations

from typing import Any

import msgspec

from millhand.serving import protocol
from millhand.serving.grpc import wire
from millhand.serving.grpc.requests import InferCall
from millhand.serving.tensors import DATATYPE_OF, dtype_name

RAW_INPUT, RAW_OUTPUT = 7, 6
LENGTH_DELIMITED = 2
FIXED_BYTES_CAP = 4096
SIZES_CAP = 256
PLANS_OF_SIZE_CAP = 8


class Plan(msgspec.Struct, frozen=True, gc=False):
    """What a message asks for, whatever its data are."""

    call: InferCall
    """Without tensors."""
    fixed: tuple[tuple[int, bytes], ...]
    """(position, bytes) of everything but the data."""
    spans: tuple[tuple[int, int], ...]
    """Where each tensor's data begin and end in the message."""
    tensors: tuple[protocol.Tensor, ...]
    """Where they are to lie for the worker."""
    size: int
    """Bytes that they need there."""

    def fits(self, message: bytes) -> bool:
        """Whether a message of the same size is the same but for its data."""
        return all(message.startswith(data, position) for position, data in self.fixed)

    def place(self, message: bytes, slot: memoryview | None) -> tuple[list[Any], bool]:
        """Copy the data into the slot, or return them as the request's payload; and whether they are that."""
        data = memoryview(message)
        if slot is not None and protocol.INLINE_BYTES < self.size <= len(slot):
            for tensor, (start, stop) in zip(self.tensors, self.spans, strict=True):
                slot[tensor.offset : tensor.offset + tensor.size] = data[start:stop]
            return [], False
        payload: list[Any] = []
        for tensor, (start, stop) in zip(self.tensors, self.spans, strict=True):
            payload.append(data[start:stop])
            if padding := -tensor.size % protocol.ALIGN_BYTES:
                payload.append(bytes(padding))
        return payload, True


class Plans:
    """The plans of one process, a bounded number."""

    def __init__(self) -> None:
        self._of_size: dict[int, list[Plan]] = {}
        self._heads: dict[tuple[Any, ...], Head] = {}

    def find(self, message: bytes) -> Plan | None:
        """The plan that fits, if one is kept."""
        for plan in self._of_size.get(len(message), ()):
            if plan.fits(message):
                return plan
        return None

    def keep(self, message: bytes, call: InferCall) -> None:
        """Keep what a message came to, if the next one like it can do with that."""
        plan = _plan(message, call)
        if plan is None:
            return
        if len(self._of_size) >= SIZES_CAP:
            self._of_size.clear()
        plans = self._of_size.setdefault(len(message), [])
        plans.insert(0, plan)
        del plans[PLANS_OF_SIZE_CAP:]

    def answer(self, call: InferCall, result: protocol.Result, memory: memoryview) -> bytes:
        """The ModelInferResponse around a result of a planned call. Raises InputError where the result is damaged."""
        key = (call.model, result.version, call.wanted, result.tensors)
        head = self._heads.get(key)
        if head is None:
            protocol.fetch(result.tensors, memory)  # checks it
            if len(self._heads) >= SIZES_CAP:
                self._heads.clear()
            head = self._heads[key] = _head(call, result)
        parts: list[Any] = [head.data]
        for prefix, start, stop in head.outputs:
            parts += (prefix, memory[start:stop])
        return b"".join(parts)


class Head(msgspec.Struct, frozen=True, gc=False):
    """An answer but for its data."""

    data: bytes
    outputs: tuple[tuple[bytes, int, int], ...]
    """(what stands before an output's data, where they begin and end in the result's memory)."""


def _plan(message: bytes, call: InferCall) -> Plan | None:
    """None where something hangs on the data, or where the message will hardly come again."""
    spans = _raw_spans(message)
    if call.id or call.classes or call.marks_final or not spans or len(spans) != len(call.tensors):
        return None
    if len(message) - sum(stop - start for start, stop in spans) > FIXED_BYTES_CAP:
        return None
    if any(array.dtype.kind in "Ob" for array in call.tensors.values()):
        return None  # strings and truth values must be looked at
    tensors, offset, fixed, position = [], 0, [], 0
    for (name, array), (start, stop) in zip(call.tensors.items(), spans, strict=True):
        tensors.append(protocol.Tensor(name, dtype_name(array.dtype), array.shape, offset, stop - start))
        offset += -(-(stop - start) // protocol.ALIGN_BYTES) * protocol.ALIGN_BYTES
        fixed.append((position, message[position:start]))
        position = stop
    fixed.append((position, message[position:]))
    bare = msgspec.structs.replace(call, tensors={})
    return Plan(bare, tuple(fixed), tuple(spans), tuple(tensors), offset)


def _raw_spans(message: bytes) -> list[tuple[int, int]]:
    """Where the data of raw_input_contents lie; nothing where the message holds fields of unknown kinds."""
    spans, position = [], 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag & 7 != LENGTH_DELIMITED:
            return []
        size, position = _varint(message, position)
        if tag >> 3 == RAW_INPUT:
            spans.append((position, position + size))
        position += size
    return spans


def _varint(data: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7


def _head(call: InferCall, result: protocol.Result) -> Head:
    response = wire.ModelInferResponse(model_name=call.model, model_version=str(result.version), id="")
    tensors = {tensor.name: tensor for tensor in result.tensors}
    outputs = []
    for name in call.wanted or tensors:
        tensor = tensors[name]
        response.outputs.add(name=name, datatype=DATATYPE_OF[tensor.dtype], shape=tensor.shape)
        prefix = _number(RAW_OUTPUT << 3 | LENGTH_DELIMITED) + _number(tensor.size)
        outputs.append((prefix, tensor.offset, tensor.offset + tensor.size))
    return Head(response.SerializeToString(), tuple(outputs))


def _number(number: int) -> bytes:
    """A number as protobuf writes it."""
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)
