"""What a node measures of itself, in Prometheus' text format; docs/metrics.md lists every family.

A family is made once: at the foot of this module where it is set as things happen, in millhand.node_metrics where it
is taken from what the parts count. Names carry units; the prefix is `millhand_`, except where a name that dashboards
already know means the same (Triton's `nv_inference_*`). Why not prometheus_client:
docs/decisions/0004-own-metrics-writer.md.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Family:
    """One metric family; `labels` are the names of its labels, in order."""

    kind = "untyped"

    def __init__(self, registry: Registry, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.text = text
        self.labels = tuple(labels)
        self._values: dict[tuple[str, ...], Any] = {}
        registry.add(self)

    def clear(self) -> None:
        """Forget every series; for families that are set anew as a whole."""
        self._values.clear()

    def samples(self) -> Iterable[str]:
        """The sample lines."""
        for key, value in sorted(self._values.items()):
            yield f"{self.name}{_labels(self.labels, key)} {number(value)}"

    def _key(self, labels: Mapping[str, Any]) -> tuple[str, ...]:
        if set(labels) != set(self.labels):
            raise ValueError(f"metric {self.name} has labels {self.labels}, not {tuple(labels)}")
        return tuple(str(labels[name]) for name in self.labels)


class Gauge(Family):
    """A value that goes up and down."""

    kind = "gauge"

    def set(self, value: float, **labels: Any) -> None:
        self._values[self._key(labels)] = value


class Counter(Family):
    """A value that only grows, until its process ends."""

    kind = "counter"

    def inc(self, amount: float = 1, **labels: Any) -> None:
        key = self._key(labels)
        self._values[key] = self._values.get(key, 0) + amount

    def set_total(self, total: float, **labels: Any) -> None:
        """Take over a total that another process or table counts."""
        self._values[self._key(labels)] = total


class Histogram(Family):
    """Counts of observations up to each bound, their sum and their number."""

    kind = "histogram"

    def __init__(
        self, registry: Registry, name: str, text: str, labels: Sequence[str] = (), *, bounds: Sequence[float]
    ) -> None:
        super().__init__(registry, name, text, labels)
        self.bounds = tuple(bounds)

    def observe(self, value: float, count: int = 1, **labels: Any) -> None:
        """Count `count` observations of `value`."""
        key = self._key(labels)
        if key not in self._values:
            self._values[key] = ([0] * (len(self.bounds) + 1), [0.0])
        counts, total = self._values[key]
        counts[bisect.bisect_left(self.bounds, value)] += count
        total[0] += value * count

    def samples(self) -> Iterable[str]:
        for key, (counts, total) in sorted(self._values.items()):
            below = 0
            for bound, count in zip((*self.bounds, float("inf")), counts, strict=True):
                below += count
                yield f"{self.name}_bucket{_labels((*self.labels, 'le'), (*key, number(bound)))} {below}"
            yield f"{self.name}_sum{_labels(self.labels, key)} {number(total[0])}"
            yield f"{self.name}_count{_labels(self.labels, key)} {below}"


class Registry:
    """A process's families; `refresh` callbacks run before each rendering."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}
        self._refreshers: list[Callable[[], None]] = []

    def add(self, family: Family) -> None:
        if family.name in self._families:
            raise ValueError(f"metric {family.name} exists already")
        self._families[family.name] = family

    def refresh_with(self, refresher: Callable[[], None]) -> Callable[[], None]:
        """Call `refresher` before each rendering; returns what ends that."""
        self._refreshers.append(refresher)
        return lambda: self._refreshers.remove(refresher)

    def render(self) -> str:
        """Everything that has a value, in Prometheus' text format 0.0.4."""
        for refresher in self._refreshers:
            refresher()
        lines: list[str] = []
        for family in self._families.values():
            samples = list(family.samples())
            if samples:
                lines += [f"# HELP {family.name} {_escape(family.text, False)}", f"# TYPE {family.name} {family.kind}"]
                lines += samples
        return "\n".join(lines) + "\n" if lines else ""

    def catalogue(self) -> list[tuple[str, str, str]]:
        """(name, type, help) of every family."""
        return [(family.name, family.kind, family.text) for family in self._families.values()]


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    if not names:
        return ""
    pairs = zip(names, values, strict=True)
    return "{" + ",".join(f'{name}="{_escape(value, True)}"' for name, value in pairs) + "}"


def _escape(text: str, quotes: bool) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def number(value: float) -> str:
    """A value as the format writes it."""
    if value == float("inf"):
        return "+Inf"
    return repr(value) if isinstance(value, float) and not value.is_integer() else str(int(value))


# ---- families that are set as it happens -----------------------------------------------------------------------------

DAEMON = Registry()
_MODEL = ("model", "version")

MODEL_READY = Gauge(DAEMON, "millhand_model_ready", "1 while the version answers.", _MODEL)
WORKER_RESTARTS = Counter(DAEMON, "millhand_worker_restarts_total", "Restarts after a death or a hang.", ["worker"])
SUCCESS = Counter(DAEMON, "nv_inference_request_success", "Requests answered with a result.", _MODEL)
FAILURE = Counter(
    DAEMON, "nv_inference_request_failure", "Requests answered with an error, by reason.", [*_MODEL, "reason"]
)
ROWS = Counter(DAEMON, "nv_inference_count", "Rows inferred.", _MODEL)
BATCHES = Counter(DAEMON, "nv_inference_exec_count", "Batches run.", _MODEL)
QUEUE_TIME = Counter(DAEMON, "nv_inference_queue_duration_us", "Time that requests waited, summed.", _MODEL)
COMPUTE_TIME = Counter(DAEMON, "nv_inference_compute_infer_duration_us", "Time that batches ran, summed.", _MODEL)
PENDING = Gauge(DAEMON, "nv_inference_pending_request_count", "Requests that wait now.", _MODEL)
EXPIRED = Counter(DAEMON, "millhand_inference_expired_total", "Requests dropped after their deadline, not run.", _MODEL)
BATCH_ROWS = Histogram(
    DAEMON, "millhand_inference_batch_rows", "Rows of the batches run.", _MODEL, bounds=(1, 2, 4, 8, 16, 32, 64, 128)
)
LATENCY = Histogram(
    DAEMON,
    "millhand_prediction_latency_seconds",
    "From the arrival of a window's closing reading to its committed prediction.",
    ["asset"],
    bounds=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
