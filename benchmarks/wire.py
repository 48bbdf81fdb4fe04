"""Requests as bytes and answers as arrays, written from the public protocols and not with the product's own code.

`json` and `binary` are the Open Inference Protocol v2 over HTTP, `binary` with its binary tensor data extension; `grpc`
is ModelInfer of the same protocol; `bytes` is what the bare endpoint takes: nothing but the tensor.
"""

from __future__ import annotations

import http.client
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Headers = Mapping[str, str]

GRPC_PATH = "/inference.GRPCInferenceService/ModelInfer"
HEADER_LENGTH = "inference-header-content-length"
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
"""A batch is summed in another order than a row alone: float32 answers differ in the last digits."""


class WrongAnswer(Exception):
    """A server answered, but not what the model gives."""


@dataclass(frozen=True)
class Request:
    """One inference request of one protocol. `shape` and `output` say how its answer is read."""

    protocol: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    output: str = "logits"

    def http1(self, host: str) -> bytes:
        """The request as HTTP/1.1 bytes for a connection that is kept."""
        headers = {"Host": host, "Content-Length": str(len(self.body)), **self.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {self.path} HTTP/1.1\r\n{head}\r\n".encode() + self.body


def request(
    protocol: str,
    model: str,
    rows: Array,
    *,
    parameters: dict[str, Any] | None = None,
    path: str = "",
    given: str = "input",
    output: str = "logits",
) -> Request:
    """`rows`: [n, ...] float32 of the tensor `given`. The answer is asked for in the protocol's own form.

    Other names than the defaults are for `json` and `binary`.
    """
    path = path or f"/v2/models/{model}/infer"
    tensor = {"name": given, "shape": list(rows.shape), "datatype": "FP32"}
    if protocol == "json":
        # The shortest decimal numbers that give the same float32, as a careful client sends them.
        data = [float(str(value)) for value in rows.ravel()]
        document = {"inputs": [{**tensor, "data": data}], **_parameters(parameters)}
        return Request(protocol, path, _compact(document), {"Content-Type": "application/json"}, output)
    if protocol == "binary":
        raw = rows.tobytes()
        document = {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
            "outputs": [{"name": output, "parameters": {"binary_data": True}}],
            **_parameters(parameters),
        }
        head = _compact(document)
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        return Request(protocol, path, head + raw, headers, output)
    if protocol == "bytes":
        return Request(protocol, path, rows.tobytes(), {"Content-Type": "application/octet-stream"})
    if protocol == "grpc":
        message = infer_message(model, rows)
        return Request(protocol, GRPC_PATH, struct.pack(">BI", 0, len(message)) + message)
    raise ValueError(f"protocol '{protocol}' is none of json, binary, bytes, grpc")


def _parameters(parameters: dict[str, Any] | None) -> dict[str, Any]:
    return {"parameters": parameters} if parameters else {}


def _compact(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def read_answer(request: Request, headers: Headers, body: bytes) -> tuple[str, Array]:
    """The version that answered ("" where the protocol does not say) and its output, flat. `headers` in lower case.

    Raises WrongAnswer where the body is not what the protocol promises.
    """
    try:
        if request.protocol == "bytes":
            return "", np.frombuffer(body, np.float32)
        if request.protocol == "grpc":
            return read_infer_message(body)
        length = headers.get(HEADER_LENGTH)
        head = body if length is None else body[: int(length)]
        document = json.loads(head)
        (tensor,) = [one for one in document["outputs"] if one["name"] == request.output]
        if length is None:
            values = np.array(tensor["data"], np.float32).ravel()
        else:
            values = np.frombuffer(body[int(length) :], np.float32)
            if values.nbytes != tensor["parameters"]["binary_data_size"]:
                raise WrongAnswer("binary_data_size is not what follows")
        return str(document.get("model_version", "")), values
    except (ValueError, KeyError, TypeError) as error:
        raise WrongAnswer(f"{type(error).__name__}: {error} in {body[:200]!r}") from error


def is_right(found: Array, expected: Array) -> bool:
    """Whether an answer is the model's; both are flattened first."""
    return found.size == expected.size and bool(np.allclose(found.ravel(), expected.ravel(), **TOLERANCE))


def verify(address: tuple[str, int], request: Request, expected: Array) -> int:
    """Ask once; returns the size of the answer's body in bytes. Raises WrongAnswer for any but the right one."""
    if request.protocol == "grpc":
        body = _ask_grpc(address, request)
        headers: dict[str, str] = {}
    else:
        connection = http.client.HTTPConnection(*address, timeout=30)
        connection.request("POST", request.path, request.body, request.headers)
        answer = connection.getresponse()
        body = answer.read()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        if answer.status != 200:
            raise WrongAnswer(f"status {answer.status}: {body[:400]!r}")
    _, found = read_answer(request, headers, body)
    if not is_right(found, expected):
        raise WrongAnswer(f"{request.protocol}: {found[:4]} instead of {expected.ravel()[:4]}")
    return len(body) + (5 if request.protocol == "grpc" else 0)


def _ask_grpc(address: tuple[str, int], request: Request) -> bytes:
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(f"{address[0]}:{address[1]}") as channel:
        answer: bytes = channel.unary_unary(GRPC_PATH)(request.body[5:], timeout=30)
    return answer


# ---- the few protobuf fields that an inference needs -----------------------------------------------------------------


def infer_message(model: str, rows: Array) -> bytes:
    """ModelInferRequest: model_name = 1, inputs = 5 (name 1, datatype 2, shape 3), raw_input_contents = 7."""
    shape = b"".join(_varint(size) for size in rows.shape)
    tensor = _bytes_field(1, b"input") + _bytes_field(2, b"FP32") + _bytes_field(3, shape)
    return _bytes_field(1, model.encode()) + _bytes_field(5, tensor) + _bytes_field(7, rows.tobytes())


def read_infer_message(message: bytes) -> tuple[str, Array]:
    """ModelInferResponse: model_version = 2, outputs = 5 (contents 5: fp32_contents 6), raw_output_contents = 6."""
    fields = list(_fields(message))
    version = b"".join(value for number, value in fields if number == 2)
    raw = [value for number, value in fields if number == 6]
    if not raw:
        outputs = [value for number, value in fields if number == 5]
        contents = [value for output in outputs for number, value in _fields(output) if number == 5]
        raw = [value for content in contents for number, value in _fields(content) if number == 6]
    return version.decode(), np.frombuffer(b"".join(raw), np.float32)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a message; numbers between them are passed over."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            varint()
        elif key & 7 == 2:
            size = varint()
            yield key >> 3, message[at : at + size]
            at += size
        else:
            at += 8 if key & 7 == 1 else 4
