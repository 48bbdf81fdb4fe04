"""TensorRT's datatypes under NumPy's names. Python 3.10."""

from __future__ import annotations

from typing import Any

from millhand_plugins.tensorrt.library import Library

# Those that tensors of the Open Inference Protocol have; bfloat16, fp8, fp4 and int4 stay inside a network.
NAMES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "UINT8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


def numpy_name(library: Library, dtype: Any) -> str:
    """The NumPy name of a datatype; empty where NumPy has none."""
    kinds = library.trt.DataType
    return next((name for kind, name in NAMES.items() if dtype == getattr(kinds, kind)), "")
