"""Tries the ways to run a session's batches, each batch size by itself, and keeps what is right and fastest.

Runs in workers: Python 3.10.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from millhand.errors import ModelError
from millhand.serving.tensors import Specs, Tensors
from millhand_plugins.onnxruntime import proof
from millhand_plugins.onnxruntime.artifact import Artifact
from millhand_plugins.onnxruntime.ladder import PLAIN, Ladder, fastest
from millhand_plugins.onnxruntime.providers import first_line
from millhand_plugins.onnxruntime.ways import Arrays, Bound, CudaGraph, Filled, OneThread, Plain, Way

log = logging.getLogger("millhand.worker")

BOUND, GRAPH = "bound", "graph"
DEVICE = "cuda"
BIND = ("cuda", "tensorrt")
"""Providers whose buffers can be bound in CUDA's memory."""
SHORT_S = 0.005
"""No graph is tried for a batch that takes longer: 100 launches take about half a millisecond."""
RECORD = ("cuda",)
"""Providers that record CUDA graphs on demand; TensorRT's has an option of its own."""


class Judge:
    """Test inputs, and what must come of them."""

    def __init__(self, artifact: str, rows: Tensors, expected: Tensors | None, tolerance: float) -> None:
        """rows: two examples. expected: the CPU's answers to them; None where it cannot run the model."""
        self.tolerance = tolerance
        self.largest: float | None = None if expected is None else 0.0
        """The largest difference seen so far, as a share of the largest value."""
        self._artifact = artifact
        self._rows = rows
        self._expected = expected

    def batch(self, size: int, first: int = 0) -> Tensors:
        """`size` rows, the two examples in turn, `first` at the beginning."""
        return {name: array[_turns(size, first)] for name, array in self._rows.items()}

    def check(self, found: Tensors, size: int, first: int = 0) -> None:
        """Compare an answer to `batch`. Raises ModelError."""
        if self._expected is None:
            proof.check_finite(self._artifact, found)
            return
        expected = {name: array[_turns(size, first)] for name, array in self._expected.items()}
        difference = proof.check_answer(self._artifact, expected, found, self.tolerance, size)
        self.largest = max(self.largest or 0.0, difference)

    def check_way(self, way: Way, size: int, plain: Arrays) -> None:
        """Run another way than the plain one until a buffer that is not filled anew, or a graph that is not played
        anew, would be seen. plain: the plain way's answer. Raises ModelError, or what the way raises.
        """
        for first in (0, 1, 0, 1, 0, 1):
            self.check(way(self.batch(size, first)), size, first)
        found = way(self.batch(size))
        way(self.batch(size, 1))  # what was handed out must stay as it was
        if not proof.difference(plain, found) <= self.tolerance:
            raise ModelError(f"'{self._artifact}': two ways to run it give different answers in a batch of {size}")


def _turns(size: int, first: int) -> Any:
    return (np.arange(size) + first) % 2


