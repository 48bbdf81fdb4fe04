"""Traces at a real OTLP collector, and the access log, of real HTTP processes."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from serving_kit import identity, until, write_model

from millhand.control import ControlServer
from millhand.errors import ConfigError
from millhand.log_settings import LogSettings
from millhand.serving.access_log import AccessLog
from millhand.serving.front import http_front
from millhand.serving.front_metrics import FrontMetrics
from millhand.serving.settings import HttpSettings, TracingSettings
from millhand.serving.tracing import (
    BATCH_CAP,
    QUEUE_CAP,
    RequestTrace,
    TraceContext,
    TracingOptions,
    open_tracer,
    read_traceparent,
)
from millhand.testing import wait_until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
INFER = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}


class Collector:
    """Takes OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                request = ExportTraceServiceRequest.FromString(body)
                for part in request.resource_spans:
                    collector.resources.append({kv.key: kv.value.string_value for kv in part.resource.attributes})
                    for scope in part.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def attributes(span: Span) -> dict[str, Any]:
    return {kv.key: getattr(kv.value, kv.value.WhichOneof("value")) for kv in span.attributes}


@pytest.mark.parametrize(
    ("header", "context"),
    [
        (f"00-{TRACE}-{PARENT}-01", TraceContext(int(TRACE, 16), int(PARENT, 16), True)),
        (f"00-{TRACE}-{PARENT}-00", TraceContext(int(TRACE, 16), int(PARENT, 16), False)),
        (f"00-{TRACE}-{PARENT}-03", TraceContext(int(TRACE, 16), int(PARENT, 16), True)),
        (f"cc-{TRACE}-{PARENT}-01", TraceContext(int(TRACE, 16), int(PARENT, 16), True)),
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be", TraceContext(int(TRACE, 16), int(PARENT, 16), True)),
        (f"cc-{TRACE}-{PARENT}-01.what", None),
        (f"00-{TRACE}-{PARENT}-01-more", None),
        (f"00-{TRACE}-{PARENT}-01-", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        (f"00-{TRACE[:-1]}-{PARENT}-01", None),
        (f"00-{TRACE}-{PARENT}0-01", None),
        (f"00-{TRACE}-{PARENT}-1", None),
        (f"00-{TRACE}-{PARENT}", None),
        (f"00_{TRACE}_{PARENT}_01", None),
        (f"00-{TRACE}-{PARENT}-01,00-{TRACE}-{PARENT}-01", None),
        ("0٠-" + f"{TRACE}-{PARENT}-01", None),
        ("", None),
    ],
)
def test_traceparent_as_the_recommendation_says(header: str, context: TraceContext | None) -> None:
    assert read_traceparent(header) == context


def request(**changes: Any) -> RequestTrace:
    now_ns = time.time_ns()
    start = {"method": "GET", "path": "/v2", "route": "/v2", "status": 200}
    return RequestTrace(**{**start, "start_ns": now_ns, "end_ns": now_ns + 1_000_000, **changes})


def test_switched_off_it_needs_nothing_and_imports_nothing() -> None:
    program = (
        "import sys; from millhand.serving.tracing import *; tracer = open_tracer(TracingOptions())\n"
        "assert tracer.record(None) == '' and not tracer.enabled; tracer.close()\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("package", ["opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"])
def test_a_missing_package_is_an_error_with_a_remedy(package: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=rf"\[tracing\] enabled = true needs the Python package '{package}'"
    ) as caught:
        open_tracer(TracingOptions(enabled=True))
    assert caught.value.hint.startswith("pip install 'millhand[otel]'")
    with pytest.raises(ConfigError):
        http_front(HttpSettings(port=0), tmp_path / "c.sock", TracingSettings(enabled=True))


def test_spans_say_what_happened_when(collector: Collector) -> None:
    tracer = open_tracer(TracingOptions(enabled=True, endpoint=collector.endpoint, service_name="press-7"))
    start_ns = time.time_ns()
    times = {
        "start_ns": start_ns,
        "infer_ns": start_ns + 100,
        "queue_ns": 200,
        "compute_ns": 500,
        "end_ns": start_ns + 900,
    }
    route = "/v2/models/{model}/infer"
    trace_id = tracer.record(
        request(
            method="POST",
            path="/v2/models/m/infer",
            route=route,
            model="m",
            version="3",
            **times,
        )
    )
    failed_id = tracer.record(request(status=503, traceparent=f"00-{TRACE}-{PARENT}-01"))
    late_id = tracer.record(request(grpc=True, method="inference.GRPCInferenceService/ModelInfer", route="", status=4))
    tracer.close()
    assert (tracer.sent, tracer.dropped, tracer.failed) == (3, 0, 0)
    assert collector.resources[0]["service.name"] == "press-7"
    spans = {(span.trace_id.hex(), span.name): span for span in collector.spans}
    assert set(spans) == {
        (trace_id, f"POST {route}"), (trace_id, "queue"), (trace_id, "compute"), (failed_id, "GET /v2"),
        (late_id, "inference.GRPCInferenceService/ModelInfer"),
    }  # fmt: skip
    server = spans[trace_id, f"POST {route}"]
    assert (server.kind, server.parent_span_id, server.status.code) == (
        Span.SPAN_KIND_SERVER,
        b"",
        Status.STATUS_CODE_UNSET,
    )
    assert (server.start_time_unix_nano, server.end_time_unix_nano) == (start_ns, start_ns + 900)
    assert attributes(server) == {
        "http.request.method": "POST", "url.scheme": "http", "url.path": "/v2/models/m/infer", "http.route": route,
        "http.response.status_code": 200, "millhand.model.name": "m", "millhand.model.version": "3",
    }  # fmt: skip
    queue, compute = spans[trace_id, "queue"], spans[trace_id, "compute"]
    assert queue.parent_span_id == compute.parent_span_id == server.span_id
    assert (queue.start_time_unix_nano, queue.end_time_unix_nano) == (start_ns + 100, start_ns + 300)
    assert (compute.start_time_unix_nano, compute.end_time_unix_nano) == (start_ns + 300, start_ns + 800)
    failed = spans[failed_id, "GET /v2"]
    assert (failed_id, failed.parent_span_id.hex()) == (TRACE, PARENT)
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert attributes(failed)["error.type"] == "503"
    late = spans[late_id, "inference.GRPCInferenceService/ModelInfer"]
    assert attributes(late) == {
        "rpc.system.name": "grpc", "rpc.method": "inference.GRPCInferenceService/ModelInfer",
        "rpc.response.status_code": "DEADLINE_EXCEEDED", "error.type": "DEADLINE_EXCEEDED",
    }  # fmt: skip


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.0, 0, 0), (0.25, 50, 150), (1.0, 400, 400)])
def test_a_share_of_new_traces_is_sampled_and_the_callers_word_holds(
    ratio: float, least: int, most: int, collector: Collector
) -> None:
    tracer = open_tracer(TracingOptions(enabled=True, endpoint=collector.endpoint, sample_ratio=ratio))
    ids = {tracer.record(request(traceparent="no header")) for _ in range(400)}
    assert len(ids) == 400
    wait_until(lambda: not tracer._queue, "the queue to be sent")
    for flag in ("00", "01"):
        assert tracer.record(request(traceparent=f"00-{TRACE}-{PARENT}-{flag}")) == TRACE
    tracer.close()
    told = [span.trace_id.hex() for span in collector.spans]
    assert told.count(TRACE) == 1
    assert least <= len(told) - 1 <= most


