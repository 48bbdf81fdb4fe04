"""From an ONNX file to the bytes of an engine. Python 3.10.

TensorRT's objects hold each other by bare pointers. They are freed in the order of `_Build.close`, and what listens to
them lives longest.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from millhand.errors import ModelError
from millhand.serving.tensors import Specs
from millhand.workshop.recipe import Job
from millhand_plugins.tensorrt.cache import CacheFile
from millhand_plugins.tensorrt.datatypes import numpy_name
from millhand_plugins.tensorrt.faults import build_fault, parse_fault
from millhand_plugins.tensorrt.library import Library
from millhand_plugins.tensorrt.lifetimes import drop_frames
from millhand_plugins.tensorrt.listeners import make_logger, make_monitor, make_recorder
from millhand_plugins.tensorrt.onnx_file import check_head
from millhand_plugins.tensorrt.shapes import NetworkInput, Profile, Traffic, make_profiles

if TYPE_CHECKING:
    from millhand_plugins.tensorrt import api

READ_SHARE, BUILT_SHARE = 0.05, 0.95
"""Shares of the progress at which the model is read and the engine is built."""
HARDWARE_LEVELS = {"ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}


def build_plan(library: Library, job: Job, cache: CacheFile | None) -> tuple[bytes, tuple[str, ...]]:
    """Return the engine's bytes, and notes for people.

    cache: of kernels' times; None for a library without. Raises ModelError naming node, operator and remedy, and
    whatever `job.progress` raises to end the build.
    """
    check_head(job.model, library)
    build = _Build(library, job)
    try:
        build.parse()
        profiles = build.profiles()
        job.progress(READ_SHARE, "model read")
        plan = build.run(profiles, cache)
    except BaseException as error:
        drop_frames(error)
        build.close()
        raise error
    build.close()
    return plan, _notes(library, job, profiles)


class _Build:
    """One build, and the objects of the library that it needs."""

    def __init__(self, library: Library, job: Job) -> None:
        self._library, self._job = library, job
        self._file = job.model.name
        flags = library.trt.NetworkDefinitionCreationFlag
        self._logger = make_logger(library)
        self._recorder = make_recorder(library)
        self._monitor = make_monitor(library, functools.partial(_tell, job))
        self._builder: api.Builder = self._start()
        # The bit of the flag is not the same in all versions.
        self._network: api.INetworkDefinition = self._builder.create_network(1 << int(flags.STRONGLY_TYPED))
        self._parser: api.OnnxParser | None = library.trt.OnnxParser(self._network, self._logger)
        self._config: api.IBuilderConfig | None = None

    def _start(self) -> api.Builder:
        try:
            builder: api.Builder = self._library.trt.Builder(self._logger)
        except TypeError as error:  # TensorRT makes none where CUDA does not start
            raise build_fault(self._file, self._library, [], list(self._logger.said) or [str(error)]) from error
        return builder

    def parse(self) -> None:
        """Read the file into the network. Raises ModelError."""
        parser = self._parser
        assert parser is not None
        # From the file rather than from bytes: external data lie beside it.
        if not parser.parse_from_file(os.fspath(self._job.model)):
            errors = [parser.get_error(number) for number in range(parser.num_errors)]
            raise parse_fault(self._file, self._library, errors, list(self._logger.said))
        self._check_tensors()
        # Only now: TensorRT-RTX 1.7.1 crashes when it frees a network whose parser has had a recorder.
        self._builder.error_recorder = self._recorder

    def _check_tensors(self) -> None:
        """Raises ModelError where the network takes other tensors than model.toml declares."""
        network = self._network
        inputs = [network.get_input(number) for number in range(network.num_inputs)]
        if not network.num_outputs:
            raise ModelError(f"'{self._file}' has no outputs", hint="export the model again")
        for tensor in inputs:
            declared = self._job.inputs.get(tensor.name)
            if declared is None:
                raise ModelError(
                    f"'{self._file}' needs input '{tensor.name}', which model.toml does not declare",
                    hint="add it to model.toml",
                )
            if tensor.is_shape_tensor:
                raise ModelError(
                    f"'{self._file}': the values of input '{tensor.name}' decide shapes; such inputs cannot be served",
                    hint="export the model with that value as a constant",
                )
            dtype = numpy_name(self._library, tensor.dtype)
            if dtype != declared[0]:
                raise ModelError(
                    f"'{self._file}': {self._library.traits.title} takes input '{tensor.name}' as "
                    f"{dtype or tensor.dtype}, model.toml declares {declared[0]}",
                    hint="export the model with inputs that TensorRT keeps: float32, float16, int8, int32, int64, "
                    "uint8 or bool",
                )
        gone = [name for name in self._job.inputs if name not in {tensor.name for tensor in inputs}]
        if gone:
            raise ModelError(
                f"'{self._file}' has no input '{gone[0]}', which model.toml declares", hint="mend model.toml"
            )

    def profiles(self) -> list[Profile]:
        """Optimisation profiles for the network's inputs. Raises ModelError for a free dimension without a range."""
        network = self._network
        inputs = []
        for number in range(network.num_inputs):
            tensor = network.get_input(number)
            shape = tuple(tensor.shape)
            names = tuple(tensor.get_dimension_name(axis) or "" for axis in range(len(shape)))
            inputs.append(NetworkInput(tensor.name, shape, names))
        traffic = Traffic(self._job.max_batch, self._job.typical_batch, self._job.options.get("ranges") or {})
        specs: Specs = self._job.inputs
        return make_profiles(inputs, specs, traffic, profile_of_one=self._library.traits.profile_of_one)

    def run(self, profiles: Sequence[Profile], cache: CacheFile | None) -> bytes:
        """Build. Raises ModelError, or what ended the build."""
        self._config = config = self._builder.create_builder_config()
        configure(self._library, config, self._job)
        for profile in profiles:
            made = self._builder.create_optimization_profile()
            for name, extent in profile.items():
                made.set_shape(name, extent.lowest, extent.usual, extent.highest)
            config.add_optimization_profile(made)
        config.progress_monitor = self._monitor
        kept = _attach(config, cache)
        plan: Any = self._builder.build_serialized_network(self._network, config)
        if self._monitor.ended is not None:
            raise self._monitor.ended
        if plan is None:
            raise build_fault(self._file, self._library, list(self._recorder.errors), list(self._logger.said))
        if cache is not None and kept is not None:
            cache.write(bytes(kept.serialize()))
        return bytes(plan)

    def close(self) -> None:
        """Free what the library holds. The parser goes before the network that it fills."""
        self._config = None
        self._parser = None
        del self._network, self._builder


