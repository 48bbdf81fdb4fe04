"""/metrics of a running daemon: what pipeline, store, telemetry, sinks and hardware count."""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from millhand.config import Config
from millhand.daemon import Daemon
from millhand.node_metrics import HARDWARE
from millhand.telemetry.broker import EmbeddedBroker
from millhand.validation import validate

ROWS = 40
DEADLINE_S = 60.0


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    """It replays a short recording with one bad value, and publishes to a real broker."""
    monkeypatch.setenv("TEST_WEBHOOK_SECRET", "not a real secret")
    recording = tmp_path / "press.csv"
    rows = [f"{row},{20 + row},{'x' if row == 7 else row}" for row in range(ROWS)]
    recording.write_text("time,temperature,strokes\n" + "\n".join(rows) + "\n")
    with (
        EmbeddedBroker(tmp_path / "broker") as broker,
        tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as run_dir,
    ):
        options = {"path": str(recording), "time_column": "time", "time_format": "epoch_s"}
        table = {
            "node": {"id": "n1", "data_dir": str(tmp_path / "data"), "run_dir": run_dir},
            "http": {"port": 0},
            "telemetry": {"enabled": True, "brokers": [broker.url]},
            "plugins": {"webhook": {"url": "http://127.0.0.1:9/", "secret_env": "TEST_WEBHOOK_SECRET"}},
            "assets": [
                {"name": "press", "adapter": "file", "options": options},
                {"name": "lost", "adapter": "no-such-adapter"},
            ],
        }
        daemon = Daemon(validate(Config, table, "test"))
        await daemon.start()
        yield daemon
        await daemon.stop()


async def scrape(daemon: Daemon) -> dict[str, float]:
    """Sample name with labels -> value, read over HTTP."""
    assert daemon._http is not None
    url = f"http://127.0.0.1:{daemon._http.port}/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    lines = [line.rsplit(" ", 1) for line in (await asyncio.to_thread(read)).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def settled(daemon: Daemon) -> dict[str, float]:
    """The first page after the whole recording was stored and sent."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        page = await scrape(daemon)
        # The bad cell gives a reading without a value, which is committed too.
        if (
            page.get('millhand_readings_total{asset="press"}') == 2 * ROWS
            and page["millhand_telemetry_sent_rows_total"]
        ):
            return page
        await asyncio.sleep(0.05)
    raise AssertionError(page)


async def test_the_parts_of_a_running_node_show(daemon: Daemon) -> None:
    page = await settled(daemon)
    assert page['millhand_assets{state="waiting"}'] == 1
    assert page['millhand_asset_last_batch_age_seconds{asset="press"}'] >= 0
    assert page['millhand_adapter_restarts_total{asset="press"}'] == 0
    assert page['millhand_predictions_total{asset="press"}'] == 0
    assert page["millhand_telemetry_connected"] == 1
    assert page["millhand_telemetry_sessions_total"] == 1
    assert page["millhand_telemetry_queued_rows"] >= 1, "nobody acknowledges here"
    assert page['millhand_sink_delivered_total{sink="webhook"}'] == 0
    assert page["millhand_store_commits_total"] >= 1
    assert 0 <= page["millhand_store_last_commit_age_seconds"] < DEADLINE_S
    assert page["millhand_store_live_bytes"] > 0
    assert page['millhand_process_resident_memory_bytes{process="daemon"}'] > 1e6
    assert not any('asset="lost"' in name for name in page), "an asset that was never read has no counts"


async def test_hardware_is_sampled_at_each_reading(daemon: Daemon) -> None:
    await scrape(daemon)
    page = await scrape(daemon)
    assert 0 <= page["nv_cpu_utilization"] <= 1, "a mean since the reading before"
    assert 0 < page["nv_cpu_memory_used_bytes"] < page["nv_cpu_memory_total_bytes"]
    assert page["millhand_disk_free_bytes"] <= page["millhand_disk_total_bytes"]
    names = {re.split(r"[{ ]", name)[0] for name in page}
    assert names & HARDWARE.keys()


async def test_a_stuck_store_does_not_hang_the_page(daemon: Daemon) -> None:
    await settled(daemon)
    stuck = asyncio.Event()
    loop = asyncio.get_running_loop()

    def block(_: object) -> None:
        asyncio.run_coroutine_threadsafe(stuck.wait(), loop).result()

    waiting = asyncio.ensure_future(daemon.store._thread.engine_call(block))
    try:
        page = await scrape(daemon)
        assert page["millhand_store_commits_total"] >= 1, "the last values stand"
    finally:
        stuck.set()
        await waiting
