"""Caps: what goes first, what stays, and that the disk gets its bytes back."""

from __future__ import annotations

import asyncio

import pytest

from millhand.errors import ConfigError
from millhand.records import AlertState
from millhand.store import Gap, Store, StoreSettings
from millhand.validation import validate

SECOND_DAYS = 1 / 86_400


async def fill(store: Store, kit, count: int, start: int = 0, **parts: object) -> None:
    for first in range(start, start + count, 50):
        indexes = range(first, min(first + 50, start + count))
        await asyncio.gather(*(store.commit(kit.step(index, readings=40, **parts)) for index in indexes))


def small(kit, **changes: object) -> dict[str, object]:
    return {"bytes_cap": 2 * kit.MIB, "waveform_bytes_cap": 64 * 1024, "free_disk_floor_bytes": 0, **changes}


async def test_bytes_cap_drops_the_oldest_and_leaves_one_gap(kit, path):
    async with kit.opened(path, **small(kit)) as store:
        await store.commit(kit.step(0, alerts=(kit.alert(1),), orders=(kit.order(1),)))
        await fill(store, kit, 4000, 1)

        async def is_small() -> bool:
            return (await store.status())["live_bytes"] <= 2 * kit.MIB

        await kit.until(is_small)
        status = await store.status()
        stream = status["streams"]["bulk"]
        first, *rows = await store.pending("bulk", 0, 10_000)
        assert first.record() == Gap("bulk", 1, rows[0].seq - 1, "bytes")
        assert [row.seq for row in rows] == list(range(rows[0].seq, 4002))
        assert stream["dropped"] == {"bytes": rows[0].seq - 1}
        assert stream["rows"] == len(rows)
        assert stream["bytes"] == sum(len(row.body) for row in rows)
        # Alerts outlive raw readings.
        assert [row.kind for row in await store.pending("alert", 0)] == ["alert", "order"]
        assert await store.resume("pump") == (b"4000", b"state 4000")


async def test_acknowledged_rows_go_first_and_leave_no_gap(kit, path):
    async with kit.opened(path, **small(kit, bytes_cap=4 * kit.MIB)) as store:
        await fill(store, kit, 600)
        await store.acknowledge("bulk", 600)
        await fill(store, kit, 600, 600)
        rows = await store.pending("bulk", 600, 10_000)
        assert [row.seq for row in rows] == list(range(601, 1201))
        assert (await store.status())["streams"]["bulk"]["dropped"] == {}
        assert (await store.pending("bulk", 0))[0].seq > 1


async def test_waveforms_go_before_unsent_rows(kit, path):
    async with kit.opened(path, **small(kit, waveform_bytes_cap=kit.MIB)) as store:
        for index in range(50):
            await store.commit(kit.step(index, readings=1, waveforms=(kit.waveform(index, samples=5000),)))
        full_bytes = (await store.status())["waveform_bytes"]
        await fill(store, kit, 300, 50)

        async def has_less() -> bool:
            return (await store.status())["waveform_bytes"] < full_bytes

        await kit.until(has_less)
        assert (await store.status())["streams"]["bulk"]["dropped"] == {}
        assert await store.waveform("pump", "acceleration") == kit.waveform(49, samples=5000)


async def test_age_caps_give_the_disk_back(kit, path):
    async with kit.opened(path) as store:
        await fill(store, kit, 3000)
        predictions = tuple(kit.prediction(index) for index in range(1000))
        await store.commit(kit.step(3001, predictions=predictions))
        await store.acknowledge("bulk", 2000)
    full_bytes = path.stat().st_size
    ages = {
        "age_cap_days": SECOND_DAYS,
        "history_age_cap_days": SECOND_DAYS,
        "prediction_age_cap_days": SECOND_DAYS,
        "rollup_age_cap_days": SECOND_DAYS,
    }
    async with kit.opened(path, **ages) as store:

        async def is_empty() -> bool:
            if await store.predictions("pump") or await store.rollups("pump", "m0"):
                return False
            status = await store.status()
            return status["streams"]["bulk"]["rows"] == 0 and status["file_bytes"] < full_bytes / 2

        await kit.until(is_empty)
        assert full_bytes > 4 * kit.MIB
        (gap,) = await store.pending("bulk", 0)
        assert gap.record() == Gap("bulk", 2001, 3001, "age")
        await store.commit(kit.step(4000))
        assert await store.last("bulk") == 3002
    assert path.stat().st_size < full_bytes / 2


async def test_closed_alerts_age_and_open_ones_do_not(kit, path):
    async with kit.opened(path) as store:
        await store.commit(kit.step(0, alerts=(kit.alert(1), kit.alert(2)), orders=(kit.order(1), kit.order(2))))
        await store.commit(kit.step(1, alerts=(kit.alert(1, state=AlertState.CLEARED),)))
    async with kit.opened(path, alert_age_cap_days=SECOND_DAYS) as store:

        async def is_gone() -> bool:
            return await store.alert("alert-1") is None and await store.order("order-1") is None

        await kit.until(is_gone)
        assert [alert.id for alert in await store.alerts()] == ["alert-2"]
        assert [order.id for order in await store.orders()] == ["order-2"]


async def test_time_until_full_follows_the_rate(kit, path, monkeypatch):
    monkeypatch.setattr("millhand.store.engine.RATE_SAMPLE_S", 0.05)
    async with kit.opened(path, **small(kit, bytes_cap=32 * kit.MIB)) as store:
        assert (await store.status())["seconds_until_full"] is None
        await fill(store, kit, 500)
        first = (await store.status())["seconds_until_full"]
        assert 0 < first < 3600


def test_a_ring_larger_than_half_the_store_is_refused(kit):
    with pytest.raises(ConfigError, match="more than half of bytes_cap"):
        validate(StoreSettings, {"bytes_cap": 2 * kit.MIB, "waveform_bytes_cap": 2 * kit.MIB}, "millhand.toml")
