"""How fast a served model answers: callers that keep it busy (closed loop) or send at a fixed rate (open loop).

In an open loop a request counts from the moment it was due, so that a slow server cannot slow down the clock that it is
measured by (what G. Tene calls coordinated omission).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from millhand.control import no_daemon
from millhand.errors import MillhandError, WorkerError
from millhand.serving.routing import Routes, UnknownModel
from millhand.serving.tensors import DATATYPES, Tensors

WARMUP_REQUESTS = 5
"""Asked by each caller before the clock runs."""
PAUSE_S = 0.01
"""After an error, so that a worker that restarts is not knocked at without end."""
SLACK_NS = 2_000_000
"""A request that was due for longer than this before a caller was free is late; what the timer adds does not count."""
VARIANTS = 16
"""Of random requests: different ones, sent in turn."""
REQUESTS_CAP = 4096
"""Of requests made from a file's rows."""
SEED = 7


class Timing(NamedTuple):
    """What an answer tells of itself: nanoseconds in the queue and in compute, rows of the batch it ran in."""

    queue_ns: int
    compute_ns: int
    batch_rows: int


class Line(Protocol):
    """One caller's way to the model."""

    async def ask(self, index: int) -> Timing | None:
        """Send request `index`; None where the way tells nothing of the inside. Raises MillhandError."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What to send."""

    concurrency: int
    """Requests in flight at most."""
    rows: int
    """Rows of one request."""
    seconds: float
    rate: float | None = None
    """Requests due a second; None: each caller sends as soon as it has its answer."""


@dataclass
class Tally:
    """What was measured. Times are nanoseconds."""

    latency_ns: array[int] = field(default_factory=lambda: array("q"))
    queue_ns: int = 0
    compute_ns: int = 0
    told: int = 0
    """Answers that told of queue, compute and batch."""
    batches: float = 0.0
    """Each answer adds its own share of the batch that it ran in."""
    sent: int = 0
    late: int = 0
    """Open loop: requests that were sent after they were due, since no caller was free."""
    unsent: int = 0
    """Open loop: requests that were due, and not sent before the end."""
    errors: Counter[str] = field(default_factory=Counter)
    last_error: MillhandError | None = None
    elapsed_s: float = 0.0
    interrupted: bool = False

    def add(self, latency_ns: int, timing: Timing | None, rows: int) -> None:
        self.latency_ns.append(latency_ns)
        if timing is not None:
            self.told += 1
            self.queue_ns += timing.queue_ns
            self.compute_ns += timing.compute_ns
            self.batches += rows / timing.batch_rows

    def figures(self, rows: int) -> dict[str, Any]:
        """Rates, percentiles of the latency in ms, shares of the latency, rows of a mean batch."""
        requests, total_ns = len(self.latency_ns), sum(self.latency_ns)
        ms = np.asarray(self.latency_ns, np.float64) / 1e6
        names = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
        told = self.told > 0
        return {
            "requests": requests,
            "errors": dict(self.errors),
            "seconds": round(self.elapsed_s, 3),
            "requests_per_s": round(requests / self.elapsed_s, 1) if requests else 0.0,
            "rows_per_s": round(requests * rows / self.elapsed_s, 1) if requests else 0.0,
            "latency_ms": {n: round(float(np.percentile(ms, p)), 3) for n, p in names.items()} if requests else {},
            "queue_share": round(self.queue_ns / total_ns, 3) if told else None,
            "compute_share": round(self.compute_ns / total_ns, 3) if told else None,
            "mean_batch_rows": round(self.told * rows / self.batches, 2) if told else None,
            "late": self.late,
            "unsent": self.unsent,
            "interrupted": self.interrupted,
        }


