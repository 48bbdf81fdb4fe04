"""Traces of requests: W3C Trace Context in, OpenTelemetry out (OTLP over HTTP; the extra `otel`).

A front hands over one `RequestTrace` after each answer. A thread of its own makes the spans of it and sends them, so
that a collector that is slow, dead or hangs costs the front nothing: what finds the queue full is dropped and counted.
Source of the header's rules: W3C Recommendation "Trace Context", https://www.w3.org/TR/trace-context/, section 3.2.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import re
import threading
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from millhand import __version__
from millhand.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger("millhand.tracing")

QUEUE_CAP = 4096
BATCH_CAP = 256
SEND_EVERY_S = 1.0
SEND_DEADLINE_S = 5.0
CLOSE_DEADLINE_S = 0.5
_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[^\n]*)?")
# Status codes of gRPC by number, and those that are the server's fault (semantic conventions for RPC).
GRPC_CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
GRPC_SERVER_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)


class TracingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The table `[tracing]` as a front process gets it."""

    enabled: bool = False
    endpoint: str = "http://127.0.0.1:4318/v1/traces"
    sample_ratio: float = 1.0
    service_name: str = "millhand"


class TraceContext(NamedTuple):
    """What a caller says of its trace."""

    trace_id: int
    span_id: int
    sampled: bool


def read_traceparent(header: str) -> TraceContext | None:
    """Read a `traceparent` header; None where it is not valid, which means a new trace."""
    found = _TRACEPARENT.fullmatch(header)
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    context = TraceContext(int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & 1))
    return context if context.trace_id and context.span_id else None


class RequestTrace(msgspec.Struct, frozen=True, kw_only=True):
    """One answered request. Times are Unix nanoseconds, durations nanoseconds."""

    method: str
    """The HTTP method, or gRPC's full method (`inference.GRPCInferenceService/ModelInfer`)."""
    status: int
    """HTTP's or gRPC's status code."""
    start_ns: int
    end_ns: int
    path: str = ""
    """As asked for, without the query."""
    route: str = ""
    """The endpoint's pattern; empty where nothing is served. HTTP only."""
    grpc: bool = False
    traceparent: str = ""
    model: str = ""
    version: str = ""
    infer_ns: int = 0
    """When the request was given to a worker; 0 where it was not."""
    queue_ns: int = 0
    compute_ns: int = 0


Queued = tuple[RequestTrace, int, TraceContext | None]
"""A request, its trace id, and what its caller said."""


class Tracer:
    """Tracing that is switched off."""

    enabled = False
    sent = dropped = failed = 0

    @property
    def waiting(self) -> int:
        """Traces that are not yet sent, dropped or failed."""
        return 0

    def record(self, trace: RequestTrace) -> str:
        """Take an answered request; returns the trace's id in hexadecimal, empty where there is no trace."""
        return ""

    def close(self) -> None:
        """Send what waits, for a short time."""


def open_tracer(options: TracingOptions) -> Tracer:
    """The tracer that the options ask for. Raises ConfigError where the extra is not installed."""
    if not options.enabled:
        return Tracer()
    require_exporter()
    return OtlpTracer(options)


def require_exporter() -> None:
    """Raise ConfigError with the remedy where the extra `otel` is not installed."""
    for package in _PACKAGES:
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:  # of a parent package
            found = False
        if not found:
            raise ConfigError(
                f"[tracing] enabled = true needs the Python package '{package}'",
                hint="pip install 'millhand[otel]', or set [tracing] enabled = false",
            )


class OtlpTracer(Tracer):
    """Sends spans to a collector over OTLP/HTTP. `record` may be called by any one thread."""

    enabled = True

    def __init__(self, options: TracingOptions) -> None:
        self.sent = 0
        """Traces that the collector took."""
        self.dropped = 0
        """Traces that found the queue full."""
        self.failed = 0
        """Traces that the collector did not take."""
        self._sending = 0
        self._bound = int(options.sample_ratio * 2**64)
        self._queue: deque[Queued] = deque()
        self._due = threading.Event()
        self._closing = False
        self._spans = _SpanMaker(options.service_name)
        self._exporter = _exporter(options.endpoint)
        self._thread = threading.Thread(target=self._send, name="traces", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queue) + self._sending

    def record(self, trace: RequestTrace) -> str:
        parent = read_traceparent(trace.traceparent) if trace.traceparent else None
        trace_id = random.getrandbits(128) or 1 if parent is None else parent.trace_id
        # The ratio is taken from the id's low half, as other samplers by ratio do.
        sampled = trace_id & (2**64 - 1) < self._bound if parent is None else parent.sampled
        if sampled and len(self._queue) >= QUEUE_CAP:
            self.dropped += 1
        elif sampled:
            self._queue.append((trace, trace_id, parent))
            if len(self._queue) >= BATCH_CAP:
                self._due.set()
        return f"{trace_id:032x}"

    def close(self) -> None:
        self._closing = True
        self._due.set()
        self._thread.join(CLOSE_DEADLINE_S)
        self._exporter.shutdown()  # also ends a send that is tried again and again

    def _send(self) -> None:
        while not self._closing or self._queue:
            self._due.wait(SEND_EVERY_S)
            self._due.clear()
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(BATCH_CAP, len(self._queue)))]
                self._sending = len(batch)
                if self._sends(batch):
                    self.sent += len(batch)
                else:
                    self.failed += len(batch)
                self._sending = 0

    def _sends(self, batch: list[Queued]) -> bool:
        from opentelemetry.sdk.trace.export import SpanExportResult

        try:
            # The exporter logs why it failed.
            return self._exporter.export(self._spans.make(batch)) is SpanExportResult.SUCCESS
        except Exception:
            log.exception("traces could not be sent")
            return False


