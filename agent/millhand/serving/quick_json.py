"""JSON requests of numbers read by simdjson: numbers go from text to an array without becoming Python objects.

What it does not read (strings, truth values, anything unusual or wrong) is left to the plain reader, which says what is
wrong. So is everything where the package `pysimdjson` is missing. The two readers agree: a test compares them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BOM = b"\xef\xbb\xbf"

try:
    from simdjson import Array, Object, Parser
except ImportError:  # no wheel for this platform
    Parser = None  # type: ignore[assignment,misc]

# Element types of simdjson's buffers, and NumPy's word for them.
_FLOAT, _SIGNED, _UNSIGNED = ("d", np.dtype("f8")), ("i", np.dtype("i8")), ("u", np.dtype("u8"))
_READ_AS = {
    "FP16": _FLOAT, "FP32": _FLOAT, "FP64": _FLOAT, "INT8": _SIGNED, "INT16": _SIGNED, "INT32": _SIGNED,
    "INT64": _SIGNED, "UINT8": _UNSIGNED, "UINT16": _UNSIGNED, "UINT32": _UNSIGNED, "UINT64": _UNSIGNED,
}  # fmt: skip
# A parser keeps memory for the largest document that it has read.
_KEPT_BYTES_CAP = 1 << 20
_SMALLEST_BYTES = 256

_parser = None if Parser is None else Parser()


def read_quickly(body: bytes | memoryview) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """(the request without its data, input name -> its elements as float64, int64 or uint64), or None: read it plainly.

    Not thread-safe.
    """
    global _parser  # noqa: PLW0603 (one parser a process: it owns the memory that a document needs)
    if _parser is None or len(body) < _SMALLEST_BYTES or body[:3] == BOM:  # simdjson would read over it
        return None
    parser = _parser if len(body) <= _KEPT_BYTES_CAP else Parser()
    try:
        return _read(parser, body)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError):
        _parser = Parser()  # the failed document may still be held by the traceback
        return None


def _read(parser: Any, body: bytes | memoryview) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    document = parser.parse(body)
    if not isinstance(document, Object):
        return None
    request: dict[str, Any] = {"inputs": []}
    elements: dict[str, NDArray[Any]] = {}
    found: Any = document
    for key in _keys(found):
        if key != "inputs":
            request[key] = _plain(found[key])
    tensor: Any
    for tensor in found["inputs"]:
        head = {key: _plain(tensor[key]) for key in _keys(tensor) if key != "data"}
        code, dtype = _READ_AS[head["datatype"]]
        if head["name"] in elements:
            return None
        elements[head["name"]] = np.frombuffer(tensor["data"].as_buffer(of_type=code), dtype)
        request["inputs"].append(head)
    return request, elements


def _keys(found: Any) -> list[str]:
    """An object's keys. Raises KeyError where one comes twice: simdjson would take its first value, others the last."""
    keys = list(found)
    if len(set(keys)) != len(keys):
        raise KeyError
    return keys


def _plain(value: Any) -> Any:
    if isinstance(value, Object):
        return value.as_dict()
    return value.as_list() if isinstance(value, Array) else value
