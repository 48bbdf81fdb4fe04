import asyncio
import threading
import time
from collections import namedtuple

import psutil
import pytest

from millhand.errors import ConfigError
from millhand.records import Batch, Quality
from millhand.validation import validate
from millhand_plugins.host.adapter import HostAdapter
from millhand_plugins.host.options import HostOptions

# psutil's own shapes; this machine may have no such sensor.
Temperature = namedtuple("Temperature", "label current high critical")
Fan = namedtuple("Fan", "label current")


def adapter(**options) -> HostAdapter:
    return HostAdapter("node", validate(HostOptions, {"every_ms": 100, **options}, "test"))


async def collect(reader: HostAdapter, count: int = 1) -> list[Batch]:
    async with asyncio.timeout(20):
        await reader.open(None)
        batches = []
        source = reader.batches()
        async for batch in source:
            batches.append(batch)
            if len(batches) == count:
                break
        await source.aclose()
        await reader.close()
        return batches


def table(batch: Batch) -> dict:
    return {reading.name: reading for reading in batch.readings}


async def test_the_node_shows_itself(tmp_path):
    (batch,) = await collect(adapter(mounts=["/", str(tmp_path)], include=["cpu", "load", "memory", "mounts", "agent"]))
    found = table(batch)
    assert list(found) == [
        "cpu_used", "load_1m", "load_5m", "load_15m", "memory_used", "memory_available", "agent_rss",
        "disk_used:/", "disk_free:/", f"disk_used:{tmp_path}", f"disk_free:{tmp_path}",
    ]  # fmt: skip
    assert all(reading.quality == Quality.GOOD for reading in batch.readings)
    assert {reading.unit for reading in batch.readings} == {"%", "1", "By"}
    assert 0 <= found["cpu_used"].value <= 100
    assert 10e6 < found["agent_rss"].value < psutil.virtual_memory().total
    assert batch.cursor is None
    assert not found["cpu_used"].clock.synced
    assert abs(found["cpu_used"].clock.source_ns - time.time_ns()) < 60e9


async def test_all_groups_together_never_fail():
    reader = adapter()
    batches = await collect(reader, 2)
    assert {"cpu_used", "memory_used", "disk_used:/"} <= set(table(batches[1]))
    assert not reader.counts


async def test_cpu_use_follows_the_load():
    reader = adapter(include=["cpu"], every_ms=300)
    stop = threading.Event()

    def burn() -> None:
        while not stop.is_set():
            sum(range(1000))

    worker = threading.Thread(target=burn)
    worker.start()
    try:
        batches = await collect(reader, 2)
    finally:
        stop.set()
        worker.join()
    assert table(batches[1])["cpu_used"].value > 50 / psutil.cpu_count()


async def test_written_bytes_show_as_a_rate(monkeypatch):
    counters = namedtuple("Counters", "read_bytes write_bytes")
    state = {"read": 0, "written": 10_000}
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: counters(state["read"], state["written"]))
    reader = adapter(include=["disk_io"], every_ms=100)
    await reader.open(None)
    state["written"] += 1_000_000
    source = reader.batches()
    found = table(await anext(source))
    assert found["disk_read"].value == 0
    assert 1e6 < found["disk_written"].value < 1e7 * 1.01
    state["written"] = 5  # the counter began anew
    found = table(await anext(source))
    assert found["disk_written"].quality == Quality.BAD
    assert found["disk_read"].quality == Quality.GOOD
    await source.aclose()


async def test_traffic_of_chosen_interfaces(monkeypatch):
    (batch,) = await collect(adapter(include=["network"], interfaces=["lo"]))
    assert set(table(batch)) == {"network_received", "network_sent"}
    assert {reading.unit for reading in batch.readings} == {"By/s"}
    reader = adapter(include=["network", "load"], interfaces=["lo", "no-such-0"])
    (batch,) = await collect(reader)
    assert set(table(batch)) == {"load_1m", "load_5m", "load_15m"}
    assert reader.counts["failed"] == 2