class Bench:
    """One measurement."""

    def __init__(self, plan: Plan, line: Callable[[], Line]) -> None:
        self.tally = Tally()
        self._plan = plan
        self._line = line
        self._stop = asyncio.Event()
        self._tickets = itertools.count()
        self._begin_ns = self._end_ns = 0

    def stop(self) -> None:
        """End early; what was measured so far stands."""
        self.tally.interrupted = True
        self._stop.set()

    async def run(self) -> None:
        """Warm up, then measure. Raises the first error that sending again would not mend."""
        lines = [self._line() for _ in range(self._plan.concurrency)]
        try:
            async with asyncio.TaskGroup() as group:
                for line in lines:
                    group.create_task(self._warm_up(line))
            self._begin_ns = time.monotonic_ns()
            self._end_ns = self._begin_ns + int(self._plan.seconds * 1e9)
            async with asyncio.TaskGroup() as group:
                for line in lines:
                    group.create_task(self._call(line))
        except* MillhandError as found:
            raise _first(found) from None
        finally:
            self._close_tally()
            for line in lines:
                line.close()

    def _close_tally(self) -> None:
        if not self._begin_ns:
            return
        ended_ns = time.monotonic_ns()
        self.tally.elapsed_s = (ended_ns - self._begin_ns) / 1e9
        if self._plan.rate is not None:
            due = math.ceil(self._plan.rate * (min(ended_ns, self._end_ns) - self._begin_ns) / 1e9)
            self.tally.unsent = max(0, due - self.tally.sent)

    async def _warm_up(self, line: Line) -> None:
        for index in range(WARMUP_REQUESTS):
            try:
                await line.ask(index)
            except MillhandError as error:
                if not error.retriable:
                    raise
                await self._pause(PAUSE_S)
            if self._stop.is_set():
                return

    async def _call(self, line: Line) -> None:
        while not self._stop.is_set():
            index = next(self._tickets)
            due_ns = self._due_ns(index)
            late = time.monotonic_ns() - due_ns > SLACK_NS
            if due_ns >= self._end_ns or (late and time.monotonic_ns() >= self._end_ns):
                await self._until(self._end_ns)
                return
            await self._until(due_ns)
            if self._stop.is_set():
                return
            begin_ns = time.monotonic_ns()
            if late:
                begin_ns = due_ns
                self.tally.late += 1
            self.tally.sent += 1
            try:
                timing = await line.ask(index)
            except MillhandError as error:
                if not error.retriable:
                    raise
                self.tally.errors[error.code] += 1
                self.tally.last_error = error
                await self._pause(PAUSE_S)
            else:
                self.tally.add(time.monotonic_ns() - begin_ns, timing, self._plan.rows)

    def _due_ns(self, index: int) -> int:
        if self._plan.rate is None:
            return time.monotonic_ns()
        return self._begin_ns + int(index / self._plan.rate * 1e9)

    async def _until(self, time_ns: int) -> None:
        wait_ns = time_ns - time.monotonic_ns()
        if wait_ns > 0:
            await self._pause(wait_ns / 1e9)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return


def _first(group: BaseExceptionGroup[MillhandError]) -> MillhandError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


# ---- the node's own way ---------------------------------------------------------------------------------------------


class WorkerLine:
    """Through the worker protocol, as the fronts go: all callers share their `Routes`."""

    def __init__(self, routes: Routes, model: str, version: int | None, requests: Sequence[Tensors]) -> None:
        self._routes = routes
        self._model = model
        self._version = "" if version is None else str(version)
        self._requests = requests

    async def ask(self, index: int) -> Timing:
        tensors = self._requests[index % len(self._requests)]
        try:
            answer = await self._routes.infer(
                self._model, self._version, tensors, deadline_ms=None, priority=0, wanted=()
            )
        except UnknownModel as error:  # it was there when we began: its worker is being restarted, or it was unloaded
            raise WorkerError(error.message, hint=error.hint) from error
        return Timing(answer.queue_ns, answer.compute_ns, answer.rows)

    def close(self) -> None:
        """The routes are closed by who made them."""


async def follow_routes(control_path: Path) -> tuple[Routes, asyncio.Task[None]]:
    """Routes that know the daemon's models, and the task that keeps them so. Raises ControlError without a daemon."""
    routes = Routes(control_path)
    following = asyncio.create_task(routes.follow())
    while not routes.known:
        if following.done():
            raise no_daemon(control_path)
        await asyncio.sleep(PAUSE_S)
    return routes, following


# ---- what to send ---------------------------------------------------------------------------------------------------


def random_requests(inputs: Sequence[Mapping[str, Any]], rows: int) -> list[dict[str, NDArray[Any]]]:
    """Requests of random values, the same each time; free dimensions beside the batch get size 1.

    inputs: name, datatype and shape of each, as a model's metadata has them. FP: normal; INT, UINT: 0 to 9.
    """
    random = np.random.default_rng(SEED)
    return [{tensor["name"]: _random(random, tensor, rows) for tensor in inputs} for _ in range(VARIANTS)]


def _random(random: np.random.Generator, tensor: Mapping[str, Any], rows: int) -> NDArray[Any]:
    shape = (rows, *(max(size, 1) for size in tensor["shape"][1:]))
    kind = tensor["datatype"]
    if kind == "BYTES":
        texts = np.empty(math.prod(shape), dtype=object)
        texts[:] = [f"{number:08x}".encode() for number in random.integers(0, 1 << 32, texts.size)]
        return texts.reshape(shape)
    if kind.startswith("FP"):
        return random.standard_normal(shape).astype(DATATYPES[kind])
    return random.integers(0, 2 if kind == "BOOL" else 10, shape).astype(DATATYPES[kind])


def requests_from(tensors: Tensors, rows: int) -> list[dict[str, NDArray[Any]]]:
    """Requests of `rows` rows each from one long batch, which is gone through in turn and over again."""
    length = len(next(iter(tensors.values())))
    count = min(-(-length // rows), REQUESTS_CAP)
    picks = [np.arange(first * rows, (first + 1) * rows) % length for first in range(count)]
    return [{name: array[pick] for name, array in tensors.items()} for pick in picks]
