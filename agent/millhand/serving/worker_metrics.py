"""What workers count, as the daemon's metrics."""

from __future__ import annotations

from collections.abc import Iterable

from millhand import metrics
from millhand.serving.supervision import SupervisedWorker

# Triton's words for why a request failed.
REASONS = {"failed": "BACKEND", "rejected": "REJECTED", "cancelled": "CANCELED"}
TOTALS = {
    "success": metrics.SUCCESS,
    "rows": metrics.ROWS,
    "batches": metrics.BATCHES,
    "expired": metrics.EXPIRED,
}


def export_workers(workers: Iterable[SupervisedWorker]) -> None:
    """Set the serving families from each worker's last heartbeat; a restarted worker counts from zero again."""
    families = [*TOTALS.values(), metrics.FAILURE, metrics.QUEUE_TIME, metrics.COMPUTE_TIME, metrics.BATCH_ROWS]
    for family in (*families, metrics.PENDING, metrics.MODEL_READY, metrics.WORKER_RESTARTS):
        family.clear()
    for worker in workers:
        metrics.WORKER_RESTARTS.set_total(worker.restarts, worker=worker.name)
        for name, version in worker.wanted:
            metrics.MODEL_READY.set(int((name, version) in worker.ready), model=name, version=version)
        for entry in worker.stats:
            labels = {"model": entry["model"], "version": entry["version"]}
            for key, family in TOTALS.items():
                family.set_total(entry[key], **labels)
            for key, reason in REASONS.items():
                metrics.FAILURE.set_total(entry[key], reason=reason, **labels)
            metrics.QUEUE_TIME.set_total(entry["queue_ns"] // 1000, **labels)
            metrics.COMPUTE_TIME.set_total(entry["compute_ns"] // 1000, **labels)
            metrics.PENDING.set(entry["waiting"], **labels)
            for rows, count in entry["batch_rows"].items():
                metrics.BATCH_ROWS.observe(int(rows), count, **labels)
