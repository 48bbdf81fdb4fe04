"""Model versions inside a worker: how one is loaded and proved, runs its batches, and is freed.

Imported by workers: Python 3.10.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.errors import AcceleratorError, DeadlineError, MillhandError, ModelError, WorkerError
from millhand.hookspecs import CountingSession, DeadlineSession, DependentSession
from millhand.serving.batcher import Lane, Request
from millhand.serving.budget import room_hint, shown_bytes
from millhand.serving.device_memory import trim_memory, used_bytes
from millhand.serving.ensemble import EnsembleSession, open_session
from millhand.serving.sessions import Sessions
from millhand.serving.tensors import MAX_BATCH_KEY, check_finite, check_inputs, check_session, zeros

log = logging.getLogger("millhand.worker")

# Upper bounds of the histograms of time.
DURATION_BOUNDS_NS = tuple(
    int(ms * 1e6) for ms in (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000)
)

Spec = "tuple[str, tuple[int, ...]]"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of an ensemble: either something to load, or a transform."""

    label: str
    """Number and name: `2 (softmax)`."""
    inputs: dict[str, str] = {}
    """As `graph.Node` has them."""
    outputs: dict[str, str] = {}
    load: LoadRequest | None = None
    """Empty `inputs` and `outputs` in it mean: as the artifact has them."""
    transform: str = ""
    options: dict[str, Any] = {}


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments of the control call `load`."""

    model: str
    version: int
    artifact: str
    backend: str
    module: str
    """The plugin that brings the backend."""
    plugin_options: dict[str, Any] = {}
    """The plugin's validated table."""
    options: dict[str, Any] = {}
    """What model.toml and the profile add to it for this model."""
    accelerator: str = "cpu"
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    finite: tuple[str, ...] = ()
    """Inputs that must hold neither NaN nor infinity."""
    max_batch: int
    max_batch_key: str = MAX_BATCH_KEY
    """Where `max_batch` comes from, for who sends more rows."""
    max_delay_us: int = 0
    queue: int = 256
    warmup: int = 1
    steps: tuple[Step, ...] = ()
    """An ensemble's; its `artifact` is its model.toml, and it has no backend."""
    candidate: str = ""
    """For the daemon alone: what was made of the model and takes its own artifact's place (workshop/shelf.py)."""
    sha256: str = ""
    """For the daemon alone: the digest of the candidate's artifact."""
    fingerprint: str = ""
    """Of the artifact's files, so that the daemon sees when they have changed; the worker does not look at it."""
    memory_bytes_cap: int = 0
    """A model that takes more is refused; 0 allows all."""
    own_bytes_cap: int = 0
    """The cap of model.toml alone, which no room elsewhere can raise; 0 for none."""
    hang_ms: float = 0.0
    """For the daemon alone: a batch that runs for longer hangs; 0 takes [models] hang_ms."""


def _buckets() -> list[int]:
    return [0] * (len(DURATION_BOUNDS_NS) + 1)


class LaneStats(msgspec.Struct):
    """Counts since the version was loaded. Counts by duration: one for each of DURATION_BOUNDS_NS, one above them."""

    loaded_ns: int = msgspec.field(default_factory=time.monotonic_ns)
    """CLOCK_MONOTONIC at the load; tells two loads of one version apart."""
    used_ns: int = msgspec.field(default_factory=time.monotonic_ns)
    """CLOCK_MONOTONIC of the last answer, or of the load."""
    success: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    rejected: int = 0
    batches: int = 0
    rows: int = 0
    queue_ns: int = 0
    """Over answered requests, from the arrival to the batch's start."""
    compute_ns: int = 0
    """Over batches."""
    request_compute_ns: int = 0
    """Over answered requests, each with the time of the batch that it ran in."""
    queue_counts: list[int] = msgspec.field(default_factory=_buckets)
    """Answered requests by the time that they waited."""
    compute_counts: list[int] = msgspec.field(default_factory=_buckets)
    """Batches by the time that they ran."""
    batch_rows: Counter[int] = msgspec.field(default_factory=Counter)
    session: Mapping[str, int] = {}
    """What the session itself counts."""
    steps_ns: Mapping[str, int] = {}
    """An ensemble's steps -> time over all batches that came through."""

    def add_batch(self, requests: list[Request], started_ns: int, ended_ns: int) -> None:
        """Count a batch that was answered."""
        compute_ns, rows = ended_ns - started_ns, 0
        self.used_ns = ended_ns
        for request in requests:
            queue_ns = started_ns - request.arrival_ns
            self.queue_ns += queue_ns
            self.queue_counts[bisect.bisect_left(DURATION_BOUNDS_NS, queue_ns)] += 1
            rows += request.rows
        self.compute_ns += compute_ns
        self.request_compute_ns += compute_ns * len(requests)
        self.compute_counts[bisect.bisect_left(DURATION_BOUNDS_NS, compute_ns)] += 1
        self.success += len(requests)
        self.batches += 1
        self.rows += rows
        self.batch_rows[rows] += 1


