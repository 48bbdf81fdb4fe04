"""Metrics of the front processes: each counts for itself and reports to the daemon, which adds them up.

A front reports a snapshot of its registry once a second when it has changed, and at its end. The front that is asked
for /metrics sends its newest snapshot along, so that its own numbers are exact and the others' at most a second old.
What a front had counted when it ended stays in the totals; of one that was killed, all but its last second.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from millhand.errors import MillhandError
from millhand.metrics import Counter, Gauge, Histogram, Registry
from millhand.serving.routing import control_call

log = logging.getLogger("millhand.front")

REPORT_EVERY_S = 1.0
LAST_REPORT_DEADLINE_S = 1.0
LATE_REPORT_S = 10.0
"""The last report of a front may be read after its end; until then it is not added for good."""
LASTING_KINDS = ("counter", "histogram")
"""What an ended process leaves behind; a gauge of it says nothing any more."""

FRONT = Registry()
_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
REQUESTS = Counter(FRONT, "http_requests_total", "HTTP requests answered.", ["method", "path", "status"])
SECONDS = Histogram(
    FRONT,
    "http_request_duration_seconds",
    "Time from the request's head to the answer.",
    ["path"],
    bounds=_BOUNDS_S,
)
_METHOD = ("grpc_type", "grpc_service", "grpc_method")
GRPC_HANDLED = Counter(FRONT, "grpc_server_handled_total", "gRPC calls that ended, by code.", [*_METHOD, "grpc_code"])
GRPC_SECONDS = Histogram(
    FRONT,
    "grpc_server_handling_seconds",
    "Time from a gRPC call's head to its end.",
    _METHOD,
    bounds=_BOUNDS_S,
)
TRACES = Counter(
    FRONT,
    "millhand_traces_total",
    "Sampled requests by what became of their trace: sent, dropped (the queue was full), failed (not taken).",
    ["outcome"],
)


TRACES_WAITING = Gauge(FRONT, "millhand_traces_waiting", "Traces that wait to be sent, or are being sent.")


class MetricsReporter:
    """A front process's side."""

    def __init__(self, registry: Registry, control_path: Path) -> None:
        self._registry = registry
        self._control_path = control_path
        self._pid = os.getpid()
        self._started_ns = time.monotonic_ns()
        self._reported: list[dict[str, Any]] = []

    async def run(self) -> None:
        """Report until cancelled, then once more."""
        try:
            while True:
                await asyncio.sleep(REPORT_EVERY_S)
                await self._report()
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_REPORT_DEADLINE_S):
                    await self._report()

    async def page(self, names: str = "") -> str:
        """The text of /metrics over the whole node. Raises InputError for unknown `names`, or ControlError."""
        text: str = await control_call(self._control_path, "metrics", names=names, front=self._message())
        return text

    def _message(self) -> dict[str, Any]:
        return {"pid": self._pid, "started_ns": self._started_ns, "families": self._registry.snapshot()}

    async def _report(self) -> None:
        message = self._message()
        if message["families"] == self._reported:
            return
        with suppress(MillhandError):  # the daemon is gone, or too busy: the next report says it all
            await control_call(self._control_path, "metrics.report", front=message)
            self._reported = message["families"]


class FrontMetrics:
    """The daemon's side: the sums over all fronts that ever reported."""

    def __init__(self) -> None:
        self._fronts: dict[tuple[int, int], tuple[float, list[dict[str, Any]]]] = {}
        self._ended = Registry()

    def take(self, front: dict[str, Any]) -> None:
        """Take a report, which holds all that the front has counted so far."""
        self._fronts[front["pid"], front["started_ns"]] = time.monotonic(), front["families"]

    def render(self, names: str = "") -> str:
        """The text of the merged families."""
        total = Registry()
        for key, (taken_s, families) in list(self._fronts.items()):
            if Path(f"/proc/{key[0]}").exists():
                total.merge(families)
            elif time.monotonic() < taken_s + LATE_REPORT_S:
                total.merge(families, LASTING_KINDS)
            else:
                del self._fronts[key]
                self._ended.merge(families, LASTING_KINDS)
        total.merge(self._ended.snapshot())
        return total.render(names)
