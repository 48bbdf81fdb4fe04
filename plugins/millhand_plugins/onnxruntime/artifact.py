"""A model file and how ONNX Runtime opens it. Imported in workers: Python 3.10, onnxruntime only inside `open`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millhand.errors import ModelError, ProviderMissingError
from millhand_plugins.onnxruntime.providers import CPU, Provider, first_line, library_device, read_providers


@dataclass(frozen=True)
class Artifact:
    """One file, the providers to run it on in order, and the keys of `[plugins.onnxruntime]`."""

    path: Path
    providers: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def accelerated(self) -> bool:
        """Whether anything but ONNX Runtime's own CPU provider is asked for."""
        return self.providers != (CPU,)

    def on_cpu(self) -> Artifact:
        """The same file on the CPU."""
        return Artifact(self.path, (CPU,), self.options)

    def with_cuda_graphs(self) -> Artifact:
        """The same file in a session that records CUDA graphs."""
        told = self.options.get("provider_options") or {}
        cuda = {**told.get("cuda", {}), "enable_cuda_graph": "1"}
        return Artifact(self.path, self.providers, {**self.options, "provider_options": {**told, "cuda": cuda}})

    def open(self, profile: Path | None = None) -> Any:
        """Return an InferenceSession; with `profile`, one that writes down what runs where, until it is told to stop.

        Raises ModelError naming the file where it is missing or damaged, and where a provider was left out: ONNX
        Runtime would run on the CPU with no more than a log line.
        """
        import onnxruntime  # type: ignore[import-untyped]

        if not self.path.is_file():
            raise ModelError(f"'{self.path}' does not exist", hint="put the artifact there, or mend `artifact`")
        providers = read_providers(self.providers, self.options)
        self._check_ready(onnxruntime, providers)
        made = _session_options(onnxruntime, self.options)
        if CPU not in self.providers:
            made.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if profile is not None:
            made.enable_profiling = True
            made.profile_file_prefix = os.fspath(profile)
        devices = {one.name: library_device(onnxruntime, one.library) for one in providers if one.library}
        labels = {one.name: devices[one.name].ep_name if one.library else one.label for one in providers}
        arguments = _arguments(providers, labels, self.options)
        if devices and all(one.library or one.name == CPU for one in providers):
            for one in providers:
                if one.library:
                    made.add_provider_for_devices([devices[one.name]], dict(one.options))
            arguments = {}  # the session options name them; a list beside them would take their place
        try:
            session = onnxruntime.InferenceSession(os.fspath(self.path), made, enable_fallback=False, **arguments)
        except Exception as error:
            raise self._failed(onnxruntime, providers, error) from error
        self._check_used(onnxruntime, labels, session.get_providers())
        return session

    def _check_ready(self, onnxruntime: Any, providers: tuple[Provider, ...]) -> None:
        """Whether the build has what is asked for; CUDA's libraries are loaded here."""
        available = onnxruntime.get_available_providers()
        for one in providers:
            if one.library is None and one.label not in available:
                raise ProviderMissingError(
                    f"this build of ONNX Runtime has no provider '{one.name}'",
                    hint="install onnxruntime-gpu in place of onnxruntime (on a Jetson a build for it), or set "
                    "[plugins.onnxruntime] providers = ['cpu']",
                )
        if any(one.on_cuda for one in providers):
            self._check_visible(providers)
            _preload(onnxruntime)

    def _check_visible(self, providers: tuple[Provider, ...]) -> None:
        """CUDA_VISIBLE_DEVICES is the worker's, set by the daemon to one GPU or to none."""
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            wanted = next(one.name for one in providers if one.on_cuda)
            raise ModelError(
                f"'{self.path}' asks for the provider '{wanted}', but this worker sees no GPU: "
                "CUDA_VISIBLE_DEVICES is empty",
                hint="look at `millhand profile match` for why, or set providers = ['cpu']",
            )

    def _failed(self, onnxruntime: Any, providers: tuple[Provider, ...], error: Exception) -> ModelError:
        text = f"'{self.path}' cannot be loaded: {first_line(error)}"
        if "ep_fallback" in str(error) or "fallback to CPU EP has been explicitly disabled" in str(error):
            return ModelError(text, hint="some of its nodes need the CPU: add 'cpu' to `providers`")
        if "TensorRT" in str(error) and "install" in str(error):
            text += why_not_loaded(onnxruntime, "tensorrt")
            return ModelError(text, hint=_NEEDED.format(version=onnxruntime.__version__))
        return ModelError(text, hint=_remedy(error))

    def _check_used(self, onnxruntime: Any, labels: Mapping[str, str], used: list[str]) -> None:
        missing = [name for name, label in labels.items() if label not in used and name != CPU]
        if missing:
            why = why_not_loaded(onnxruntime, missing[0])
            raise ModelError(
                f"'{self.path}': ONNX Runtime left out the provider '{missing[0]}' and would run on "
                f"{', '.join(used)}{why}",
                hint=_NEEDED.format(version=onnxruntime.__version__),
            )


_NEEDED = (
    "check the driver (nvidia-smi), and that CUDA, cuDNN and TensorRT have the versions that ONNX Runtime {version} "
    "needs (pip install 'onnxruntime-gpu[cuda,cudnn]' brings the first two), or set providers = ['cpu']"
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


def _arguments(
    providers: tuple[Provider, ...], labels: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, Any]:
    return {"providers": [(labels[one.name], {**_defaults(one, options), **one.options}) for one in providers]}


def _defaults(provider: Provider, options: Mapping[str, Any]) -> dict[str, str]:
    """What millhand tells a provider where the owner says nothing."""
    if not provider.on_cuda:
        return {}
    # CUDA_VISIBLE_DEVICES shows a worker one device only, which is number 0 there.
    made = {"device_id": "0"}
    if provider.name == "cuda":
        made["arena_extend_strategy"] = "kSameAsRequested"  # the default doubles what it takes at each growth
        made["cudnn_conv_algo_search"] = str(options.get("conv_search", "heuristic")).upper()
        made["use_tf32"] = "1" if options.get("tf32") else "0"
        cap = options.get("gpu_bytes_cap") or options.get("memory_bytes_cap")
        if cap:
            made["gpu_mem_limit"] = str(cap)
    return made
