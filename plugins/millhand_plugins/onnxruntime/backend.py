"""The backend and its session. Imported in workers: Python 3.10, and onnxruntime only inside `load`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError, ModelError
from millhand.serving.tensors import check_inputs

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
DTYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(bool)": "bool",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
    "tensor(string)": "object",
}  # fmt: skip
NO_LIMIT = 1 << 31


class OnnxruntimeBackend:
    """`Backend` for .onnx and .ort files."""

    name = "onnxruntime"
    suffixes: tuple[str, ...] = (".onnx", ".ort")

    def load(self, artifact: Path, accelerator: str, options: Mapping[str, Any]) -> OnnxruntimeSession:
        """Load one file. `options`: the keys of `[plugins.onnxruntime]`.

        Raises ModelError naming the file where it is missing or damaged, or where a provider was left out.
        """
        import onnxruntime  # type: ignore[import-untyped]

        if not artifact.is_file():
            raise ModelError(f"'{artifact}' does not exist", hint="put the artifact there, or mend `artifact`")
        wanted = list(options.get("providers") or (("cpu",) if accelerator == "cpu" else ("cuda", "cpu")))
        _check_available(wanted, onnxruntime.get_available_providers())
        try:
            session = onnxruntime.InferenceSession(
                os.fspath(artifact),
                _session_options(onnxruntime, options),
                providers=[(PROVIDERS[name], _provider_options(name, options)) for name in wanted],
            )
        except Exception as error:
            raise ModelError(
                f"'{artifact}' cannot be loaded: {_first_line(error)}",
                hint="check that the file is complete and an ONNX model that this ONNX Runtime can run",
            ) from error
        _check_used(wanted, session.get_providers(), artifact)
        return OnnxruntimeSession(session, artifact)


class OnnxruntimeSession:
    """`Session` around an InferenceSession."""

    def __init__(self, session: Any, artifact: Path) -> None:
        self._session: Any = session
        self._name = artifact.name
        self.inputs: Mapping[str, tuple[str, tuple[int, ...]]] = {
            node.name: _spec(node, artifact) for node in session.get_inputs()
        }
        self.outputs: Mapping[str, tuple[str, tuple[int, ...]]] = {
            node.name: _spec(node, artifact) for node in session.get_outputs()
        }
        self._output_names = list(self.outputs)
        self._texts = [name for name, (dtype, _) in self.inputs.items() if dtype == "object"]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch. Raises InputError for a wrong name, dtype or shape, ModelError where the model fails."""
        check_inputs(self._name, self.inputs, inputs, NO_LIMIT)
        if self._texts:
            inputs = {**inputs, **{name: _decoded(name, inputs[name]) for name in self._texts}}
        try:
            outputs = self._session.run(self._output_names, inputs)
        except Exception as error:
            raise ModelError(
                f"'{self._name}' failed: {_first_line(error)}", hint="check the request's values and free dimensions"
            ) from error
        return dict(zip(self._output_names, outputs))  # noqa: B905 (Python 3.10; ONNX Runtime gives one each)

    def close(self) -> None:
        self._session = None


def _decoded(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """ONNX strings are text; BYTES elements come as bytes."""
    texts = np.empty(array.size, dtype=object)
    try:
        texts[:] = [item.decode() if isinstance(item, bytes) else item for item in array.ravel()]
    except UnicodeDecodeError as error:
        raise InputError(f"tensor '{name}' holds bytes that are no UTF-8", hint="send UTF-8 text") from error
    return texts.reshape(array.shape)


def _session_options(onnxruntime: Any, options: Mapping[str, Any]) -> Any:
    levels = onnxruntime.GraphOptimizationLevel
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = int(options.get("threads") or 1)
    made.inter_op_num_threads = 1
    made.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    made.enable_cpu_mem_arena = bool(options.get("arena", False))
    made.enable_mem_pattern = bool(options.get("memory_pattern", True))
    made.log_severity_level = 3  # errors; they also come as exceptions
    made.graph_optimization_level = {
        "none": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[options.get("optimization", "all")]
    made.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.get("spinning") else "0")
    made.add_session_config_entry("session.disable_prepacking", "0" if options.get("prepacking", True) else "1")
    return made


def _provider_options(name: str, options: Mapping[str, Any]) -> dict[str, str]:
    if name == "cpu":
        return {}
    # CUDA_VISIBLE_DEVICES shows a worker one device only, which is number 0 there.
    return {"device_id": "0"}


def _check_available(wanted: list[str], available: list[str]) -> None:
    for name in wanted:
        if PROVIDERS[name] not in available:
            raise ModelError(
                f"this build of ONNX Runtime has no provider '{name}'",
                hint="install onnxruntime-gpu in place of onnxruntime, or leave the provider out of the options",
            )


def _check_used(wanted: list[str], used: list[str], artifact: Path) -> None:
    """ONNX Runtime falls back to the CPU with no more than a log line; here that is an error."""
    missing = [name for name in wanted if PROVIDERS[name] not in used]
    if missing:
        raise ModelError(
            f"'{artifact}': ONNX Runtime left out the provider '{missing[0]}' and would run on {', '.join(used)}",
            hint="check driver, CUDA and cuDNN versions against ONNX Runtime's, or set providers = ['cpu']",
        )


def _spec(node: Any, artifact: Path) -> tuple[str, tuple[int, ...]]:
    if node.type not in DTYPES:
        raise ModelError(f"'{artifact}': tensor '{node.name}' is a {node.type}, which cannot be served")
    return DTYPES[node.type], tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
