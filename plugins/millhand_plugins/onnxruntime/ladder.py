"""Batch sizes, and which way a batch of each size runs fastest, measured at the load.

Runs in workers: Python 3.10.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import numpy as np

from millhand.serving.tensors import Tensors
from millhand_plugins.onnxruntime.ways import Arrays, Way

SIZE_STEP = 8
WARM_RUNS = 3
TRIAL_RUNS = 15
TRIAL_S = 0.3
"""A trial of one batch size ends after so long, with fewer runs."""
PAYS = 0.95
"""Another way must take at most this share of the plain one's time: less is noise."""
PLAIN = "plain"


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """1, 8, 64, ... and `max_batch`."""
    sizes = [1]
    while sizes[-1] * SIZE_STEP < max_batch:
        sizes.append(sizes[-1] * SIZE_STEP)
    return (*sizes, max_batch) if max_batch > 1 else tuple(sizes)


class Ladder:
    """A way for each number of rows; a batch larger than the largest size runs in parts."""

    def __init__(self, ways: Mapping[int, Way], first: str) -> None:
        """ways: the most rows that it takes -> way, ascending. first: an input, which tells the rows."""
        self._first = first
        self._largest = max(ways)
        self._by_rows = [ways[min(size for size in ways if size >= rows)] for rows in range(self._largest + 1)]

    def __call__(self, inputs: Tensors) -> Arrays:
        rows = len(inputs[self._first])
        if rows <= self._largest:
            return self._by_rows[rows](inputs)
        parts = []
        for start in range(0, rows, self._largest):
            part = {name: array[start : start + self._largest] for name, array in inputs.items()}
            parts.append(self._by_rows[len(part[self._first])](part))
        return {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}


def fastest(ways: Mapping[str, Way], batch: Tensors) -> tuple[str, dict[str, float]]:
    """Which of several ways to take for such a batch, and the microseconds that each took (median).

    The runs alternate, so that a clock that changes meets all of them; a way that is not plain must save 5 %.
    """
    for way in ways.values():
        for _ in range(WARM_RUNS):
            way(batch)
    spent: dict[str, list[int]] = {name: [] for name in ways}
    end = time.monotonic() + TRIAL_S
    for _ in range(TRIAL_RUNS):
        for name, way in ways.items():
            began = time.perf_counter_ns()
            way(batch)
            spent[name].append(time.perf_counter_ns() - began)
        if time.monotonic() > end:
            break
    times = {name: statistics.median(values) / 1e3 for name, values in spent.items()}
    best = min(times, key=lambda name: times[name] / (1.0 if name == PLAIN else PAYS))
    return best, {name: round(value, 1) for name, value in times.items()}
