"""Runs original and candidate side by side, as a worker would, on rows that nothing was fitted to.

Imported by the workshop's processes: Python 3.10.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.errors import ModelError
from millhand.proof.document import Latency
from millhand.serving.lanes import LoadedModel, LoadRequest
from millhand.serving.tensors import Tensors
from millhand.workshop.metric import Outputs

WARMUP_ROUNDS = 3
ROUNDS_LEAST = 30
ROUNDS_CAP = 5000
CHUNKS = 64
"""Different inputs that latency is measured on, in turn."""
ENERGY_S = 2.0
"""Long beside the 20 to 100 ms after which boards refresh their power readings."""


class PluginRef(msgspec.Struct, frozen=True, kw_only=True):
    """What brings a backend: the plugin to import, and its validated table."""

    module: str
    options: dict[str, Any] = {}


def candidate_request(
    original: LoadRequest, artifact: str, backend: str, options: Mapping[str, Any], backends: Mapping[str, PluginRef]
) -> LoadRequest:
    """The load of a candidate in the original's place: model.toml's options hold where its backend stays.

    Raises ModelError for a backend that no plugin brings.
    """
    plugin = backends.get(backend)
    if plugin is None:
        raise ModelError(
            f"no loaded plugin brings the backend '{backend}', which the candidate needs",
            hint=f"loaded plugins bring: {', '.join(backends) or 'none'}; name its plugin under [plugins]",
        )
    return msgspec.structs.replace(
        original,
        artifact=artifact,
        backend=backend,
        module=plugin.module,
        plugin_options={**plugin.options, "threads": 1},
        options={**(original.options if backend == original.backend else {}), **options},
        fingerprint="",
    )


@contextmanager
def opened(request: LoadRequest) -> Iterator[LoadedModel]:
    """A version that is loaded, checked against model.toml, proved on its accelerator and warm; freed at the end."""
    model = LoadedModel(request)
    try:
        yield model
    finally:
        model.close()


def answers(
    model: LoadedModel, rows: Tensors, batch: int, progress: Callable[[float], None]
) -> dict[str, NDArray[Any]]:
    """The outputs for all rows, `batch` at a time. Raises ModelError where a batch fails."""
    count = len(next(iter(rows.values())))
    parts: list[Outputs] = []
    for start in range(0, count, batch):
        parts.append(_run(model, {name: array[start : start + batch] for name, array in rows.items()}))
        progress(min(1.0, (start + batch) / count))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def latency(original: LoadedModel, candidate: LoadedModel, rows: Tensors, batch: int, seconds: float) -> Latency:
    """Time both on the same batches, one after the other, the first of each pair in turn."""
    (original_p50, original_p99), (p50, p99) = _percentiles((original, candidate), rows, batch, seconds)
    return Latency(batch=batch, p50_ms=p50, p99_ms=p99, original_p50_ms=original_p50, original_p99_ms=original_p99)


def latency_alone(original: LoadedModel, rows: Tensors, batch: int, seconds: float) -> Latency:
    """Time one model, which is its own original."""
    ((p50, p99),) = _percentiles((original,), rows, batch, seconds)
    return Latency(batch=batch, p50_ms=p50, p99_ms=p99, original_p50_ms=p50, original_p99_ms=p99)


def _percentiles(models: Sequence[LoadedModel], rows: Tensors, batch: int, seconds: float) -> list[tuple[float, float]]:
    """(p50, p99) of each model, ms."""
    batches = list(itertools.islice(_batches(rows, batch), CHUNKS))
    for number in range(WARMUP_ROUNDS):
        for model in models:
            _run(model, batches[number % len(batches)])
    times: list[list[float]] = [[] for _ in models]
    sides = range(len(models))
    end_s = time.monotonic() + seconds
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall into one side's run
    try:
        for number in range(ROUNDS_CAP):
            if number >= ROUNDS_LEAST and time.monotonic() > end_s:
                break
            inputs = batches[number % len(batches)]
            for side in sides if number % 2 else reversed(sides):
                times[side].append(_timed_ms(models[side], inputs))
    finally:
        if collecting:
            gc.enable()
    return [(float(np.percentile(found, 50)), float(np.percentile(found, 99))) for found in times]


def run_for(model: LoadedModel, rows: Tensors, seconds: float) -> int:
    """Run one row after the other for so long; returns how many."""
    batches = list(itertools.islice(_batches(rows, 1), CHUNKS))
    end_s, runs = time.monotonic() + seconds, 0
    while time.monotonic() < end_s:
        _run(model, batches[runs % len(batches)])
        runs += 1
    return runs


def _batches(rows: Tensors, batch: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Batches of the rows in their order, from the start again where they end."""
    count = len(next(iter(rows.values())))
    for start in range(0, count, batch):
        places = np.arange(start, start + batch) % count
        yield {name: np.ascontiguousarray(array[places]) for name, array in rows.items()}


def _run(model: LoadedModel, inputs: Tensors) -> dict[str, NDArray[Any]]:
    outputs: dict[str, NDArray[Any]] = model.session.run(dict(inputs))
    wanted = len(next(iter(inputs.values())))
    for name, array in outputs.items():
        if array.ndim == 0 or len(array) != wanted:
            raise ModelError(
                f"output '{name}' has shape {list(array.shape)} for a batch of {wanted}",
                hint="a candidate must keep the first dimension free on every input and output",
            )
    return outputs


def _timed_ms(model: LoadedModel, inputs: Tensors) -> float:
    started_ns = time.perf_counter_ns()
    model.session.run(inputs)
    return (time.perf_counter_ns() - started_ns) / 1e6
