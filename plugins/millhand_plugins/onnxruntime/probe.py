"""What is tried of a list of providers, each by itself. Light: the daemon and the CLI call it, nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millhand.hookspecs import Trial
from millhand_plugins.onnxruntime.providers import CPU, default_providers, read_providers

NET = Path(__file__).with_name("probe.onnx")
INPUTS = {"x": ("float32", (-1, 3, 32))}
OUTPUTS = {"y": ("float32", (-1, 5))}
QUICK = {"io_binding": False, "cuda_graph": False, "fixed_batches": False, "threads": 1}


def provider_trials(accelerator: str, options: Mapping[str, Any]) -> Sequence[Trial]:
    """A trial for each provider of the list. Raises ModelError where the list cannot be."""
    asked = bool(options.get("providers"))
    names = options.get("providers") or default_providers(accelerator)
    read_providers(names, options)
    told = {key: options[key] for key in ("libraries", "provider_options") if options.get(key)}
    return [
        Trial(name, NET, {**told, **QUICK, "providers": list(dict.fromkeys([name, CPU]))}, INPUTS, OUTPUTS, asked)
        for name in names
    ]
