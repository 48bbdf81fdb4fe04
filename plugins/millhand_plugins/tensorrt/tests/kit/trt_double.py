"""A recording double of TensorRT's Python API, one for each version in captures/api.json.

A class has exactly the members that the real one of that version has: any other raises AttributeError, as a call that
is gone does. What a network computes here is y = 2 x + 1, whatever the file says. An engine is JSON behind the magic.
"""

from __future__ import annotations

import enum
import json
import weakref
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx

SURFACES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "captures" / "api.json").read_text())
MAGIC = {"tensorrt": b"ftrt", "tensorrt-rtx": b"vtrt"}
KINDS = {1: "FLOAT", 10: "HALF", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 2: "UINT8"}
SIZES = {"FLOAT": "<f4", "HALF": "<f2", "INT8": "i1", "INT32": "<i4", "INT64": "<i8", "BOOL": "?", "UINT8": "u1"}


class TrtDouble(ModuleType):
    """The module: enumerations and classes of one version, and what was called."""

    def __init__(self, version: str, gpu: Any) -> None:
        library, _, number = version.partition(" ")
        super().__init__(library.replace("-", "_"))
        self.surface = SURFACES[version]
        self.library, self.__version__, self.gpu = library, number, gpu
        self.__spec__ = ModuleSpec(self.__name__, None, origin="a double")
        self.calls: list[str] = []
        self.freed: list[str] = []
        self.build_fault: tuple[str, str] | None = None
        """Code and text that the next build fails with."""
        self.poison: set[str] = set()
        """Outputs that no kernel writes."""
        self.written_by = number
        self.flags = 0
        """EngineInvalidityDiagnostics of every engine."""
        self.silent = False
        """Whether an engine is refused without a word."""
        for name, members in self.surface.items():
            if isinstance(members, dict):
                setattr(self, name, enum.IntEnum(name, members))
        for kind in Thing.__subclasses__():
            if kind.__name__ in self.surface:
                setattr(self, kind.__name__, kind._of(self))
        self.ILogger, self.IErrorRecorder, self.IProgressMonitor = Logger, Listener, Listener


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Logger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class Listener:
    def __init__(self) -> None:
        pass


class Thing:
    """Base of the classes: members that this version lacks are refused, calls and frees are recorded."""

    _double: TrtDouble

    @classmethod
    def _of(cls, double: TrtDouble) -> type[Thing]:
        return type(cls.__name__, (cls,), {"_double": double})

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        self._known(name)
        value = object.__getattribute__(self, name)
        if callable(value) and hasattr(value, "__self__"):
            self._double.calls.append(f"{type(self).__name__}.{name}")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self._known(name)
            self._double.calls.append(f"{type(self).__name__}.{name}=")
        object.__setattr__(self, name, value)

    def _known(self, name: str) -> None:
        if name not in self._double.surface[type(self).__name__]:
            raise AttributeError(f"{self._double.library} {self._double.__version__}: no {type(self).__name__}.{name}")

    def _watch(self) -> None:
        weakref.finalize(self, self._double.freed.append, type(self).__name__)


class Builder(Thing):
    error_recorder: Any = None

    def __init__(self, logger: Any) -> None:
        self._watch()
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        strong = 1 << int(self._double.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert flags == strong, "networks are strongly typed"
        return self._double.INetworkDefinition()

    def create_builder_config(self) -> Any:
        return self._double.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._double.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 4)
        for step in range(4):
            if not monitor.step_complete("Building engine", step):
                monitor.phase_finish("Building engine")
                return None
        monitor.phase_finish("Building engine")
        fault = self._double.build_fault
        if fault is not None:
            self.error_recorder.report_error(self._double.ErrorCodeTRT[fault[0]], fault[1])
            return None
        if config._timing is not None:
            config._timing._content += b" and timed"
        return engine_bytes(self._double, network._tensors, config._profiles)


def engine_bytes(double: TrtDouble, tensors: list[dict[str, Any]], profiles: list[Any]) -> bytes:
    told = {"version": double.written_by, "tensors": tensors, "profiles": [profile._shapes for profile in profiles]}
    return MAGIC[double.library] + json.dumps(told).encode()


class INetworkDefinition(Thing):
    def __init__(self) -> None:
        self._watch()
        self._tensors: list[dict[str, Any]] = []

    @property
    def num_inputs(self) -> int:
        return sum(tensor["input"] for tensor in self._tensors)

    @property
    def num_outputs(self) -> int:
        return len(self._tensors) - sum(tensor["input"] for tensor in self._tensors)

    def get_input(self, index: int) -> Any:
        return self._double.ITensor([tensor for tensor in self._tensors if tensor["input"]][index])


class ITensor(Thing):
    is_shape_tensor = False

    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told

    @property
    def name(self) -> str:
        return str(self._told["name"])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._told["shape"])

    @property
    def dtype(self) -> Any:
        return self._double.DataType[self._told["kind"]]

    def get_dimension_name(self, index: int) -> str | None:
        return self._told["dimensions"][index] or None


class OnnxParser(Thing):
    def __init__(self, network: Any, logger: Any) -> None:
        self._watch()
        self._network, self._faults = network, list[Any]()

    @property
    def num_errors(self) -> int:
        return len(self._faults)

    def get_error(self, index: int) -> Any:
        return self._double.ParserError(self._faults[index])

    def parse_from_file(self, model: str) -> bool:
        graph = onnx.load(model).graph
        for number, node in enumerate(graph.node):
            if node.domain:
                self._faults.append((number, node.name, node.op_type))
                return False
        self._network._tensors = [*told_tensors(graph.input, True), *told_tensors(graph.output, False)]
        return True


def told_tensors(infos: Any, is_input: bool) -> Iterator[dict[str, Any]]:
    for info in infos:
        kind = info.type.tensor_type
        yield {
            "name": info.name,
            "input": is_input,
            "kind": KINDS[kind.elem_type],
            "shape": [-1 if size.dim_param else size.dim_value for size in kind.shape.dim],
            "dimensions": [size.dim_param for size in kind.shape.dim],
        }


class ParserError(Thing):
    def __init__(self, fault: tuple[int, str, str]) -> None:
        self._fault = fault

    def code(self) -> Any:
        return self._double.ErrorCode.UNSUPPORTED_NODE

    def desc(self) -> str:
        return "No importer registered for op"

    def file(self) -> str:
        return "ModelImporter.cpp"

    def func(self) -> str:
        return "parseNode"

    def node(self) -> int:
        return self._fault[0]

    def node_name(self) -> str:
        return self._fault[1]

    def node_operator(self) -> str:
        return self._fault[2]


class IOptimizationProfile(Thing):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [list(min), list(opt), list(max)]


class ITimingCache(Thing):
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content


class IBuilderConfig(Thing):
    builder_optimization_level = 3
    hardware_compatibility_level = None
    progress_monitor = None
    num_compute_capabilities = 0

    def __init__(self) -> None:
        self._watch()
        self._profiles: list[Any] = []
        self._timing: Any = None
        self._flags: list[str] = []
        self._limits: dict[str, int] = {}
        self._capabilities: list[str] = []

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._limits[pool.name] = pool_size

    def set_flag(self, flag: Any) -> None:
        self._flags.append(flag.name)

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        self._capabilities.append(compute_capability.name)
        return True

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return self._double.ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        """Content of another writer is refused, as the library does by the header that it writes."""
        if cache._content.startswith(b"foreign"):
            return False
        self._timing = cache
        return True


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
