"""Tensors to requests, answers to tensors: Open Inference Protocol v2 from the client's side.

The binary tensor data extension where the upstream has it: JSON first, `Inference-Header-Content-Length` says how
much, then the tensors' bytes in order, row major and little-endian; BYTES are each a 4-byte length and the bytes. An
answer is believed only if it names the model asked and holds each output once, in the type and shape that was declared,
complete to the byte.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.serving.tensors import DATATYPE_OF, DATATYPES, Specs, Tensors, dtype_name, fits
from millhand_plugins.remote.channel import UpstreamError

HEADER_LENGTH = "Inference-Header-Content-Length"
JSON_BYTES_AN_ELEMENT = 32
"""More than the longest number: -1.7976931348623157e+308 with a comma and a space has 26 characters."""
SLACK_BYTES = 64 << 10

_LISTS: dict[str, Any] = {
    "BOOL": list[bool],
    "BYTES": list[str],
    "FP16": list[float],
    "FP32": list[float],
    "FP64": list[float],
}
_FLAT = {name: msgspec.json.Decoder(_LISTS.get(name, list[int])) for name in DATATYPES}


class CannotCarry(UpstreamError):
    """The upstream speaks JSON only, which has no words for what the request holds."""

    counted = False


class WrongAnswer(Exception):
    """Says what is wrong, in the words that follow "upstream '…' "."""


class Output(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


class Answer(msgspec.Struct):
    model_name: str
    outputs: list[Output]
    model_version: str | None = None
    id: str | None = None


_decode_answer = msgspec.json.Decoder(Answer).decode


class Expected(msgspec.Struct, frozen=True):
    """What the answer to one request must be."""

    model: str
    version: str
    """Empty: any."""
    id: str
    rows: int
    outputs: Specs


def encode_request(
    tensors: Tensors, expected: Expected, parameters: Mapping[str, Any], binary: bool
) -> tuple[dict[str, str], list[Any]]:
    """(header fields, buffers of the body). Raises CannotCarry where JSON has no way to say a value."""
    inputs, payload = [], []
    for name, array in tensors.items():
        tensor: dict[str, Any] = {"name": name, "shape": array.shape, "datatype": DATATYPE_OF[dtype_name(array.dtype)]}
        if binary:
            data = _bytes_of(array)
            payload.append(data)
            tensor["parameters"] = {"binary_data_size": memoryview(data).nbytes}
        else:
            tensor["data"] = _json_of(name, array)
        inputs.append(tensor)
    wish = {"parameters": {"binary_data": True}} if binary else {}
    body = msgspec.json.encode({
        "id": expected.id,
        "parameters": parameters,
        "inputs": inputs,
        "outputs": [{"name": name, **wish} for name in expected.outputs],
    })  # fmt: skip
    if binary:
        return {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(body))}, [body, *payload]
    return {"Content-Type": "application/json"}, [body]


def answer_bytes_cap(outputs: Specs, rows: int, free_bytes_cap: int) -> int:
    """Most bytes that a truthful answer can have; `free_bytes_cap` where shapes or BYTES leave it open."""
    elements = 0
    for dtype, shape in outputs.values():
        if dtype == "object" or -1 in shape[1:]:
            return free_bytes_cap
        elements += rows * math.prod(shape[1:])
    return elements * JSON_BYTES_AN_ELEMENT + SLACK_BYTES


def decode_answer(headers: Mapping[str, str], body: bytearray, expected: Expected) -> dict[str, NDArray[Any]]:
    """Output name -> array, which may be a read-only view of `body`. Raises WrongAnswer."""
    view = memoryview(body)
    announced = headers.get(HEADER_LENGTH.lower())
    json_bytes = len(view)
    if announced is not None:
        if not announced.isdecimal() or len(announced) > 18 or int(announced) > len(view):
            raise WrongAnswer(f"answered with '{HEADER_LENGTH}: {announced[:40]}' in {len(view)} bytes")
        json_bytes = int(announced)
    try:
        answer = _decode_answer(view[:json_bytes])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WrongAnswer(f"gave an answer that is none of the Open Inference Protocol: {error}") from error
    _check_identity(answer, expected)
    rest = view[json_bytes:]
    arrays: dict[str, NDArray[Any]] = {}
    for output in answer.outputs:
        _check_head(output, arrays, expected)
        size = (output.parameters or {}).get("binary_data_size")
        if size is None:
            arrays[output.name] = _from_json(output)
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest):
            raise WrongAnswer(
                f"says binary_data_size = {size!r} for output '{output.name}', with {len(rest)} bytes left"
            )
        arrays[output.name] = _from_bytes(output, rest[:size])
        rest = rest[size:]
    if rest:
        raise WrongAnswer(f"answered with {len(rest)} bytes that belong to no output")
    missing = [name for name in expected.outputs if name not in arrays]
    if missing:
        raise WrongAnswer(f"answered without output '{missing[0]}'")
    return arrays


def _check_identity(answer: Answer, expected: Expected) -> None:
    if answer.model_name != expected.model:
        raise WrongAnswer(f"answered as model '{answer.model_name[:60]}', asked was '{expected.model}'")
    if expected.version and answer.model_version != expected.version:
        raise WrongAnswer(f"answered as version '{str(answer.model_version)[:60]}', asked was '{expected.version}'")
    if answer.id and answer.id != expected.id:
        raise WrongAnswer(f"answered request '{answer.id[:60]}', asked was '{expected.id}'")


def _check_head(output: Output, known: Mapping[str, Any], expected: Expected) -> None:
    name, label = output.name, f"output '{output.name[:60]}'"
    if name not in expected.outputs:
        raise WrongAnswer(f"answered with {label}, which was not asked for")
    if name in known:
        raise WrongAnswer(f"answered with {label} twice")
    dtype, declared = expected.outputs[name]
    if output.datatype != DATATYPE_OF[dtype]:
        raise WrongAnswer(f"gave {label} as {output.datatype[:20]}, model.toml says {DATATYPE_OF[dtype]}")
    wanted = (expected.rows, *declared[1:])
    if not fits(tuple(output.shape), wanted) or min(output.shape, default=0) < 0:
        raise WrongAnswer(f"gave {label} in shape {output.shape[:8]}, expected is {list(wanted)}")


def _bytes_of(array: NDArray[Any]) -> Any:
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(item)) + item for item in map(_as_bytes, array.ravel()))
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)


def _as_bytes(item: Any) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode()


def _json_of(name: str, array: NDArray[Any]) -> list[Any]:
    flat = array.ravel()
    if array.dtype == object:
        try:
            return [_as_bytes(item).decode() for item in flat]
        except UnicodeDecodeError as error:
            raise _cannot_carry(name, "bytes that are no UTF-8") from error
    if array.dtype.kind == "f" and not np.isfinite(flat).all():
        raise _cannot_carry(name, "NaN or an infinity")
    values: list[Any] = flat.tolist()
    return values


def _cannot_carry(name: str, what: str) -> CannotCarry:
    return CannotCarry(
        f"tensor '{name}' holds {what}, and the upstream takes JSON only",
        hint="use an upstream with the extension binary_tensor_data",
    )


def _from_bytes(output: Output, data: memoryview) -> NDArray[Any]:
    dtype = DATATYPES[output.datatype]
    count = math.prod(output.shape)
    if dtype == "object":
        return _shaped(output, _strings(output, data, count))
    wanted = np.dtype(dtype).newbyteorder("<")
    if len(data) != count * wanted.itemsize:
        raise WrongAnswer(
            f"gave output '{output.name}' in {len(data)} bytes, its shape needs {count * wanted.itemsize}"
        )
    if dtype == "bool" and count and np.frombuffer(data, np.uint8).max() > 1:
        raise WrongAnswer(f"gave output '{output.name}' with bytes that are no BOOL")
    array = np.frombuffer(data, wanted)
    aligned = array if array.flags.aligned else array.copy()
    return _shaped(output, aligned.astype(dtype, copy=False))


def _strings(output: Output, data: memoryview, count: int) -> NDArray[Any]:
    items, position = [], 0
    while position + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, position)
        position += 4 + size
        items.append(bytes(data[position - size : position]))
    if position != len(data) or len(items) != count:
        raise WrongAnswer(f"gave output '{output.name}' with BYTES that do not end with their data")
    return _objects(items)


def _objects(items: list[bytes]) -> NDArray[Any]:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def _from_json(output: Output) -> NDArray[Any]:
    elements = _elements(output)
    if len(elements) != math.prod(output.shape):
        raise WrongAnswer(
            f"gave output '{output.name}' with {len(elements)} elements, its shape needs {math.prod(output.shape)}"
        )
    if output.datatype == "BYTES":
        return _shaped(output, _objects([element.encode() for element in elements]))
    dtype = np.dtype(DATATYPES[output.datatype])
    if dtype.kind in "iu" and elements:
        limits = np.iinfo(dtype)
        if min(elements) < limits.min or max(elements) > limits.max:
            raise WrongAnswer(f"gave output '{output.name}' with a value that is no {output.datatype}")
    with np.errstate(over="ignore"):
        array = np.array(elements, dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise WrongAnswer(f"gave output '{output.name}' with a value that is too large for {output.datatype}")
    return _shaped(output, array)


def _elements(output: Output) -> list[Any]:
    """The data, which may be nested. NaN and infinities come as null, which stands for neither: refused."""
    try:
        flat: list[Any] = _FLAT[output.datatype].decode(output.data)
        return flat
    except msgspec.DecodeError:
        pass
    try:
        nested = list(_leaves(msgspec.json.decode(output.data)))
        converted: list[Any] = msgspec.convert(nested, _LISTS.get(output.datatype, list[int]))
        return converted
    except (msgspec.DecodeError, RecursionError) as error:
        raise WrongAnswer(f"gave output '{output.name}' with data that is not {output.datatype}: {error}") from error


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, list):
        for item in data:
            yield from _leaves(item)
    else:
        yield data


def _shaped(output: Output, array: NDArray[Any]) -> NDArray[Any]:
    try:
        return array.reshape(output.shape)
    except ValueError as error:  # a size of zero beside one that no memory has
        raise WrongAnswer(f"gave output '{output.name}' in shape {output.shape[:8]}: {error}") from error