class Inference(NamedTuple):
    """What became of requests that ran as one batch."""

    requests: list[Request]
    outcome: dict[str, NDArray[Any]] | Exception
    """The outputs of all of them, row after row; or what went wrong for all of them."""
    started_ns: int
    ended_ns: int

    def parts(self) -> Iterator[tuple[Request, dict[str, NDArray[Any]]]]:
        """Each request with its own rows. Only where there are outputs."""
        outputs: Any = self.outcome
        if len(self.requests) == 1:
            yield self.requests[0], outputs
            return
        start = 0
        for request in self.requests:
            stop = start + request.rows
            yield request, {name: array[start:stop] for name, array in outputs.items()}
            start = stop


class LoadedModel:
    """One model version that is ready; owns its lane."""

    def __init__(self, request: LoadRequest, sessions: Sessions | None = None, runners: int = 1) -> None:
        """Load, check against model.toml and warm up. `sessions`: the worker's, to share what is loaded already;
        `runners`: how many batches the worker runs at once.

        Raises ModelError or PluginError; then nothing stays loaded.
        """
        self.name = request.model
        self.version = request.version
        self.stats = LaneStats()
        self.inputs, self.outputs, self._finite = request.inputs, request.outputs, request.finite
        self._max_batch_key = request.max_batch_key
        started = time.monotonic()
        self._sessions = sessions = Sessions() if sessions is None else sessions
        try:
            sessions.prepare(request)
            trim_memory()
            before_bytes = used_bytes(request.accelerator)
            self.session: Any = open_session(request, sessions)
            self._keeps_deadline = isinstance(self.session, DeadlineSession)
        except MillhandError:
            raise
        except Exception as error:
            raise self._failure(error, "could not be loaded") from error
        try:
            check_session(self.name, "input", request.inputs, self.session.inputs)
            check_session(self.name, "output", request.outputs, self.session.outputs)
            self._warm_up(request.warmup)
            trim_memory()
            self.memory_bytes = max(0, used_bytes(request.accelerator) - before_bytes)
            """What the load added; what it shares with a model loaded before it counts there."""
            if 0 < request.memory_bytes_cap < self.memory_bytes:
                raise self._too_large(request)
        except BaseException as error:
            sessions.close(self.session)
            if isinstance(error, MillhandError):
                raise
            raise self._failure(error, "failed its warm-up") from error
        if isinstance(self.session, CountingSession):
            self.stats.session = self.session.counts
        if isinstance(self.session, EnsembleSession):
            self.session.forget_times()
            self.stats.steps_ns = self.session.steps_ns
        self.load_ms = (time.monotonic() - started) * 1e3
        concurrency = runners if getattr(self.session, "concurrent", False) else 1
        self.lane = Lane(request.max_batch, request.max_delay_us * 1000, request.queue, self, concurrency)
        self._stats_lock = threading.Lock()
        self._expected = [(name, np.dtype(dtype), shape[1:]) for name, (dtype, shape) in self.inputs.items()]
        self._free = any(-1 in shape for *_, shape in self._expected)

    def check(self, tensors: dict[str, NDArray[Any]]) -> int:
        """Return the number of rows. Raises InputError naming the tensor."""
        rows = self._rows(tensors)
        if self._finite:
            check_finite(self.name, self._finite, tensors)
        return rows

    def _rows(self, tensors: dict[str, NDArray[Any]]) -> int:
        if not self._free and len(tensors) == len(self._expected):
            rows = 0
            for name, dtype, shape in self._expected:
                array = tensors.get(name)
                if array is None or array.dtype != dtype or array.shape[1:] != shape or not array.ndim:
                    break
                if rows not in (0, array.shape[0]):
                    break
                rows = array.shape[0]
            else:
                if 1 <= rows <= self.lane.max_batch:
                    return rows
        # This way is slower, and says what is wrong.
        return check_inputs(self.name, self.inputs, tensors, self.lane.max_batch, self._max_batch_key)

    @property
    def inspects_values(self) -> bool:
        """Whether `check` looks at values, and not at names, dtypes and shapes alone."""
        return bool(self._finite)

    def kind(self, tensors: dict[str, NDArray[Any]]) -> tuple[Any, ...]:
        """What must be equal for requests to share a batch: the sizes of free dimensions."""
        if not self._free:
            return ()
        return tuple(tensors[name].shape[1:] for name, *_ in self._expected)

    def count(self, **amounts: int) -> None:
        """Add to the stats; any thread may."""
        with self._stats_lock:
            for name, amount in amounts.items():
                setattr(self.stats, name, getattr(self.stats, name) + amount)

    def run(self, requests: list[Request]) -> list[Inference]:
        """Run requests as one batch. Where that fails, each is run by itself: none must fail for its neighbour."""
        started_ns = time.monotonic_ns()
        outcome: Any
        try:
            outcome = self._run(_joined(requests), sum([request.rows for request in requests]), _latest(requests))
        except (DeadlineError, WorkerError) as error:  # no request is at fault
            outcome = error
        except Exception as error:
            if len(requests) > 1:
                return [part for request in requests for part in self.run([request])]
            outcome = error if isinstance(error, MillhandError) else self._failure(error, "failed")
        return [Inference(requests, outcome, started_ns, time.monotonic_ns())]

    def count_inference(self, inference: Inference) -> None:
        """Take an inference into the stats; any thread may."""
        with self._stats_lock:
            if isinstance(inference.outcome, Exception):
                self.stats.failed += len(inference.requests)
            else:
                self.stats.add_batch(inference.requests, inference.started_ns, inference.ended_ns)

    def counted(self) -> dict[str, Any]:
        """The LaneStats, how many requests wait and run, and how it stands with what the session depends on."""
        return {
            "model": self.name,
            "version": self.version,
            "waiting": len(self.lane.queue),
            "running": self.lane.running,
            "health": self._health(),
            **msgspec.structs.asdict(self.stats),
        }

    def _health(self) -> dict[str, Any]:
        return self.session.health()._asdict() if isinstance(self.session, DependentSession) else {}

    def close(self) -> None:
        """Free the model's memory and give it back to the system."""
        self._sessions.close(self.session)
        del self.session
        trim_memory()

    def metadata(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "version": self.version,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "max_batch": self.lane.max_batch,
            "load_ms": self.load_ms,
            "memory_bytes": self.memory_bytes,
            "threads": self._sessions.choice(self.session),
            "proof": getattr(self.session, "proof", {}),
            "loaded_ns": self.stats.loaded_ns,
            "health": self._health(),
        }

    def _warm_up(self, count: int) -> None:
        try:
            for _ in range(count):
                self._run(zeros(self.inputs, 1), 1)
        except AcceleratorError:
            raise
        except WorkerError as error:  # what it waits for may come up later
            log.warning("model '%s' is loaded, but cannot answer yet: %s", self.name, error.message)

    def _run(self, inputs: dict[str, NDArray[Any]], rows: int, deadline_ns: int = 0) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = (
            self.session.run_until(inputs, deadline_ns) if self._keeps_deadline else self.session.run(inputs)
        )
        for name, array in outputs.items():
            if array.ndim == 0 or array.shape[0] != rows:
                raise ModelError(
                    f"model '{self.name}': output '{name}' has shape {list(array.shape)} for a batch of {rows}",
                    hint="export the model with a free first dimension on every input and output",
                )
        return outputs

    def _too_large(self, request: LoadRequest) -> ModelError:
        bytes_cap = request.memory_bytes_cap
        own = bytes_cap == request.own_bytes_cap
        return ModelError(
            f"model '{self.name}' version {self.version} takes {shown_bytes(self.memory_bytes)} of memory, "
            f"allowed are {shown_bytes(bytes_cap)}",
            hint="raise memory_bytes_cap in model.toml" if own else room_hint(request.accelerator),
        )

    def _failure(self, error: BaseException, what: str) -> ModelError:
        return ModelError(
            f"model '{self.name}' version {self.version} {what}: {type(error).__name__}: {error}",
            hint="report this to the author of the model or of its backend",
        )


def _latest(requests: list[Request]) -> int:
    """The latest deadline; 0 where one has none."""
    deadlines = [request.deadline_ns for request in requests]
    return max(deadlines) if all(deadlines) else 0


def _joined(requests: list[Request]) -> dict[str, NDArray[Any]]:
    if len(requests) == 1:
        return dict(requests[0].inputs)
    return {name: np.concatenate([request.inputs[name] for request in requests]) for name in requests[0].inputs}
