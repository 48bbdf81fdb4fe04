"""Metrics: valid exposition, and a page that lists every family."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections import Counter as Counts
from pathlib import Path

import msgspec
import psutil
import pytest
from serving_kit import action, identity, until, write_faulty, write_model

import millhand.node_metrics
import millhand.serving.openai.metrics  # noqa: F401 (bring families)
from millhand.errors import ModelError, OverloadError
from millhand.metrics import DAEMON, TRITON, Counter, Gauge, Histogram, Registry
from millhand.serving.batcher import Request
from millhand.serving.front_metrics import FRONT
from millhand.serving.lanes import LaneStats
from millhand.serving.worker_metrics import Ledger

PAGE = Path(__file__).parents[2] / "docs/metrics.md"


def test_the_page_lists_every_family_with_type_and_help():
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", PAGE.read_text(), re.M)
    assert sorted(listed) == sorted(DAEMON.catalogue() + FRONT.catalogue())


def samples(text):
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def example(family):
    """Lines of a family with one series."""
    yield f"# HELP {family.name} {family.text}"
    yield f"# TYPE {family.name} {family.plain_kind}"
    if family.kind == "histogram":
        yield from (f'{family.name}_bucket{{le="+Inf"}} 1', f"{family.name}_sum 1", f"{family.name}_count 1")
    else:
        yield f"{family.name} 1"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)")
def test_promtool_finds_nothing_in_any_family():
    families = [*DAEMON._families.values(), *FRONT._families.values()]
    page = "\n".join(line for family in families if family.plain_kind for line in example(family)) + "\n"
    done = subprocess.run(["promtool", "check", "metrics"], input=page, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_values_labels_and_escapes():
    registry = Registry()
    gauge = Gauge(registry, "temperature_celsius", "How\nwarm \\ cold.", ["where"])
    counter = Counter(registry, "hits_total", "Hits.")
    Gauge(registry, "never_set", "No sample, no lines.")
    gauge.set(21.5, where='the "hot"\nend\\')
    counter.inc()
    counter.inc(2)
    assert registry.render() == (
        "# HELP temperature_celsius How\\nwarm \\\\ cold.\n"
        "# TYPE temperature_celsius gauge\n"
        'temperature_celsius{where="the \\"hot\\"\\nend\\\\"} 21.5\n'
        "# HELP hits_total Hits.\n# TYPE hits_total counter\nhits_total 3\n"
    )
    with pytest.raises(ValueError, match="has labels"):
        gauge.set(1, place="x")
    with pytest.raises(ValueError, match="exists already"):
        Gauge(registry, "hits_total", "again")


def test_a_histogram_is_cumulative():
    registry = Registry()
    histogram = Histogram(registry, "size_rows", "Rows.", bounds=(1, 2, 4))
    for value, count in ((1, 3), (3, 2), (100, 1)):
        histogram.observe(value, count)
    lines = registry.render().splitlines()[2:]
    assert lines == [
        'size_rows_bucket{le="1"} 3', 'size_rows_bucket{le="2"} 3', 'size_rows_bucket{le="4"} 5',
        'size_rows_bucket{le="+Inf"} 6', "size_rows_sum 109", "size_rows_count 6",
    ]  # fmt: skip


def test_the_plain_page_leaves_out_what_the_linter_refuses():
    registry = Registry()
    Counter(registry, "nv_some_count", "Some.", plain_kind="untyped").inc(3)
    Counter(registry, "nv_some_us", "Time.", plain_kind="").inc(4)
    assert registry.render() == "# HELP nv_some_count Some.\n# TYPE nv_some_count untyped\nnv_some_count 3\n"
    assert "# TYPE nv_some_count counter\n" in registry.render(TRITON)
    assert samples(registry.render(TRITON)) == {"nv_some_count": 3, "nv_some_us": 4}


def test_a_snapshot_travels_and_adds_up():
    one, other = Registry(), Registry()
    for registry, hits in ((one, 2), (other, 5)):
        Counter(registry, "hits_total", "Hits.", ["path"]).inc(hits, path="/v2")
        Histogram(registry, "wait_seconds", "Waits.", bounds=(0.5, 1)).observe(0.75, hits)
        Gauge(registry, "open_connections", "Open.").set(hits)
    Counter(other, "misses_total", "Misses.").inc()
    total = Registry()
    for registry in (one, other):
        total.merge(json.loads(json.dumps(registry.snapshot())))
    assert samples(total.render()) == {
        'hits_total{path="/v2"}': 7, "misses_total": 1, "open_connections": 7,
        'wait_seconds_bucket{le="0.5"}': 0, 'wait_seconds_bucket{le="1"}': 7, 'wait_seconds_bucket{le="+Inf"}': 7,
        "wait_seconds_sum": 5.25, "wait_seconds_count": 7,
    }  # fmt: skip


def test_a_batch_is_counted_by_request_and_by_batch():
    stats = LaneStats()
    early, later = Request({}, 3), Request({}, 1)
    later.arrival_ns = 900_000
    stats.add_batch([early, later], 1_000_000, 3_000_000)
    assert (stats.success, stats.batches, stats.rows, stats.batch_rows) == (2, 1, 4, Counts({4: 1}))
    assert (stats.queue_ns, stats.compute_ns, stats.request_compute_ns) == (1_100_000, 2_000_000, 4_000_000)
    assert stats.queue_counts[:4] == [1, 0, 0, 1], "0.1 ms and 1 ms, both at their bound"
    assert stats.compute_counts[:5] == [0, 0, 0, 0, 1], "once, at most 2.5 ms"


def entry(version, loaded_ns, success, rows=None):
    stats = LaneStats(loaded_ns=loaded_ns, success=success, batch_rows=Counts(rows or {}), session={"tries": success})
    health = {"facts": [["upstream", "http://node: circuit closed"]], "trouble": "", "hint": ""}
    return {"model": "m", "version": version, "waiting": 0, "health": health, **msgspec.structs.asdict(stats)}


def test_totals_outlive_loads_and_are_counted_once():
    ledger = Ledger()

    def success():
        return {version: total["success"] for (_, version), total in ledger.totals().items()}

    ledger.take([entry(1, 100, 5, {2: 1})])
    ledger.take([entry(1, 100, 7, {2: 3})])
    assert success() == {1: 7}
    ledger.take([entry(2, 200, 1)])
    assert success() == {1: 7, 2: 1}, "version 1 was unloaded"
    ledger.take([entry(1, 100, 7, {2: 3}), entry(2, 200, 1)])
    assert success() == {1: 7, 2: 1}, "an answer that came late"
    ledger.take([entry(1, 300, 2, {2: 1, 4: 1})])
    assert success() == {1: 9, 2: 1}, "version 1 was loaded again in a new process, version 2 not yet"
    assert ledger.totals()["m", 1]["batch_rows"] == {2: 4, 4: 1}
    assert ledger.totals()["m", 1]["session"] == {"tries": 9}
    ledger.take([])
    assert success() == {1: 9, 2: 1}


async def test_totals_never_fall_when_a_worker_is_killed_or_a_version_unloaded(root, make_pool):
    identity(write_model(root, "same") / "1/model.onnx")
    write_faulty(root, "faulty")
    pool = await make_pool(heartbeat_ms=20)
    success = 'nv_inference_request_success{model="same",version="1"}'

    async def reached(count):
        return samples(DAEMON.render()).get(success) == count

    for _ in range(3):
        await pool.infer("same", action(1))
    await until(lambda: reached(3))
    psutil.Process(pool._workers["shared"].process.pid).kill()
    await until(lambda: pool._workers["shared"].restarts == 1 and pool.index()[1]["state"] == "ready")
    assert samples(DAEMON.render())[success] == 3
    await pool.infer("same", action(1))
    await until(lambda: reached(4))
    await pool.infer("same", action(1))
    await pool.unload("same")  # the worker stays, for the other model
    assert await reached(5)
    await pool.load("same")
    await pool.infer("same", action(1))
    await pool.unload("faulty")
    await pool.unload("same")  # the worker ends
    page = samples(DAEMON.render(TRITON))
    assert page[success] == 6
    labels = '{model="same",version="1"}'
    assert page[f"millhand_inference_queue_seconds_count{labels}"] == 6
    assert page[f"millhand_inference_compute_seconds_count{labels}"] == page[f"nv_inference_exec_count{labels}"]
    assert page[f"nv_inference_request_duration_us{labels}"] > page[f"nv_inference_queue_duration_us{labels}"]
    assert f"millhand_model_ready{labels}" not in page


async def test_reasons_of_failure_are_tritons(root, make_pool):
    write_faulty(root, "faulty", extra="max_batch = 1")
    pool = await make_pool(queue=1, heartbeat_ms=20)
    busy = asyncio.create_task(pool.infer("faulty", action(5), deadline_ms=10_000))
    await until(pool._workers["shared"].process.blackbox.running)
    outcomes = await asyncio.gather(
        *(pool.infer("faulty", action(0), deadline_ms=10_000) for _ in range(3)), return_exceptions=True
    )
    assert sum(isinstance(outcome, OverloadError) for outcome in outcomes) == 2
    await busy
    with pytest.raises(ModelError):
        await pool.infer("faulty", action(3))

    async def failures():
        page = samples(DAEMON.render())
        key = 'nv_inference_request_failure{{model="faulty",version="1",reason="{}"}}'
        found = {reason: page.get(key.format(reason)) for reason in ("BACKEND", "CANCELED", "REJECTED")}
        return found == {"BACKEND": 1, "CANCELED": 0, "REJECTED": 2}

    await until(failures)
    assert samples(DAEMON.render())['millhand_inference_refused_total{model="faulty",version="1"}'] == 2


def test_prometheus_own_parser_reads_it():
    parser = pytest.importorskip("prometheus_client.parser")
    registry = Registry()
    Gauge(registry, "a_bytes", "A.", ["x"]).set(float("inf"), x='q"\\\n')
    Histogram(registry, "b_seconds", "B.", ["x"], bounds=(0.5, 1)).observe(0.7, x="y")
    families = {family.name: family for family in parser.text_string_to_metric_families(registry.render())}
    assert families["a_bytes"].samples[0].labels == {"x": 'q"\\\n'}
    assert families["b_seconds"].type == "histogram"
    assert [sample.value for sample in families["b_seconds"].samples] == [0, 1, 1, 0.7, 1]
