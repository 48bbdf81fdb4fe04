"""The half of the double of TensorRT that builds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import onnx
from trt_thing import MAGIC, Thing

KINDS = {1: "FLOAT", 10: "HALF", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 2: "UINT8"}


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


def engine_bytes(double: Any, tensors: list[dict[str, Any]], profiles: list[Any]) -> bytes:
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