async def test_temperatures_and_fans(monkeypatch):
    chips = {
        "coretemp": [Temperature("Package id 0", 51.0, 80.0, 100.0), Temperature("Core 0", 49.5, None, None)],
        "acpitz": [Temperature("", 27.8, None, None), Temperature("", 29.8, None, None)],
        "broken": [Temperature("", 255.5, None, None), Temperature("x", None, None, None)],
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: chips)
    monkeypatch.setattr(psutil, "sensors_fans", lambda: {"thinkpad": [Fan("", 2894)]})
    (batch,) = await collect(adapter(include=["temperature", "fan"]))
    assert {reading.name: (reading.value, reading.unit, reading.quality.name) for reading in batch.readings} == {
        "temperature:coretemp/Package id 0": (51.0, "Cel", "GOOD"),
        "temperature:coretemp/Core 0": (49.5, "Cel", "GOOD"),
        "temperature:acpitz": (27.8, "Cel", "GOOD"),
        "temperature:acpitz#2": (29.8, "Cel", "GOOD"),
        "temperature:broken": (None, "Cel", "BAD"),
        "temperature:broken/x": (None, "Cel", "BAD"),
        "fan:thinkpad": (2894, "rpm", "GOOD"),
    }


async def test_a_sensor_that_fails_later_is_bad_and_one_that_never_worked_is_absent(monkeypatch, caplog):
    def broken() -> None:
        raise FileNotFoundError("/sys/class/hwmon/hwmon3/temp1_input")

    monkeypatch.setattr(psutil, "sensors_temperatures", broken)
    reader = adapter(include=["memory", "temperature", "load"])
    await reader.open(None)
    source = reader.batches()
    found = table(await anext(source))
    assert set(found) == {"memory_used", "memory_available", "load_1m", "load_5m", "load_15m"}
    monkeypatch.setattr(psutil, "virtual_memory", broken)
    found = table(await anext(source))
    bad = {name for name, reading in found.items() if reading.quality == Quality.BAD}
    assert bad == {"memory_used", "memory_available"}
    assert found["load_1m"].quality == Quality.GOOD
    monkeypatch.undo()
    found = table(await anext(source))
    assert found["memory_used"].quality == Quality.GOOD
    assert "sensor 'temperature' cannot be read: FileNotFoundError: /sys/class/hwmon" in caplog.text
    await source.aclose()


async def test_a_mount_that_is_gone_costs_only_itself(tmp_path):
    gone = tmp_path / "stick"
    gone.mkdir()
    reader = adapter(include=["mounts"], mounts=["/", str(gone)])
    await reader.open(None)
    source = reader.batches()
    assert {reading.quality for reading in (await anext(source)).readings} == {Quality.GOOD}
    gone.rmdir()
    found = table(await anext(source))
    assert found[f"disk_used:{gone}"].quality == Quality.BAD
    assert found["disk_used:/"].quality == Quality.GOOD
    await source.aclose()


async def test_a_sensor_that_hangs_stalls_no_other(monkeypatch):
    release = threading.Event()
    calls = []
    usage = psutil.disk_usage

    def hang(path: str) -> object:
        calls.append(path)
        if path != "/":
            release.wait()
        return usage("/")

    monkeypatch.setattr(psutil, "disk_usage", hang)
    reader = adapter(include=["mounts"], mounts=["/", "/srv"], every_ms=100)
    try:
        batches = await collect(reader, 3)
        assert [reading.name for reading in batches[2].readings] == ["disk_used:/", "disk_free:/"]
        assert calls.count("/srv") == 1
        assert reader.counts["hung"] == 4
    finally:
        release.set()
    (batch,) = await collect(reader)
    assert table(batch)["disk_used:/srv"].quality == Quality.GOOD


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": ["cpus"]}, "include"),
        ({"include": []}, "include"),
        ({"every_ms": 1}, "every_ms"),
        ({"mounts": ["data"]}, "no absolute path"),
        ({"mount": ["/"]}, "did you mean 'mounts'"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ConfigError, match=words):
        validate(HostOptions, options, "test")
