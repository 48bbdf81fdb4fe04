"""The table `[plugins.vllm]`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from millhand.validation import StrictTable


class VllmSettings(StrictTable):
    interpreter: Path | None = None
    """A Python that has vLLM, mostly in an environment of its own; none takes `vllm` on PATH, else the agent's own."""
    gpu_memory_share: float = Field(default=0.9, gt=0, lt=1)
    """Share of each GPU's memory that it takes: weights, KV cache and all. Lower it where others share the GPU."""
    dtype: str = "auto"
    """Type of weights and activations: `auto` takes the checkpoint's; `float16`, `bfloat16`."""
    quantization: str = ""
    """Scheme of quantised weights, such as `gptq` or `awq`; empty reads it from the checkpoint."""
    reasoning_parser: str = "deepseek_r1"
    """How thoughts are told from answers, for models that reason."""
    tool_parser: str = ""
    """How calls of tools are read, such as `hermes` or `llama3_json`; empty serves no tools."""
    draft_tokens: int = Field(default=5, ge=1, le=64)
    """With `speculation = "ngram"`: tokens drafted at once."""
    device_uuids: bool = False
    """Name GPUs by UUID in place of their number: vLLM takes UUIDs, and with them MIG slices, only after 0.23."""
    arguments: tuple[str, ...] = ()
    """Further arguments, which win over ours."""
