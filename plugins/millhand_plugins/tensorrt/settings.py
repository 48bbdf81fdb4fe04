"""The table `[plugins.tensorrt]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from millhand.validation import StrictTable


class TensorrtSettings(StrictTable):
    library: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """Which library builds and runs. `auto` builds with TensorRT where it is installed and the GPU is here, else with
    TensorRT-RTX, and runs each engine with the library that built it."""
    ranges: dict[str, tuple[int, int, int]] = {}
    """Lowest, usual and highest size of free dimensions beside the batch: the dimension's name in the ONNX file, or
    `tensor.axis`, to its three sizes."""
    optimization_level: int = Field(default=3, ge=0, le=5)
    """TensorRT: how long the builder looks for fast kernels; each level takes longer."""
    workspace_bytes_cap: int = Field(default=0, ge=0)
    """Most GPU memory that one layer may use for scratch; 0 takes half of the accelerator's where that is known."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """TensorRT: whether an engine also runs on other GPUs, a little slower: all from Ampere on, or (from 10.13 on)
    those of its compute capability. Without effect for TensorRT-RTX, whose engines are tied to the latter anyway."""
    version_compatible: bool = False
    """Let later versions of the library run the engine too, a little slower. TensorRT needs `host_code`
    to load it."""
    host_code: bool = False
    """TensorRT: load engines that bring code for the CPU, as `version_compatible` ones do. That code runs on this node:
    only where every engine is proved and signed (`[models] require_proof`)."""
    refit: bool = False
    """Keep weights exchangeable in the engine; costs speed and size. TensorRT-RTX can only do so with the GPU here."""
    streams: int = Field(default=2, ge=1, le=16)
    """Most batches of a model at once on the GPU, each with buffers of its own; `[models] runners` is how many come."""
    cuda_graphs: bool = True
    """Start all kernels of a batch with one call. TensorRT needs the package cuda-python for it."""
    runtime_cache: str = ""
    """TensorRT-RTX: the file that keeps what the first inference has compiled, from the engine's folder. Builds set it
    for their engines."""

    @model_validator(mode="after")
    def _ordered(self) -> TensorrtSettings:
        for name, (low, best, high) in self.ranges.items():
            if not 1 <= low <= best <= high:
                raise ValueError(f"'ranges.{name}' = [{low}, {best}, {high}] is not lowest, usual, highest, from 1 on")
        return self
