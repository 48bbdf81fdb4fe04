"""The table `[plugins.onnxruntime]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from millhand.errors import ModelError
from millhand.validation import StrictTable
from millhand_plugins.onnxruntime.providers import read_providers


class OnnxruntimeSettings(StrictTable):
    providers: tuple[str, ...] = ()
    """Execution providers in order: `cpu`, `cuda`, `tensorrt`, others by ONNX Runtime's own name, or a name of
    `libraries`. Empty: `cpu` on the CPU, `cuda` then `cpu` on a GPU. One that ONNX Runtime leaves out, or a first one
    that runs no node, is an error. Without `cpu` in the list nothing may run on the CPU."""
    provider_options: dict[str, dict[str, str | bool | int | float]] = {}
    """Provider -> options as ONNX Runtime documents them; they win over what the keys below say."""
    libraries: dict[str, dict[str, str]] = {}
    """Name for `providers` -> a plugin library: its `path`, or the Python `package` that brings it. `device` (`cpu`,
    `gpu`, `npu`) and `vendor` (part of its name, or its PCI number, as `0x10de`) choose among the devices it lists."""
    threads: int = Field(default=0, ge=0)
    """Threads of one inference; 0 takes [models] threads, or the profile's."""
    spinning: bool = False
    """Let threads spin between inferences: a little faster with several threads, but never idle."""
    arena: bool = False
    """Keep freed memory for the next inference: faster for large models, but it is never given back."""
    memory_pattern: bool = True
    """Plan memory for repeated shapes."""
    optimization: Literal["none", "basic", "extended", "all"] = "all"
    """Graph optimisation at load."""
    prepacking: bool = True
    """Keep a second copy of weights in the layout that the CPU likes: faster, more memory."""
    conv_search: Literal["default", "heuristic", "exhaustive"] = "heuristic"
    """GPU: how cuDNN picks a convolution's algorithm; exhaustive loads slowly and may run a little faster."""
    tf32: bool = False
    """GPU: let float32 run on tensor cores with 11 bits of mantissa: faster, answers differ from the CPU's by 1e-3.
    Turn it on for float16 models: without it ONNX Runtime keeps their convolutions off the tensor cores, too."""
    gpu_bytes_cap: int = Field(default=0, ge=0)
    """GPU: most memory for tensors and weights, for each batch size of a convolution net; 0 takes what models may have
    of the accelerator. CUDA's own few hundred MB come on top."""
    fixed_batches: bool = True
    """GPU: run convolution nets at the batch sizes 1, 8, 64, ... and max_batch only, each with weights of its own.
    Otherwise cuDNN plans anew for every change of the batch size."""
    io_binding: bool = True
    """GPU: try buffers that are bound once, for each batch size, and use them where they are faster."""
    cuda_graph: bool = True
    """GPU: try CUDA graphs, one for each batch size, and use them where they are faster. Each holds the model's weights
    once more."""

    @model_validator(mode="after")
    def _names_known(self) -> OnnxruntimeSettings:
        try:
            read_providers(self.providers or ("cpu",), self.model_dump(mode="json"))
        except ModelError as error:
            raise ValueError(f"{error.message}; {error.hint}") from error
        return self
