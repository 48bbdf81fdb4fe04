"""The table `[plugins.edgellm]`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from millhand.validation import StrictTable


class EdgellmSettings(StrictTable):
    binary: Path = Path("tensorrt-edgellm-serve")
    """The server's program: a path, or a name to look for on PATH; `trtedge` (from 0.11.1 on) is looked for too."""
    cache_dir: Path | None = None
    """Where compiled engines lie; none takes the server's own place."""
    cache_gb: float = Field(default=50, gt=0, allow_inf_nan=False)
    """Most disk space for compiled engines."""
    tool_parser: str = "auto"
    """How calls of tools are read: `auto`, `generic`, `hermes`, `qwen3_xml`, `nemotron`, `openai`."""
    prefix_reuse: bool = True
    """Keep the KV cache of prompts, so that the same beginning is not read again."""
    arguments: tuple[str, ...] = ()
    """Further arguments, which win over ours."""
