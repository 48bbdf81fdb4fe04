"""The head of an ONNX file, read without the package onnx, which a node may lack. Python 3.10.

An ONNX file is a protobuf message ModelProto (onnx.proto of onnx): field 1 is the IR version, 7 the graph, 8 the
operator sets. TensorRT's parsers do not refuse what is newer than they are: they take it for what they know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from millhand.errors import ModelError
from millhand_plugins.tensorrt.library import Library

IR_VERSION, GRAPH, OPERATOR_SETS = 1, 7, 8
DOMAIN, VERSION = 1, 2
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
VARINT_BYTES_CAP = 10
OPERATOR_SET_BYTES_CAP = 4096
STANDARD_DOMAINS = ("", "ai.onnx")
NO_MODEL_HINT = "check that the file is complete and an ONNX model: copy or export it again"


@dataclass(frozen=True)
class Head:
    ir_version: int
    opset: int
    """Of the standard operators; 0 where the file names none."""


def check_head(path: Path, library: Library) -> Head:
    """Raises ModelError where the file is no ONNX model, or uses a newer operator set than the parser documents."""
    head = read_head(path)
    newest = library.newest_opset
    if newest and head.opset > newest:
        raise ModelError(
            f"'{path.name}' uses opset {head.opset}, the parser of {library.title} knows those up to {newest}",
            hint=f"export the model with an opset of at most {newest}, or update {library.traits.title}",
        )
    return head


def read_head(path: Path) -> Head:
    """Raises ModelError where the file cannot be read, or holds no model."""
    try:
        with path.open("rb") as file:
            head, has_graph = _read(file, path.stat().st_size)
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}", hint="put the artifact there") from error
    except (ValueError, EOFError) as error:
        raise ModelError(f"'{path.name}' is no ONNX model: {error}", hint=NO_MODEL_HINT) from error
    if not has_graph:
        raise ModelError(f"'{path.name}' is no ONNX model: it holds no graph", hint=NO_MODEL_HINT)
    return head


def _read(file: BinaryIO, size: int) -> tuple[Head, bool]:
    ir_version, opset, has_graph = 0, 0, False
    while file.tell() < size:
        field, value, length = _next(file, size)
        if field == IR_VERSION:
            ir_version = value
        elif field == GRAPH:
            has_graph = length > 0
        elif field == OPERATOR_SETS:
            if length > OPERATOR_SET_BYTES_CAP:
                raise ValueError("its operator sets are not readable")
            opset = max(opset, _opset(file, file.tell() + length))
            continue
        file.seek(length, 1)
    return Head(ir_version, opset), has_graph


def _opset(file: BinaryIO, end: int) -> int:
    """The version in an OperatorSetIdProto, 0 for another domain than the standard's."""
    domain, version = b"", 0
    while file.tell() < end:
        field, value, length = _next(file, end)
        data = file.read(length)
        if field == DOMAIN:
            domain = data
        elif field == VERSION:
            version = value
    return version if domain.decode("utf-8", "replace") in STANDARD_DOMAINS else 0


def _next(file: BinaryIO, end: int) -> tuple[int, int, int]:
    """A field's number, its value where it is a varint, and the bytes that it has behind its head."""
    tag = _varint(file)
    field, kind = tag >> 3, tag & 7
    value = length = 0
    if kind == VARINT:
        value = _varint(file)
    elif kind == LENGTH:
        length = _varint(file)
    elif kind in (FIXED64, FIXED32):
        length = 8 if kind == FIXED64 else 4
    else:
        raise ValueError("its bytes are no protobuf message")
    if field == 0 or file.tell() + length > end:
        raise ValueError("it is damaged or cut off")
    return field, value, length


def _varint(file: BinaryIO) -> int:
    value = 0
    for number in range(VARINT_BYTES_CAP):
        byte = file.read(1)
        if not byte:
            raise EOFError("it is cut off")
        value |= (byte[0] & 0x7F) << (7 * number)
        if byte[0] < 0x80:
            return value
    raise ValueError("its bytes are no protobuf message")
