"""The half of the double of TensorRT that runs."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
from trt_thing import MAGIC, Thing

SIZES = {"FLOAT": "<f4", "HALF": "<f2", "INT8": "i1", "INT32": "<i4", "INT64": "<i8", "BOOL": "?", "UINT8": "u1"}


class Runtime(Thing):
    engine_host_code_allowed = False

    def __init__(self, logger: Any) -> None:
        self._watch()
        self.error_recorder = None

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        magic = MAGIC[self._double.library]
        if not serialized_engine.startswith(magic):
            return self._refuse("Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
        if not serialized_engine.endswith(b"}"):
            return self._refuse("Serialization assertion plan.header.size == blobSize failed. In parsePlan")
        told = json.loads(serialized_engine[len(magic) :])
        if told["version"] != self._double.__version__:
            return self._refuse(
                "The engine plan file is not compatible with this version of TensorRT, expecting library version "
                f"{self._double.__version__} got {told['version']}, please rebuild."
            )
        return self._double.ICudaEngine(told)

    def get_engine_validity(self, buffer: bytes) -> Any:
        return self._double.EngineValidity.INVALID, self._double.flags

    def _refuse(self, text: str) -> None:
        if not self._double.silent:
            self.error_recorder.report_error(self._double.ErrorCodeTRT.INTERNAL_ERROR, text)


class ICudaEngine(Thing):
    num_layers = 3

    def __init__(self, told: dict[str, Any]) -> None:
        self._watch()
        self._tensors, self._profiles = told["tensors"], told["profiles"]

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return str(self._tensors[index]["name"])

    def get_tensor_dtype(self, name: str) -> Any:
        return self._double.DataType[self._tensor(name)["kind"]]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._double.TensorIOMode
        return modes.INPUT if self._tensor(name)["input"] else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self._tensor(name)["shape"])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return list(self._profiles[profile_index][name])

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self, runtime_config: Any = None) -> Any:
        return self._double.IExecutionContext(self)

    def create_runtime_config(self) -> Any:
        return self._double.IRuntimeConfig()

    def _tensor(self, name: str) -> dict[str, Any]:
        return next(tensor for tensor in self._tensors if tensor["name"] == name)


class IRuntimeConfig(Thing):
    cuda_graph_strategy = None

    def create_runtime_cache(self) -> Any:
        return self._double.IRuntimeCache()

    def set_runtime_cache(self, cache: Any = None) -> bool:
        return True


class IRuntimeCache(Thing):
    def __init__(self) -> None:
        self._content = b""

    def deserialize(self, blob: bytes) -> bool:
        if blob.startswith(b"foreign"):
            return False
        self._content = blob
        return True

    def serialize(self) -> bytes:
        return self._content or b"compiled"


class IExecutionContext(Thing):
    def __init__(self, engine: Any) -> None:
        self._watch()
        self._engine, self._profile = engine, -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return stream_handle in self._double.gpu.streams

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self._engine._profiles[self._profile][name]
        fits = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if fits:
            self._shapes[name] = tuple(shape)
        return fits

    def infer_shapes(self) -> list[str]:
        names = [tensor["name"] for tensor in self._engine._tensors if tensor["input"]]
        return [name for name in names if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        rows, *rest = next(iter(self._shapes.values()))
        told = self._engine._tensor(name)["shape"]
        return (rows, *(size if size != -1 else other for size, other in zip(told[1:], rest, strict=False)))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, engine = self._double.gpu, self._engine
        gpu.need_context("execute")
        shapes = {tensor["name"]: self.get_tensor_shape(tensor["name"]) for tensor in engine._tensors}
        addresses = dict(self._addresses)
        work = SimpleNamespace(shapes=shapes, addresses=addresses, engine=engine, double=self._double)
        gpu.streams[stream_handle].put(lambda: compute(work))
        return True


def compute(work: Any) -> None:
    """y = 2 x + 1 of the first input, for every output, each row brought to its shape."""
    gpu, tensors = work.double.gpu, work.engine._tensors
    source = next(tensor for tensor in tensors if tensor["input"])
    x = _array(gpu, work, source).astype(np.float64)
    for tensor in tensors:
        if not tensor["input"] and tensor["name"] not in work.double.poison:
            target = _array(gpu, work, tensor)
            for row, values in zip(target, 2 * x + 1, strict=True):
                row[...] = np.resize(values, row.shape).astype(target.dtype)


def _array(gpu: Any, work: Any, tensor: dict[str, Any]) -> np.ndarray:
    shape, dtype = work.shapes[tensor["name"]], np.dtype(SIZES[tensor["kind"]])
    size = int(np.prod(shape)) * dtype.itemsize
    return gpu.memory(work.addresses[tensor["name"]], size).view(dtype).reshape(shape)
