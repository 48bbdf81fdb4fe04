"""What workers count, as the daemon's metrics; totals outlive the worker and the load that they were counted in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from millhand.metrics import DAEMON, Counter, Gauge, Histogram
from millhand.serving.lanes import DURATION_BOUNDS_NS

if TYPE_CHECKING:
    from millhand.serving.supervision import SupervisedWorker

_MODEL = ("model", "version")
DURATION_BOUNDS_S = tuple(bound / 1e9 for bound in DURATION_BOUNDS_NS)

READY = Gauge(DAEMON, "millhand_model_ready", "1 while the version answers.", _MODEL)
SESSION = Counter(
    DAEMON, "millhand_session_counts_total", "What the model's session itself counts, by name.", [*_MODEL, "count"]
)
WORKER_RESTARTS = Counter(DAEMON, "millhand_worker_restarts_total", "Restarts after a death or a hang.", ["worker"])
LOAD_TIME = Gauge(DAEMON, "nv_model_load_duration_secs", "Time of the load with its warm-up, in seconds.", _MODEL)
PENDING = Gauge(DAEMON, "nv_inference_pending_request_count", "Requests that wait now.", _MODEL, plain_kind="untyped")
SUCCESS = Counter(
    DAEMON, "nv_inference_request_success", "Requests answered with a result.", _MODEL, plain_kind="untyped"
)
FAILURE = Counter(
    DAEMON,
    "nv_inference_request_failure",
    "Requests answered with an error, by reason.",
    [*_MODEL, "reason"],
    plain_kind="untyped",
)
ROWS = Counter(DAEMON, "nv_inference_count", "Rows inferred.", _MODEL, plain_kind="untyped")
BATCHES = Counter(DAEMON, "nv_inference_exec_count", "Batches run.", _MODEL, plain_kind="untyped")
REQUEST_US = Counter(
    DAEMON,
    "nv_inference_request_duration_us",
    "Time that answered requests spent in the worker, summed.",
    _MODEL,
    plain_kind="",
)
QUEUE_US = Counter(
    DAEMON, "nv_inference_queue_duration_us", "Time that answered requests waited, summed.", _MODEL, plain_kind=""
)
COMPUTE_US = Counter(
    DAEMON,
    "nv_inference_compute_infer_duration_us",
    "Time of the batches that answered requests ran in, summed over the requests.",
    _MODEL,
    plain_kind="",
)
EXPIRED = Counter(DAEMON, "millhand_inference_expired_total", "Requests dropped after their deadline, not run.", _MODEL)
REFUSED = Counter(DAEMON, "millhand_inference_refused_total", "Requests refused because the queue was full.", _MODEL)
QUEUE_SECONDS = Histogram(
    DAEMON, "millhand_inference_queue_seconds", "Time that a request waited.", _MODEL, bounds=DURATION_BOUNDS_S
)
COMPUTE_SECONDS = Histogram(
    DAEMON, "millhand_inference_compute_seconds", "Time that a batch ran.", _MODEL, bounds=DURATION_BOUNDS_S
)
BATCH_ROWS = Histogram(
    DAEMON, "millhand_inference_batch_rows", "Rows of the batches run.", _MODEL, bounds=(1, 2, 4, 8, 16, 32, 64, 128)
)

_COUNTED = (
    SUCCESS, FAILURE, ROWS, BATCHES, REQUEST_US, QUEUE_US, COMPUTE_US, EXPIRED, REFUSED, QUEUE_SECONDS, COMPUTE_SECONDS,
    BATCH_ROWS, SESSION,
)  # fmt: skip
_COUNTS = {"success": SUCCESS, "rows": ROWS, "batches": BATCHES, "expired": EXPIRED, "rejected": REFUSED}
# Triton's words for why a request failed: its scheduler rejects what is late, ours also what finds the queue full.
_REASONS = {"BACKEND": ("failed",), "CANCELED": ("cancelled",), "REJECTED": ("expired", "rejected")}


class Ledger:
    """What one worker has counted by version, across its processes and across loads of the same version."""

    def __init__(self) -> None:
        self.running: dict[tuple[str, int], dict[str, Any]] = {}
        """The last word of every load (see LaneStats); the worker may be dead meanwhile."""
        self._ended: dict[tuple[str, int], dict[str, Any]] = {}

    def take(self, entries: Iterable[dict[str, Any]]) -> None:
        """Take a worker's stats; what it no longer has, or loaded anew since, has ended with its last word."""
        fresh = {(entry["model"], entry["version"]): entry for entry in entries if not self._has_ended(entry)}
        for key, entry in self.running.items():
            if key not in fresh or fresh[key]["loaded_ns"] != entry["loaded_ns"]:
                self._ended[key] = _sum(self._ended[key], entry) if key in self._ended else entry
        self.running = fresh

    def replace(self, entry: dict[str, Any]) -> None:
        """Take the last word of a load that another has taken the place of."""
        if not self._has_ended(entry):
            self.running[entry["model"], entry["version"]] = entry

    def _has_ended(self, entry: Mapping[str, Any]) -> bool:
        """Whether this load was counted as ended already: a heartbeat may overtake the answer of an unload."""
        ended = self._ended.get((entry["model"], entry["version"]))
        return ended is not None and entry["loaded_ns"] <= ended["loaded_ns"]

    def totals(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(model, version) -> the sums of LaneStats over everything that ran."""
        totals = dict(self._ended)
        for key, entry in self.running.items():
            totals[key] = _sum(totals[key], entry) if key in totals else entry
        return totals


def _sum(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Add counts, lists of counts and counts by key; what is no count is the other's, which is the later one."""
    total = dict(other)
    for key, value in other.items():
        if key == "health":
            continue
        if isinstance(value, list):
            total[key] = [first + second for first, second in zip(one[key], value, strict=True)]
        elif isinstance(value, dict):
            total[key] = {name: one[key].get(name, 0) + value.get(name, 0) for name in {*one[key], *value}}
        elif isinstance(value, int) and key not in ("version", "waiting", "running", "loaded_ns", "used_ns"):
            total[key] = one[key] + value
    return total


def export_workers(workers: Iterable[SupervisedWorker]) -> None:
    """Set the serving families from what each worker told last, and before it its predecessors."""
    for family in (*_COUNTED, PENDING, READY, LOAD_TIME, WORKER_RESTARTS):
        family.clear()
    workers = list(workers)
    answering = {key for worker in workers for key in worker.ready}  # one of a model's workers is enough
    for worker in workers:
        WORKER_RESTARTS.set_total(worker.restarts, worker=worker.name)
        for name, version in worker.wanted:
            READY.set(int((name, version) in answering), model=name, version=version)
        for (name, version), metadata in worker.ready.items():
            LOAD_TIME.set(metadata["load_ms"] / 1e3, model=name, version=version)
            if (name, version) in worker.ledger.running:
                PENDING.merge((name, str(version)), worker.ledger.running[name, version]["waiting"])
        for (name, version), total in worker.ledger.totals().items():
            _export(total, {"model": name, "version": version})


def _export(total: Mapping[str, Any], labels: Mapping[str, Any]) -> None:
    for key, family in _COUNTS.items():
        family.inc(total[key], **labels)
    for reason, keys in _REASONS.items():
        FAILURE.inc(sum(total[key] for key in keys), reason=reason, **labels)
    REQUEST_US.inc((total["queue_ns"] + total["request_compute_ns"]) // 1000, **labels)
    QUEUE_US.inc(total["queue_ns"] // 1000, **labels)
    COMPUTE_US.inc(total["request_compute_ns"] // 1000, **labels)
    QUEUE_SECONDS.add_counts(total["queue_counts"], total["queue_ns"] / 1e9, **labels)
    COMPUTE_SECONDS.add_counts(total["compute_counts"], total["compute_ns"] / 1e9, **labels)
    for rows, count in total["batch_rows"].items():
        BATCH_ROWS.observe(int(rows), count, **labels)
    for name, count in total["session"].items():
        SESSION.inc(count, count=name, **labels)
