"""The session around an InferenceSession. Runs in workers: Python 3.10."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError, MillhandError, ModelError
from millhand.serving.tensors import Tensors
from millhand_plugins.onnxruntime.providers import first_line
from millhand_plugins.onnxruntime.ways import Plain, Way

DTYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(bool)": "bool",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
    "tensor(string)": "object",
}  # fmt: skip


class OnnxruntimeSession:
    """`Session` on the CPU."""

    concurrent = True
    """ONNX Runtime runs one session from any number of threads at once."""

    def __init__(self, session: Any, path: Path) -> None:
        self._name = path.name
        self.inputs: Mapping[str, tuple[str, tuple[int, ...]]] = {
            node.name: _spec(node, path) for node in session.get_inputs()
        }
        self.outputs: Mapping[str, tuple[str, tuple[int, ...]]] = {
            node.name: _spec(node, path) for node in session.get_outputs()
        }
        self._way: Way = Plain(session, list(self.outputs))
        self._texts = [name for name, (dtype, _) in self.inputs.items() if dtype == "object"]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch. Raises ModelError where the model fails, InputError for BYTES that are no UTF-8."""
        if self._texts:
            inputs = self._ready(inputs)
        try:
            return self._way(inputs)
        except MillhandError:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def close(self) -> None:
        self._way = _closed

    def _ready(self, inputs: Tensors) -> Tensors:
        """With texts as ONNX Runtime takes them."""
        return {**inputs, **{name: _decoded(name, inputs[name]) for name in self._texts}}

    def _failure(self, error: Exception) -> MillhandError:
        """What a failed run is told as."""
        return ModelError(
            f"'{self._name}' failed: {first_line(error)}", hint="check the request's values and free dimensions"
        )


def _closed(inputs: Tensors) -> dict[str, NDArray[Any]]:
    raise ModelError("the session is closed", hint="load the model again")


def _decoded(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """ONNX strings are text; BYTES elements come as bytes."""
    texts = np.empty(array.size, dtype=object)
    try:
        texts[:] = [item.decode() if isinstance(item, bytes) else item for item in array.ravel()]
    except UnicodeDecodeError as error:
        raise InputError(f"tensor '{name}' holds bytes that are no UTF-8", hint="send UTF-8 text") from error
    return texts.reshape(array.shape)


def _spec(node: Any, path: Path) -> tuple[str, tuple[int, ...]]:
    if node.type not in DTYPES:
        raise ModelError(f"'{path}': tensor '{node.name}' is a {node.type}, which cannot be served")
    return DTYPES[node.type], tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