class Trials:
    """The trials of one load."""

    def __init__(self, artifact: Artifact, session: Any, judge: Judge, specs: tuple[Specs, Specs], fixed: bool) -> None:
        """session: the one that was opened first; it has seen batches of one row. specs: inputs and outputs. fixed:
        each batch size needs a session of its own."""
        self.found: dict[str, dict[str, Any]] = {}
        """Batch size -> `way`, and `us`: what each way took."""
        self.left_out: dict[str, str] = {}
        """Way -> why it was not tried."""
        self.kept: list[Bound | CudaGraph | OneThread] = []
        """What must be closed, the last one first."""
        self._artifact = artifact
        self._session = session
        self._judge = judge
        self._inputs, self._outputs = specs
        self._fixed = fixed
        self._thread: OneThread | None = None
        self._ways = self._possible()

    @property
    def possible(self) -> bool:
        """Whether there is more than one way to try."""
        return bool(self._ways)

    @property
    def pinned(self) -> bool:
        """Whether host buffers are page-locked, where any are used."""
        return any(isinstance(one, Bound) and one.pinned for one in self.kept)

    def ladder(self, sizes: Sequence[int]) -> Way:
        """Measure each of the sizes, which ascend. Raises ModelError where the plain way gives a wrong answer."""
        first = next(iter(self._inputs))
        ways = {size: self._rung(size, below + 1, first) for size, below in zip(sizes, (0, *sizes))}  # noqa: B905
        if self._thread is not None and all(entry["way"] != GRAPH for entry in self.found.values()):
            self.kept.remove(self._thread)
            self._thread.close()
        if not self._fixed and all(entry["way"] == PLAIN for entry in self.found.values()):
            return next(iter(ways.values()))  # it takes any size, also beyond the largest
        return Ladder(ways, first)

    def _rung(self, size: int, lowest: int, first: str) -> Way:
        """The way for batches of `lowest` to `size` rows."""
        session = self._session if size == 1 or not self._fixed else self._artifact.open()
        plain: Way = Plain(session, list(self._outputs))
        if self._fixed:
            plain = Filled(plain, size, first)
        full = self._judge.batch(size)
        answer = plain(full)
        self._judge.check(answer, size)
        makers: dict[str, Callable[[], Way]] = {
            BOUND: lambda: self._bound(session, full, answer),
            GRAPH: lambda: self._graph(full, answer),
        }
        ways = {PLAIN: plain}
        for name in self._ways:
            if name not in self.left_out and (name != GRAPH or self._is_short(plain, full)):
                other = self._checked(name, makers[name], size, answer)
                ways |= {} if other is None else {name: other}
        # A smaller batch is filled up by every way but the plain one, which therefore meets its best case here.
        batch = full if self._fixed else self._judge.batch(lowest)
        best, times = fastest(ways, batch) if len(ways) > 1 else (PLAIN, {})
        self.found[str(size)] = {"way": best, "us": times}
        for name, way in ways.items():
            if name != best:
                self._let_go(way)
        return ways[best]

    def _is_short(self, way: Way, batch: Tensors) -> bool:
        """Whether the launches of single kernels, which a graph saves, can be a share of the time that counts."""
        began = time.perf_counter()
        way(batch)
        return time.perf_counter() - began < SHORT_S

    def _checked(self, name: str, make: Callable[[], Way], size: int, answer: Arrays) -> Way | None:
        """Another way for one batch size; None where it fails or answers otherwise, which is no reason not to serve."""
        way = None
        try:
            way = make()
            self._judge.check_way(way, size, answer)
        except Exception as error:
            self.left_out[name] = f"batch of {size}: {first_line(error)}"
            log.warning("'%s': way '%s' is left out: %s", self._artifact.path.name, name, self.left_out[name])
            self._let_go(way)
            return None
        return way

    def _bound(self, session: Any, inputs: Tensors, answer: Arrays) -> Way:
        bound = Bound(session, inputs, answer, DEVICE)
        self.kept.append(bound)
        return bound

    def _graph(self, inputs: Tensors, answer: Arrays) -> Way:
        if self._thread is None:
            self._thread = OneThread("cuda graphs")
            self.kept.append(self._thread)
        graph = CudaGraph(self._thread, self._artifact.with_cuda_graphs().open, inputs, answer, DEVICE)
        self.kept.append(graph)
        return graph

    def _let_go(self, way: Way | None) -> None:
        for kept in [one for one in self.kept if one is way]:
            self.kept.remove(kept)
            kept.close()

    def _possible(self) -> list[str]:
        """The ways beside the plain one that this session may have; says in `left_out` why not all."""
        options = self._artifact.options
        wanted = [BOUND] if options.get("io_binding", True) else []
        wanted += [GRAPH] if options.get("cuda_graph", True) else []
        reason = self._unbound()
        for name in wanted:
            if reason:
                self.left_out[name] = reason
        if not reason and GRAPH in wanted and self._artifact.providers[0] not in RECORD:
            self.left_out[GRAPH] = f"'{self._artifact.providers[0]}' records none on demand"
        return [name for name in wanted if name not in self.left_out]

    def _unbound(self) -> str:
        """Why buffers cannot be bound; empty where they can."""
        if self._artifact.providers[0] not in BIND:
            return f"the buffers of '{self._artifact.providers[0]}' are its own"
        for name, (dtype, shape) in (*self._inputs.items(), *self._outputs.items()):
            if dtype == "object":
                return f"'{name}' holds texts"
            if -1 in shape[1:]:
                return f"'{name}' has a free dimension beside the batch"
        return ""
