"""What a front does with an answered request beside counting it: a trace, and a line of the access log."""

from __future__ import annotations

import msgspec

from millhand.serving.access_log import AccessLog
from millhand.serving.front_metrics import FRONT, TRACES, TRACES_WAITING
from millhand.serving.tracing import (
    GRPC_CODES,
    RequestTrace,
    Tracer,
    TracingOptions,
    open_tracer,
    read_traceparent,
)


class LogOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The table `[log]` as a front process gets it."""

    level: str = "info"
    format: str = "text"
    repeats_per_minute: int = 10


class ObservationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What every front process is told; a part of its argument."""

    access_log: bool = False
    access_log_per_minute: int = 600
    tracing: TracingOptions = TracingOptions()
    log: LogOptions = LogOptions()


class Observation:
    """One a front process. Where `wanted` is False, a front need not even make the RequestTrace."""

    def __init__(self, tracer: Tracer, access_log: AccessLog | None) -> None:
        self.wanted = tracer.enabled or access_log is not None
        self._tracer = tracer
        self._access_log = access_log

    def answered(self, trace: RequestTrace, size_bytes: int) -> None:
        """Take a request after its answer; `size_bytes` is the size of the answer's body."""
        trace_id = self._tracer.record(trace)
        if self._access_log is None:
            return
        if not trace_id and (caller := read_traceparent(trace.traceparent)):
            trace_id = f"{caller.trace_id:032x}"
        self._access_log.write({
            **_asked(trace),
            "bytes": size_bytes,
            "ms": round((trace.end_ns - trace.start_ns) / 1e6, 3),
            "trace_id": trace_id,
        })  # fmt: skip

    def count(self) -> None:
        """Take over what became of the traces; runs before each snapshot of the metrics."""
        if self._tracer.enabled:
            for outcome in ("sent", "dropped", "failed"):
                TRACES.set_total(getattr(self._tracer, outcome), outcome=outcome)
            TRACES_WAITING.set(self._tracer.waiting)

    def close(self) -> None:
        """Send the traces that wait, for a short time."""
        self._tracer.close()


def _asked(trace: RequestTrace) -> dict[str, str | int]:
    """What was asked for, as the client wrote it, and how it ended; a gRPC call's path does not tell its model."""
    if trace.grpc:
        return {"method": "gRPC", "path": trace.path, "model": trace.model, "status": GRPC_CODES[trace.status]}
    return {"method": trace.method, "path": trace.path, "status": trace.status}


def open_observation(options: ObservationOptions) -> Observation:
    """What the options ask for. Raises ConfigError where tracing needs a package that is not installed."""
    access_log = AccessLog(options.log, options.access_log_per_minute) if options.access_log else None
    observation = Observation(open_tracer(options.tracing), access_log)
    FRONT.refresh_with(observation.count)
    return observation