def _exporter(endpoint: str) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, timeout=SEND_DEADLINE_S)


class _SpanMaker:
    """Makes finished spans of requests through the SDK, and collects them."""

    def __init__(self, service_name: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        class Ids(RandomIdGenerator):
            trace_id = 0

            def generate_trace_id(self) -> int:
                return self.trace_id

        class Collect(SpanProcessor):
            def __init__(self) -> None:
                self.spans: list[ReadableSpan] = []

            def on_end(self, span: ReadableSpan) -> None:
                self.spans.append(span)

        self._ids = Ids()
        self._collected = Collect()
        provider = TracerProvider(
            sampler=ALWAYS_ON,  # it has been decided
            resource=Resource.create({"service.name": service_name, "service.version": __version__}),
            shutdown_on_exit=False,
            id_generator=self._ids,
        )
        provider.add_span_processor(self._collected)
        self._tracer = provider.get_tracer("millhand", __version__)

    def make(self, batch: Iterable[Queued]) -> list[Any]:
        """A span of each request, and below it one of its time in the queue and one of its time in the model."""
        self._collected.spans = []
        for trace, trace_id, parent in batch:
            self._add(trace, trace_id, parent)
        return self._collected.spans

    def _add(self, trace: RequestTrace, trace_id: int, parent: TraceContext | None) -> None:
        from opentelemetry import trace as api
        from opentelemetry.context import Context

        context = Context()
        self._ids.trace_id = trace_id
        if parent is not None:
            flags = api.TraceFlags(api.TraceFlags.SAMPLED)
            remote = api.SpanContext(trace_id, parent.span_id, is_remote=True, trace_flags=flags)
            context = api.set_span_in_context(api.NonRecordingSpan(remote), context)
        span = self._tracer.start_span(
            trace.method if trace.grpc or not trace.route else f"{trace.method} {trace.route}",
            context,
            api.SpanKind.SERVER,
            _attributes(trace),
            start_time=trace.start_ns,
        )
        if _error(trace):
            span.set_status(api.StatusCode.ERROR)
        if trace.infer_ns:
            self._add_parts(trace, api.set_span_in_context(span, context))
        span.end(trace.end_ns)

    def _add_parts(self, trace: RequestTrace, context: Any) -> None:
        """Queue, then compute, from the moment that the worker was asked: microseconds early."""
        start_ns = trace.infer_ns
        for name, duration_ns in (("queue", trace.queue_ns), ("compute", trace.compute_ns)):
            end_ns = min(start_ns + duration_ns, trace.end_ns)
            part: Span = self._tracer.start_span(name, context, start_time=start_ns)
            part.end(end_ns)
            start_ns = end_ns


def _error(trace: RequestTrace) -> str:
    """The status as the semantic conventions want it in `error.type`; empty where the server is not at fault."""
    if not trace.grpc:
        return str(trace.status) if trace.status >= 500 else ""
    return _grpc_code(trace.status) if _grpc_code(trace.status) in GRPC_SERVER_FAULTS else ""


def _grpc_code(status: int) -> str:
    return GRPC_CODES[status] if 0 <= status < len(GRPC_CODES) else str(status)


def _attributes(trace: RequestTrace) -> dict[str, str | int]:
    """Attributes after OpenTelemetry's semantic conventions for HTTP and RPC servers."""
    if trace.grpc:
        attributes: dict[str, str | int] = {
            "rpc.system.name": "grpc",
            "rpc.method": trace.method,
            "rpc.response.status_code": _grpc_code(trace.status),
        }
    else:
        attributes = {
            "http.request.method": trace.method,
            "url.scheme": "http",
            "url.path": trace.path,
            "http.response.status_code": trace.status,
        }
    named = {
        "http.route": trace.route,
        "error.type": _error(trace),
        "millhand.model.name": trace.model,
        "millhand.model.version": trace.version,
    }
    return {**attributes, **{key: value for key, value in named.items() if value}}
