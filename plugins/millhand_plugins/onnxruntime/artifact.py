"""A model file and how ONNX Runtime opens it. Imported in workers: Python 3.10, onnxruntime only inside `open`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millhand.errors import ModelError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


@dataclass(frozen=True)
class Artifact:
    """One file, the providers to run it on in order, and the keys of `[plugins.onnxruntime]`."""

    path: Path
    providers: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def on_gpu(self) -> bool:
        return self.providers != ("cpu",)

    def on_cpu(self) -> Artifact:
        """The same file on the CPU."""
        return Artifact(self.path, ("cpu",), self.options)

    def open(self, profile: Path | None = None) -> Any:
        """Return an InferenceSession; with `profile`, one that writes down what runs where, until it is told to stop.

        Raises ModelError naming the file where it is missing or damaged, and where a provider was left out: ONNX
        Runtime would run on the CPU with no more than a log line.
        """
        import onnxruntime  # type: ignore[import-untyped]

        if not self.path.is_file():
            raise ModelError(f"'{self.path}' does not exist", hint="put the artifact there, or mend `artifact`")
        _check_available(self.providers, onnxruntime.get_available_providers())
        if self.on_gpu:
            self._check_visible()
            _preload(onnxruntime)
        made = _session_options(onnxruntime, self.options)
        if profile is not None:
            made.enable_profiling = True
            made.profile_file_prefix = os.fspath(profile)
        try:
            session = onnxruntime.InferenceSession(
                os.fspath(self.path),
                made,
                providers=[(PROVIDERS[name], _provider_options(name, self.options)) for name in self.providers],
                enable_fallback=False,
            )
        except Exception as error:
            raise ModelError(f"'{self.path}' cannot be loaded: {first_line(error)}", hint=_remedy(error)) from error
        self._check_used(onnxruntime, session.get_providers())
        return session

    def _check_visible(self) -> None:
        """CUDA_VISIBLE_DEVICES is the worker's, set by the daemon to one GPU or to none."""
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            wanted = next(name for name in self.providers if name != "cpu")
            raise ModelError(
                f"'{self.path}' asks for the provider '{wanted}', but this worker sees no GPU: "
                "CUDA_VISIBLE_DEVICES is empty",
                hint="look at `millhand profile match` for why, or set providers = ['cpu']",
            )

    def _check_used(self, onnxruntime: Any, used: list[str]) -> None:
        missing = [name for name in self.providers if PROVIDERS[name] not in used]
        if missing:
            why = why_not_loaded(onnxruntime, missing[0])
            raise ModelError(
                f"'{self.path}': ONNX Runtime left out the provider '{missing[0]}' and would run on "
                f"{', '.join(used)}{why}",
                hint=_NEEDED.format(version=onnxruntime.__version__),
            )


_NEEDED = (
    "check the driver (nvidia-smi), and that CUDA and cuDNN have the versions that ONNX Runtime {version} needs "
    "(pip install 'onnxruntime-gpu[cuda,cudnn]' brings them), or set providers = ['cpu']"
)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _check_available(wanted: tuple[str, ...], available: list[str]) -> None:
    for name in wanted:
        if PROVIDERS[name] not in available:
            raise ModelError(
                f"this build of ONNX Runtime has no provider '{name}'",
                hint="install onnxruntime-gpu in place of onnxruntime, or leave the provider out of the options",
            )


def _preload(onnxruntime: Any) -> None:
    """Load CUDA and cuDNN from NVIDIA's wheels where they are installed; the loader would not look there."""
    preload = getattr(onnxruntime, "preload_dlls", None)  # from 1.21 on
    if preload is not None:
        preload()


def why_not_loaded(onnxruntime: Any, name: str) -> str:
    """What the loader says of a provider's library, such as which CUDA library it misses."""
    library = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"
    try:
        ctypes.CDLL(os.fspath(library))
    except OSError as error:
        return f": {error}"
    return ""


def _remedy(error: Exception) -> str:
    text = str(error)
    if "out of memory" in text or "Failed to allocate" in text:
        return "unload another model, raise gpu_bytes_cap, or take a smaller artifact"
    if "CUDA" in text or "CUDNN" in text:
        return "check the driver with nvidia-smi and that its GPU is free, or set providers = ['cpu']"
    return "check that the file is complete and an ONNX model that this ONNX Runtime can run"


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
    made = {"device_id": "0"}
    if name == "cuda":
        made["arena_extend_strategy"] = "kSameAsRequested"  # the default doubles what it takes at each growth
        made["cudnn_conv_algo_search"] = str(options.get("conv_search", "heuristic")).upper()
        made["use_tf32"] = "1" if options.get("tf32") else "0"
        if options.get("gpu_bytes_cap"):
            made["gpu_mem_limit"] = str(options["gpu_bytes_cap"])
    return made
