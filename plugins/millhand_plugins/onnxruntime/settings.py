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
