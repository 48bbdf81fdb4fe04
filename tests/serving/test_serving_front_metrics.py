"""Metrics of front processes: sums over all that ever ran."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from typing import Any

import httpx
import psutil
import pytest
from serving_kit import identity, until, write_model

from millhand.control import ControlServer
from millhand.metrics import Counter, Gauge, Registry
from millhand.serving import front_metrics
from millhand.serving.front import http_front
from millhand.serving.front_metrics import FrontMetrics, MetricsReporter
from millhand.serving.settings import HttpSettings

LIVE = 'http_requests_total{method="GET",path="/v2/health/live",status="200"}'


def samples(text: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


@pytest.fixture
async def fronts(root, make_pool, tmp_path):
    """What the daemon keeps, behind a control socket."""
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool()
    kept = FrontMetrics()

    async def report(front: dict[str, Any]) -> None:
        kept.take(front)

    async def metrics(names: str, front: dict[str, Any]) -> str:
        kept.take(front)
        return kept.render(names)

    handlers = {**pool.control_handlers(), "metrics": metrics, "metrics.report": report}
    server = ControlServer(tmp_path / "c.sock", handlers)
    await server.start()
    yield kept
    await server.stop()


@pytest.fixture
async def http(fronts, tmp_path):
    process = http_front(HttpSettings(port=0, processes=2), tmp_path / "c.sock")
    await process.start()
    yield process
    await process.stop()


async def ask(port: int, times: int) -> None:
    """Requests on connections of their own, so that every process gets some."""
    for _ in range(times):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            assert (await client.get("/v2/health/live")).status_code == 200


async def asked(port: int) -> float:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
        return samples((await client.get("/metrics")).text).get(LIVE, 0)


async def test_one_page_sums_over_processes_and_outlives_them(http, fronts):
    await ask(http.port, 30)
    await until(lambda: _is(asked(http.port), 30))
    first, second = http.pids
    psutil.Process(first).kill()
    await until(lambda: first not in http.pids and len(http.pids) == 2)
    assert await asked(http.port) == 30, "what a killed process had reported stays"
    await ask(http.port, 10)
    psutil.Process(second).terminate()  # it reports once more
    await until(lambda: second not in http.pids and len(http.pids) == 2)
    await until(lambda: _is(asked(http.port), 40))
    await http.stop()
    assert samples(fronts.render())[LIVE] == 40


async def _is(asking, count):
    return await asking == count


async def test_the_process_that_is_asked_is_exact(fronts, tmp_path):
    process = http_front(HttpSettings(port=0, processes=1), tmp_path / "c.sock")
    await process.start()
    try:
        for count in range(1, 4):
            await ask(process.port, 1)
            assert await asked(process.port) == count
    finally:
        await process.stop()


async def test_a_reporter_says_only_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(front_metrics, "REPORT_EVERY_S", 0.01)
    reports: list[dict[str, Any]] = []

    async def report(front: dict[str, Any]) -> None:
        reports.append(front)

    control = ControlServer(tmp_path / "c.sock", {"metrics.report": report})
    registry = Registry()
    hits = Counter(registry, "hits_total", "Hits.")
    reporter = MetricsReporter(registry, tmp_path / "c.sock")
    rounds = []
    registry.refresh_with(lambda: rounds.append(1))
    task = asyncio.create_task(reporter.run())
    await until(lambda: len(rounds) > 3)
    await control.start()  # a daemon that comes late is told all the same
    hits.inc(2)
    await until(lambda: reports and reports[-1]["families"][0]["values"] == [[[], 2]])
    told, seen = len(reports), len(rounds)
    await until(lambda: len(rounds) > seen + 3)
    assert len(reports) == told
    hits.inc()
    task.cancel()
    await until(task.done)
    assert reports[-1]["families"][0]["values"] == [[[], 3]], "the last word at the end"
    await control.stop()


def report_of(pid: int, count: int, open_connections: int, started_ns: int = 1) -> dict[str, Any]:
    registry = Registry()
    Counter(registry, "hits_total", "Hits.").inc(count)
    Gauge(registry, "open_connections", "Open.").set(open_connections)
    return {"pid": pid, "started_ns": started_ns, "families": registry.snapshot()}


def test_a_gauge_ends_with_its_process_and_a_late_report_counts_once(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    fronts = FrontMetrics()
    fronts.take(report_of(os.getpid(), 5, 2))
    fronts.take(report_of(ended.pid, 3, 7))
    assert samples(fronts.render()) == {"hits_total": 8, "open_connections": 2}
    fronts.take(report_of(ended.pid, 4, 7))  # read after the process' end
    assert samples(fronts.render()) == {"hits_total": 9, "open_connections": 2}
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + front_metrics.LATE_REPORT_S + 1)
    assert samples(fronts.render()) == {"hits_total": 9, "open_connections": 2}
    assert len(fronts._fronts) == 1
    fronts.take(report_of(ended.pid, 1, 1, started_ns=2))  # another process that was given the same id
    assert samples(fronts.render()) == {"hits_total": 10, "open_connections": 2}
