"""The table `[plugins.onnxruntime]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from millhand.validation import StrictTable

Provider = Literal["cpu", "cuda", "tensorrt"]


class OnnxruntimeSettings(StrictTable):
    providers: tuple[Provider, ...] = ()
    """Execution providers in order. Empty: `cpu` on the CPU, `cuda` then `cpu` on a GPU.
    A provider that ONNX Runtime silently leaves out is an error."""
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
    """GPU: most memory for tensors and weights, for each batch size of a convolution net; 0 sets no cap.
    CUDA's own few hundred MB come on top."""
    fixed_batches: bool = True
    """GPU: run convolution nets at the batch sizes 1, 8, 64, ... and max_batch only, each with weights of its own.
    Otherwise cuDNN plans anew for every change of the batch size."""
