"""An engine file and its tensors; refused with a reason where this machine cannot run it. Python 3.10."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millhand.errors import ModelError
from millhand_plugins.tensorrt.datatypes import numpy_name
from millhand_plugins.tensorrt.faults import NOISE, brief
from millhand_plugins.tensorrt.library import AUTO, Library, library_of, load_library
from millhand_plugins.tensorrt.lifetimes import drop_frames
from millhand_plugins.tensorrt.listeners import make_logger, make_recorder
from millhand_plugins.tensorrt.shapes import Extent

if TYPE_CHECKING:
    from millhand_plugins.tensorrt import api

BUILD_HINT = "build it anew on this machine: millhand model build"
DRIVER_HINT = "install or update the NVIDIA driver; look at nvidia-smi"
# What the library says -> what is wrong, and what to do.
REFUSALS = (
    (
        re.compile(r"does not support this compute capability|cannot be rebuilt", re.I),
        "was built for another GPU",
        "the library has no code for this GPU: build with TensorRT, or serve the model with the backend onnxruntime",
    ),
    (
        re.compile(r"compute capability|incompatible device|UNSUPPORTED_CC|different (?:GPU|device)", re.I),
        "was built for another GPU",
        BUILD_HINT,
    ),
    (
        re.compile(r"magicTag|serialization version|library version|VERSION_MISMATCH|expecting.*version", re.I),
        "was built by another library or version, or is damaged",
        BUILD_HINT,
    ),
    (re.compile(r"bufferSize|blobSize|empty memory|checksum|MALFORMED", re.I), "is damaged or cut off", BUILD_HINT),
    (
        re.compile(r"host code|lean runtime", re.I),
        "brings code for the CPU, which may not run here",
        "set [plugins.tensorrt] host_code = true where every engine is proved and signed",
    ),
    (
        re.compile(r"out of memory|bad_alloc|INSUFFICIENT_GPU_MEMORY", re.I),
        "does not fit into the memory that is free",
        "unload other models (millhand model list), or take a smaller artifact",
    ),
    (
        re.compile(r"driver version is insufficient|no CUDA-capable|OLD_CUDA|cudaError|CUDA_ERROR", re.I),
        "needs an NVIDIA GPU with a driver that is new enough",
        DRIVER_HINT,
    ),
)


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an engine."""

    name: str
    dtype: str
    """NumPy's name."""
    shape: tuple[int, ...]
    """-1 for free dimensions."""
    is_input: bool


class Engine:
    """A deserialised engine, and what must live as long as it does."""

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        """Raises ModelError naming the file, what is wrong with it here, and the remedy."""
        self.path = path
        data = _read(path)
        self.library: Library = load_library(library_of(data, str(options.get("library", AUTO))))
        self._logger = make_logger(self.library)
        self._recorder = make_recorder(self.library)
        self._runtime: api.Runtime | None = None
        self.trt: Any = None
        self.tensors: Sequence[TensorSpec] = ()
        self.profiles: Sequence[Mapping[str, Extent]] = ()
        try:
            self._open(data, bool(options.get("host_code")))
        except BaseException as error:
            drop_frames(error)
            self.close()
            raise error

    @property
    def inputs(self) -> list[TensorSpec]:
        return [tensor for tensor in self.tensors if tensor.is_input]

    @property
    def outputs(self) -> list[TensorSpec]:
        return [tensor for tensor in self.tensors if not tensor.is_input]

    def said(self) -> str:
        """The newest error that the library reported, for the message of a failure."""
        texts = [text for _, text in self._recorder.errors] + list(self._logger.said)
        return brief(texts[-1]) if texts else "no reason was given"

    def close(self) -> None:
        """Free it; contexts must be gone. May be called twice."""
        self.trt = None
        self._runtime = None

    def _open(self, data: bytes, host_code: bool) -> None:
        self._runtime = self._start()
        self._runtime.error_recorder = self._recorder
        if host_code:
            self._runtime.engine_host_code_allowed = True
        found = self._runtime.deserialize_cuda_engine(data)
        if found is None:
            raise self._refusal(data)
        self.trt = found
        self.tensors = [self._tensor(number) for number in range(found.num_io_tensors)]
        self.profiles = [self._profile(number) for number in range(found.num_optimization_profiles)]

    def _start(self) -> api.Runtime:
        try:
            runtime: api.Runtime = self.library.trt.Runtime(self._logger)
        except TypeError as error:  # TensorRT makes none where CUDA does not start
            raise ModelError(
                f"{self.library.title} does not start: {brief(' '.join(self._logger.said)) or error}", hint=DRIVER_HINT
            ) from error
        return runtime

    def _tensor(self, number: int) -> TensorSpec:
        engine: api.ICudaEngine = self.trt
        name = engine.get_tensor_name(number)
        trt_names = self.library.trt
        dtype = numpy_name(self.library, engine.get_tensor_dtype(name))
        is_input = engine.get_tensor_mode(name) == trt_names.TensorIOMode.INPUT
        if not dtype or engine.is_shape_inference_io(name):
            what = f"is {engine.get_tensor_dtype(name)}" if not dtype else "decides shapes by its values"
            raise ModelError(
                f"'{self.path.name}': tensor '{name}' {what}, which cannot be served",
                hint="export the model with inputs and outputs of float32, float16, int8, int32, int64, uint8 or bool "
                "whose values decide no shapes",
            )
        return TensorSpec(name, dtype, tuple(engine.get_tensor_shape(name)), is_input)

    def _profile(self, number: int) -> dict[str, Extent]:
        engine: api.ICudaEngine = self.trt
        made = {}
        for tensor in self.inputs:
            low, best, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(tensor.name, number))
            made[tensor.name] = Extent(low, best, high)
        return made

    def _refusal(self, data: bytes) -> ModelError:
        said = [*(text for _, text in self._recorder.errors), *self._logger.said]
        told = [text for text in said if not NOISE.search(text)] or said
        diagnosis = self._diagnosis(data)
        # Its words first: a file that is cut off has the flags of its head alone.
        for texts in (told, [diagnosis]):
            for pattern, what, hint in REFUSALS:
                text = next((text for text in texts if pattern.search(text)), None)
                if text is not None:
                    message = f"engine '{self.path.name}' {what} ({self.library.title}: {brief(text)})"
                    return ModelError(message, hint=hint)
        reason = brief(told[0]) if told else diagnosis or "no reason was given"
        return ModelError(f"engine '{self.path.name}' was refused by {self.library.title}: {reason}", hint=BUILD_HINT)

    def _diagnosis(self, data: bytes) -> str:
        """TensorRT-RTX says in flags what does not fit; empty for TensorRT, which has no such call."""
        runtime: Any = self._runtime
        flags = getattr(self.library.trt, "EngineInvalidityDiagnostics", None)
        if flags is None or not hasattr(runtime, "get_engine_validity"):
            return ""
        _, bits = runtime.get_engine_validity(data)
        return ", ".join(name for name, flag in flags.__members__.items() if int(bits) & int(flag))


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}", hint="put the engine there") from error
    if not data:
        raise ModelError(f"engine '{path.name}' is empty", hint=BUILD_HINT)
    return data