def test_a_collector_that_never_answers_costs_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        tracer = open_tracer(TracingOptions(enabled=True, endpoint=endpoint))
        one = request()
        slowest_s = 0.0
        for _ in range(3 * QUEUE_CAP):
            began_s = time.perf_counter()
            tracer.record(one)
            slowest_s = max(slowest_s, time.perf_counter() - began_s)
        assert slowest_s < 1, "no call waits for the collector's deadline of 5 s"
        assert tracer.dropped >= 2 * QUEUE_CAP - BATCH_CAP
        assert len(tracer._queue) <= QUEUE_CAP
        began_s = time.monotonic()
        tracer.close()
        assert time.monotonic() - began_s < 3


def test_a_collector_that_is_away_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        endpoint = f"http://127.0.0.1:{gone.getsockname()[1]}/v1/traces"
    tracer = open_tracer(TracingOptions(enabled=True, endpoint=endpoint))
    tracer.record(request())
    waiting = []
    wait_until(lambda: waiting.append(tracer.waiting) or tracer.failed == 1, "the failure")
    assert 1 in waiting, "while it is tried again, it is seen to wait"
    wait_until(lambda: tracer.waiting == 0, "the end of the try")
    tracer.close()


@pytest.fixture
async def start(root, make_pool, tmp_path):
    """Start an HTTP process in front of the model `same`; gives a client of it."""
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool()
    fronts = FrontMetrics()

    async def report(front: dict[str, Any]) -> None:
        fronts.take(front)

    async def metrics(names: str, front: dict[str, Any]) -> str:
        fronts.take(front)
        return fronts.render(names)

    handlers = {**pool.control_handlers(), "metrics": metrics, "metrics.report": report}
    control = ControlServer(tmp_path / "c.sock", handlers)
    await control.start()
    parts = [control.stop]

    async def start(tracing: TracingSettings, log: LogSettings | None = None, **http: Any) -> httpx.AsyncClient:
        process = http_front(HttpSettings(port=0, processes=1, **http), tmp_path / "c.sock", tracing, log)
        await process.start()
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{process.port}", timeout=20, trust_env=False)
        parts.extend([process.stop, client.aclose])

        async def ready() -> bool:
            return (await client.get("/v2/health/ready")).status_code == 200

        await until(ready)
        return client

    yield start
    for stop in reversed(parts):
        await stop()


