"""The backend. Imported in workers: Python 3.10, and onnxruntime only inside `load`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from millhand.hookspecs import Trial
from millhand_plugins.onnxruntime.accelerated import AcceleratedSession
from millhand_plugins.onnxruntime.artifact import Artifact
from millhand_plugins.onnxruntime.probe import provider_trials
from millhand_plugins.onnxruntime.providers import built_in, default_providers, read_providers
from millhand_plugins.onnxruntime.session import OnnxruntimeSession


class OnnxruntimeBackend:
    """`Backend` for .onnx and .ort files."""

    name = "onnxruntime"
    suffixes: tuple[str, ...] = (".onnx", ".ort")
    threaded = True

    def prepare(self) -> None:
        """Import ONNX Runtime."""
        import onnxruntime  # type: ignore[import-untyped]  # noqa: F401

    def trials(self, accelerator: str, options: Mapping[str, Any]) -> Sequence[Trial]:
        """Each provider of the list by itself."""
        return provider_trials(accelerator, options)

    def load(self, artifact: Path, accelerator: str, options: Mapping[str, Any]) -> OnnxruntimeSession:
        """Load one file. `options`: the keys of `[plugins.onnxruntime]`. An AcceleratedSession must `prove` itself.

        Where nobody named providers and this build has none for the accelerator, the CPU computes.
        Raises ModelError naming the file where it is missing or damaged, or where a provider was left out.
        """
        wanted = options.get("providers") or built_in(default_providers(accelerator))
        read_providers(wanted, options)
        opened = Artifact(artifact, tuple(wanted), options)
        return AcceleratedSession(opened) if opened.accelerated else OnnxruntimeSession(opened.open(), artifact)