def _tell(job: Job, share: float, phase: str) -> None:
    job.progress(READ_SHARE + share * (BUILT_SHARE - READ_SHARE), phase)


def configure(library: Library, config: api.IBuilderConfig, job: Job) -> None:
    """Set what the owner's table asks for. Raises ModelError where this library or version cannot do it."""
    trt, options = library.trt, job.options
    config.builder_optimization_level = int(options.get("optimization_level", 3))
    cap = int(options.get("workspace_bytes_cap") or job.target.memory_bytes // 2)
    if cap:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, cap)
    if library.traits.ahead:
        _set_capability(library, config, job)
    if options.get("version_compatible"):
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if not library.traits.lean_runtime:
            config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.get("refit"):
        if library.traits.ahead and not job.target.runs_here:
            raise ModelError(
                f"{library.traits.title} builds engines that can be refitted only where the GPU is",
                hint="set [plugins.tensorrt] refit = false, or build on the target itself",
            )
        config.set_flag(trt.BuilderFlag.REFIT)
    level = str(options.get("hardware_compatibility", "none"))
    if level != "none" and library.traits.hardware_levels:
        known = getattr(trt.HardwareCompatibilityLevel, HARDWARE_LEVELS[level], None)
        if known is None:
            raise ModelError(
                f"{library.title} does not know [plugins.tensorrt] hardware_compatibility = '{level}'",
                hint="it came with TensorRT 10.13; set 'ampere_plus' or 'none'",
            )
        config.hardware_compatibility_level = known


def _set_capability(library: Library, config: Any, job: Job) -> None:
    """TensorRT-RTX: build for the target's compute capability, whether or not its GPU is here."""
    name = f"SM{job.target.compute_capability.replace('.', '')}"
    capability = getattr(library.trt.ComputeCapability, name, None)
    if capability is None:
        raise ModelError(
            f"{library.title} does not build for compute capability {job.target.compute_capability}",
            hint="update the library, or build with TensorRT on the target itself",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)


def _attach(config: api.IBuilderConfig, cache: CacheFile | None) -> Any:
    """Give the build a timing cache, a fresh one where the kept one does not fit. Returns it: it outlives the build."""
    if cache is None:
        return None
    content = cache.read()
    kept = config.create_timing_cache(content)
    if kept is None or not config.set_timing_cache(kept, False):
        cache.set_aside("the library refuses it")
        kept = config.create_timing_cache(b"")
        if kept is not None:
            config.set_timing_cache(kept, False)
    return kept


def _notes(library: Library, job: Job, profiles: Sequence[Profile]) -> tuple[str, ...]:
    shapes = "; ".join(
        f"'{name}' {list(extent.lowest)} to {list(extent.highest)}, tuned for {list(extent.usual)}"
        for name, extent in profiles[-1].items()
    )
    notes = [f"{library.title}, compute capability {job.target.compute_capability}", shapes]
    if job.options.get("hardware_compatibility", "none") != "none" and not library.traits.hardware_levels:
        notes.append(f"hardware_compatibility has no effect with {library.traits.title}")
    return tuple(notes)
