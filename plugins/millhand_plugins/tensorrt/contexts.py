"""Execution contexts of an engine, and TensorRT-RTX's runtime cache. Python 3.10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from millhand.errors import ModelError
from millhand_plugins.tensorrt.cache import CacheFile
from millhand_plugins.tensorrt.driver import this_gpu
from millhand_plugins.tensorrt.engine import Engine
from millhand_plugins.tensorrt.graphs import cuda_runtime

if TYPE_CHECKING:
    from millhand_plugins.tensorrt import api


class Contexts:
    """Makes execution contexts as the owner's table asks, and keeps TensorRT-RTX's runtime cache."""

    def __init__(self, engine: Engine, options: Mapping[str, Any]) -> None:
        self._engine = engine
        self._wanted = bool(options.get("cuda_graphs", True))
        traits = engine.library.traits
        self.runtime = None if traits.own_graphs or not self._wanted else cuda_runtime()
        """cuda-python's, where graphs are captured here."""
        self._config: Any = None
        self._cache: Any = None
        self._file: CacheFile | None = None
        path = str(options.get("runtime_cache") or "")
        if path and not traits.timing_cache:
            gpu = this_gpu()
            writer = {"library": engine.library.title, "gpu": gpu.name}
            self._file = CacheFile(engine.path.parent / path, writer)

    @property
    def own_graphs(self) -> bool:
        """Whether the library captures CUDA graphs itself."""
        return self._wanted and self._engine.library.traits.own_graphs

    def make(self) -> api.IExecutionContext:
        """Call inside the device's context. Raises ModelError where the memory does not suffice."""
        engine: Any = self._engine.trt
        if self._engine.library.traits.own_graphs:
            context = engine.create_execution_context(runtime_config=self._configured())
        else:
            context = engine.create_execution_context()
        if context is None:
            raise ModelError(
                f"'{self._engine.path.name}': no execution context: {self._engine.said()}",
                hint="unload other models, lower max_batch, or set [plugins.tensorrt] streams = 1",
            )
        made: api.IExecutionContext = context
        return made

    def keep_cache(self) -> None:
        """Write down what was compiled so far."""
        if self._file is not None and self._cache is not None:
            self._file.write(bytes(self._cache.serialize()))

    def close(self) -> None:
        self._config = self._cache = None

    def _configured(self) -> Any:
        """TensorRT-RTX's runtime configuration: graphs that it captures itself, and the runtime cache."""
        if self._config is None:
            trt = self._engine.library.trt
            self._config = self._engine.trt.create_runtime_config()
            strategy = trt.CudaGraphStrategy
            self._config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if self._wanted else strategy.DISABLED
            if self._file is not None:
                self._cache = self._config.create_runtime_cache()
                content = self._file.read()
                if content and not self._cache.deserialize(content):
                    self._file.set_aside("the library refuses it")
                self._config.set_runtime_cache(self._cache)
        return self._config