async def test_a_request_is_traced_from_the_header_to_the_worker(start, collector: Collector):
    client = await start(TracingSettings(enabled=True, endpoint=collector.endpoint, sample_ratio=0))
    header = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    assert (await client.post("/v2/models/same/infer", json=INFER, headers=header)).status_code == 200
    assert (await client.post("/v2/models/same/infer", json=INFER)).status_code == 200  # not in the share
    await until(lambda: len(collector.spans) >= 3)
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"POST /v2/models/{model}/infer", "queue", "compute"}
    server = spans["POST /v2/models/{model}/infer"]
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(server)["millhand.model.name"] == "same"
    assert attributes(server)["millhand.model.version"] == "1"
    assert attributes(server)["url.path"] == "/v2/models/same/infer"
    assert server.start_time_unix_nano <= spans["queue"].start_time_unix_nano
    assert spans["queue"].end_time_unix_nano == spans["compute"].start_time_unix_nano
    assert spans["compute"].start_time_unix_nano < spans["compute"].end_time_unix_nano <= server.end_time_unix_nano

    async def counted() -> bool:
        return 'millhand_traces_total{outcome="sent"} 1\n' in (await client.get("/metrics")).text

    await until(counted)


async def test_the_access_log_is_a_line_a_request(start, capfd):
    client = await start(TracingSettings(), access_log=True)
    header = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    answer = await client.post("/v2/models/same/infer?a=b", json=INFER, headers=header)
    await client.get("/v2/a%0ab")
    text = ""

    def lines() -> list[str]:
        nonlocal text
        text += capfd.readouterr().err
        found = [line for line in text.splitlines() if "millhand.access" in line and "health" not in line]
        return found if len(found) == 2 else []

    infer, odd = await until(lines)
    assert re.search(
        rf'millhand\.access: method=POST path="/v2/models/same/infer" status=200 bytes={len(answer.content)} '
        rf"ms=\d+\.\d{{3}} trace_id={TRACE}$",
        infer,
    )
    assert 'method=GET path="/v2/a%0ab" status=404' in odd


def test_a_client_writes_no_lines_of_its_own(capsys):
    fields = {"method": "GET x\n", "path": '/a"\nb', "status": 404, "bytes": 0, "ms": 1.5, "trace_id": ""}
    AccessLog(LogSettings(), 10).write(fields)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r'millhand.access: method="GET x\n" path="/a\"\nb" status=404 bytes=0 ms=1.500 trace_id=')


async def test_the_access_log_in_json_and_its_limit(start, capfd):
    client = await start(
        TracingSettings(), LogSettings(format="json", level="error"), access_log=True, access_log_per_minute=7
    )
    for _ in range(20):
        await client.get("/v2/health/live")
    await client.aclose()
    text = ""

    def lines() -> list[dict[str, Any]]:
        nonlocal text
        text += capfd.readouterr().err
        found = [json.loads(line) for line in text.splitlines()]
        return found if len(found) >= 7 else []

    found = await until(lines)
    assert len(found) == 7
    assert found[-1]["logger"] == "millhand.access"
    assert (found[-1]["method"], found[-1]["status"], found[-1]["trace_id"]) == ("GET", 200, "")
    assert {"path", "bytes", "ms", "time", "level", "message"} < found[-1].keys()


async def test_no_line_unless_asked(start, capfd):
    client = await start(TracingSettings())
    await client.get("/v2/health/live")
    await client.aclose()
    assert "health" not in capfd.readouterr().err
