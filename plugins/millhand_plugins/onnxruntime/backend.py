"""The backend. Imported in workers: Python 3.10, and onnxruntime only inside `load`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from millhand_plugins.onnxruntime.artifact import Artifact
from millhand_plugins.onnxruntime.gpu import GpuSession
from millhand_plugins.onnxruntime.session import OnnxruntimeSession


class OnnxruntimeBackend:
    """`Backend` for .onnx and .ort files."""

    name = "onnxruntime"
    suffixes: tuple[str, ...] = (".onnx", ".ort")
    threaded = True

    def prepare(self) -> None:
        """Import ONNX Runtime."""
        import onnxruntime  # type: ignore[import-untyped]  # noqa: F401

    def load(self, artifact: Path, accelerator: str, options: Mapping[str, Any]) -> OnnxruntimeSession:
        """Load one file. `options`: the keys of `[plugins.onnxruntime]`. A GpuSession must `prove` itself next.

        Raises ModelError naming the file where it is missing or damaged, or where a provider was left out.
        """
        wanted = options.get("providers") or (("cpu",) if accelerator == "cpu" else ("cuda", "cpu"))
        opened = Artifact(artifact, tuple(wanted), options)
        return GpuSession(opened) if opened.on_gpu else OnnxruntimeSession(opened.open(), artifact)
