"""One step, one transaction: what is stored and how it reads back."""

from __future__ import annotations

import asyncio
import math

import pytest

from millhand.errors import StoreError
from millhand.records import AlertState, Batch, Quality, Reading, Severity
from millhand.store import Bulk, MetricSpec, Step


async def test_a_step_comes_back_whole(kit, path):
    step = kit.step(
        1,
        predictions=(kit.prediction(1),),
        alerts=(kit.alert(1),),
        orders=(kit.order(1),),
        waveforms=(kit.waveform(1),),
    )
    async with kit.opened(path) as store:
        await store.commit(step)
    async with kit.opened(path) as store:
        assert await store.resume("pump") == (b"1", b"state 1")
        (row,) = await store.pending("bulk", 0)
        assert (row.seq, row.asset, row.kind, row.epoch) == (1, "pump", "bulk", store.epoch)
        assert row.record() == Bulk(step.batch.readings, step.predictions)
        alert_row, order_row = await store.pending("alert", 0)
        assert alert_row.record() == step.alerts[0] == await store.alert("alert-1")
        assert order_row.record() == step.orders[0] == await store.order("order-1")
        assert await store.predictions("pump") == list(step.predictions)
        assert await store.waveform("pump", "acceleration") == step.batch.waveforms[0]
        assert [chunk async for chunk in store.readings("pump")] == [list(step.batch.readings)]


async def test_unknown_names_read_as_nothing(kit, path):
    async with kit.opened(path) as store:
        assert await store.resume("none") == (None, None)
        assert await store.predictions("none") == []
        assert await store.rollups("none", "m0") == []
        assert await store.waveform("none", "w") is None
        assert await store.alert("none") is None
        assert await store.order("none") is None
        assert [chunk async for chunk in store.readings("none")] == []


async def test_a_step_without_readings_and_predictions_leaves_no_row(kit, path):
    async with kit.opened(path) as store:
        await store.commit(Step("pump", Batch(cursor=b"9"), b"s"))
        assert await store.last("bulk") == 0
        assert await store.resume("pump") == (b"9", b"s")


async def test_a_batch_without_cursor_keeps_the_last_one(kit, path):
    async with kit.opened(path) as store:
        await store.commit(kit.step(3))
        await store.commit(Step("pump", Batch(), b"later"))
        assert await store.resume("pump") == (b"3", b"later")


async def test_a_repeated_prediction_is_ignored_and_counted(kit, path):
    async with kit.opened(path) as store:
        await store.commit(kit.step(1, predictions=(kit.prediction(1),)))
        await store.commit(kit.step(2, predictions=(kit.prediction(1), kit.prediction(2))))
        rows = await store.pending("bulk", 0)
        assert [row.record().predictions for row in rows] == [(kit.prediction(1),), (kit.prediction(2),)]
        assert len(await store.predictions("pump", "rul")) == 2
        assert (await store.status())["repeated_predictions"] == 1


async def test_predictions_by_time_and_newest_first_cut(kit, path):
    async with kit.opened(path) as store:
        for index in range(10):
            both = (kit.prediction(index), kit.prediction(index, model="faults"))
            await store.commit(kit.step(index, predictions=both))
        since, until = kit.prediction(2).window_end_ns, kit.prediction(5).window_end_ns
        found = await store.predictions("pump", "rul", since, until)
        assert [item.values["rul"] for item in found] == [2.0, 3.0, 4.0, 5.0]
        assert [item.values["rul"] for item in await store.predictions("pump", "rul", limit=2)] == [8.0, 9.0]
        assert len(await store.predictions("pump")) == 20


async def test_an_alert_changes_by_id_and_each_change_leaves_a_row(kit, path):
    async with kit.opened(path) as store:
        await store.commit(kit.step(1, alerts=(kit.alert(1),)))
        await store.commit(kit.step(2, alerts=(kit.alert(1),)))  # nothing new
        await store.commit(kit.step(3, alerts=(kit.alert(1, severity=Severity.CRITICAL),)))
        acked = await store.ack_alert("alert-1", "Ada", 77)
        assert (acked.state, acked.acked_by, acked.changed_ns) == (AlertState.ACKED, "Ada", 77)
        assert await store.ack_alert("alert-1", "Bob", 78) == acked
        # The rule goes on updating its alert: what the person did stays.
        await store.commit(kit.step(4, alerts=(kit.alert(1, severity=Severity.CRITICAL, message="worse"),)))
        await store.commit(kit.step(5, alerts=(kit.alert(1, state=AlertState.CLEARED, changed_ns=99),)))
        rows = [row.record() for row in await store.pending("alert", 0)]
        assert [(row.state, row.acked_by) for row in rows] == [
            (AlertState.OPEN, ""),
            (AlertState.OPEN, ""),
            (AlertState.ACKED, "Ada"),
            (AlertState.ACKED, "Ada"),
            (AlertState.CLEARED, "Ada"),
        ]
        assert rows[3].changed_ns == 77
        assert await store.alerts("open") == []
        assert [alert.id for alert in await store.alerts(AlertState.CLEARED, "pump")] == ["alert-1"]
        with pytest.raises(StoreError, match="'alert-9' is not known"):
            await store.ack_alert("alert-9", "Ada", 1)


async def test_orders_are_unique_and_listed_newest_first(kit, path):
    async with kit.opened(path) as store:
        await store.commit(kit.step(1, alerts=(kit.alert(1),), orders=(kit.order(1),)))
        await store.commit(kit.step(2, orders=(kit.order(1), kit.order(2))))
        assert [order.id for order in await store.orders()] == ["order-2", "order-1"]
        assert [order.id for order in await store.orders(alert_id="alert-1")] == ["order-1"]
        assert await store.orders(asset="fan") == []
        assert [row.kind for row in await store.pending("alert", 0)] == ["alert", "order", "order"]


async def test_rollups_fold_each_minute(kit, path):
    values = [3.0, 1.0, math.nan, math.inf, 1e305, 8]
    async with kit.opened(path) as store:
        for second, value in [*enumerate(values), (70, 5.5)]:
            clock = kit.clock(kit.START_NS - kit.START_NS % (60 * kit.SECOND_NS) + second * kit.SECOND_NS)
            readings = (
                Reading("v", value, "g", clock),
                Reading("on", True, "1", clock),
                Reading("text", "warm", "1", clock),
                Reading("bad", 1e9, "g", clock, Quality.BAD),
            )
            await store.commit(Step("pump", Batch(readings), b""))
        first, second = await store.rollups("pump", "v")
        assert (first.low, first.high, first.total, first.count, first.last) == (1.0, 8.0, 12.0, 3, 8.0)
        assert first.mean == 4.0
        assert (second.minute_ns - first.minute_ns, second.count, second.last) == (60 * kit.SECOND_NS, 1, 5.5)
        assert await store.rollups("pump", "v", since_ns=second.minute_ns) == [second]
        assert await store.rollups("pump", "v", until_ns=first.minute_ns + 5) == [first]
        for name in ("on", "text", "bad"):
            assert await store.rollups("pump", name) == []


async def test_rollups_longer_than_a_slice(kit, path, monkeypatch):
    monkeypatch.setattr("millhand.store.store.ROLLUP_SLICE", 7)
    async with kit.opened(path) as store:
        clocks = [kit.clock(kit.START_NS + minute * 60 * kit.SECOND_NS) for minute in range(40)]
        await store.commit(Step("pump", Batch(tuple(Reading("v", 1.0, "g", clock) for clock in clocks)), b""))
        assert len(await store.rollups("pump", "v")) == 40


async def test_metric_specs_hold_the_newest_good_value(kit, path):
    clock = kit.clock(kit.START_NS)
    async with kit.opened(path) as store:
        for value, quality in ((1.5, Quality.GOOD), (2.5, Quality.GOOD), (99.0, Quality.BAD)):
            await store.commit(Step("pump", Batch((Reading("t", value, "Cel", clock, quality),)), b""))
        rest = (Reading("on", True, "1", clock), Reading("n", math.nan, "1", clock), Reading("s", "é", "1", clock))
        await store.commit(Step("fan", Batch((*rest, Reading("q", 1, "1", clock, Quality.STALE))), b""))
        await store.commit(Step("pump", Batch((Reading("t", 3.5, "K", clock),)), b""))
        assert await store.metric_specs() == [
            MetricSpec("pump", "t", "K", 3.5, kit.START_NS),
            MetricSpec("fan", "on", "1", True, kit.START_NS),
            MetricSpec("fan", "n", "1", None, kit.START_NS),
            MetricSpec("fan", "s", "1", "é", kit.START_NS),
            MetricSpec("fan", "q", "1", None, 0),
        ]


async def test_waveforms_are_a_ring(kit, path):
    async with kit.opened(path, waveform_bytes_cap=20_000) as store:
        for index in range(12):
            await store.commit(kit.step(index, waveforms=(kit.waveform(index),)))
        assert await store.waveform("pump", "acceleration") == kit.waveform(11)
        assert 12_000 < (await store.status())["waveform_bytes"] <= 20_000
        await store.commit(kit.step(13, waveforms=(kit.waveform(13, samples=100_000, name="huge"),)))
        assert await store.waveform("pump", "huge") is None
        assert await store.waveform("pump", "acceleration") == kit.waveform(11)
    async with kit.opened(path, waveform_bytes_cap=20_000) as store:
        assert 12_000 < (await store.status())["waveform_bytes"] <= 20_000


async def test_readings_by_name_and_time_in_chunks(kit, path):
    async with kit.opened(path) as store:
        await asyncio.gather(*(store.commit(kit.step(index)) for index in range(700)))
        since, until = kit.START_NS + 100 * kit.SECOND_NS, kit.START_NS + 649 * kit.SECOND_NS
        chunks = [chunk async for chunk in store.readings("pump", ["m0", "m3"], since, until)]
        assert len(chunks) > 1
        values = [reading.value for chunk in chunks for reading in chunk if reading.name == "m0"]
        assert values == [float(index) for index in range(100, 650)]
        assert sum(len(chunk) for chunk in chunks) == 2 * 550


async def test_steps_that_wait_go_together(kit, path):
    async with kit.opened(path) as store:
        await asyncio.gather(*(store.commit(kit.step(index, f"asset-{index % 5}")) for index in range(500)))
        status = await store.status()
        assert status["steps"] == 500
        assert status["commits"] < 100
        rows = await store.pending("bulk", 0, 1000)
        assert [row.seq for row in rows] == list(range(1, 501))
        assert [row.record().readings[0].value for row in rows] == [float(index) for index in range(500)]


@pytest.mark.parametrize("value", [2**70, object(), "\ud800"])
async def test_a_value_that_cannot_be_stored_fails_alone(kit, path, value):
    bad = Step("pump", Batch((Reading("x", value, "1", kit.clock(kit.START_NS)),)), b"")
    async with kit.opened(path) as store:
        results = await asyncio.gather(
            store.commit(kit.step(1)), store.commit(bad), store.commit(kit.step(2)), return_exceptions=True
        )
        assert isinstance(results[1], StoreError)
        assert "asset 'pump'" in results[1].message
        assert results[0] is results[2] is None
        assert await store.last("bulk") == 2


async def test_a_bad_time_fails_alone_inside_a_group(kit, path):
    """SQLite refuses it only when its turn comes: the neighbours of its group are committed all the same."""
    bad = Step("pump", Batch((Reading("x", 1.0, "1", kit.clock(2**63 + 5)),)), b"")
    async with kit.opened(path) as store:
        steps = [kit.step(1), kit.step(2), bad, kit.step(3), kit.step(4)]
        results = await asyncio.gather(*(store.commit(step) for step in steps), return_exceptions=True)
        assert [isinstance(result, StoreError) for result in results] == [False, False, True, False, False]
        rows = await store.pending("bulk", 0)
        assert [(row.seq, row.record().readings[0].value) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


async def test_sinks_keep_their_place(kit, path):
    async with kit.opened(path) as store:
        await store.commit(kit.step(0, alerts=(kit.alert(0),)))
    async with kit.opened(path) as store:
        await store.commit(kit.step(1, alerts=(kit.alert(1),), orders=(kit.order(1),)))
        assert await store.sink_cursor("hook") == 1  # a new sink is not told what came before the start
        found = await store.records_after(1)
        assert [record for _, record in found] == [kit.alert(1), kit.order(1)]
        await store.advance_sink("hook", found[0][0])
        await store.advance_sink("hook", 1)
        await store.advance_sink("hook", 999)
    async with kit.opened(path) as store:
        assert await store.sink_cursor("hook") == 2
        assert await store.sink_cursor("mail") == 3
        assert [record for _, record in await store.records_after(2, limit=1)] == [kit.order(1)]


async def test_changed_wakes_every_waiter(kit, path):
    async with kit.opened(path) as store:
        seen = store.changed.count
        waiters = [asyncio.create_task(store.changed.after(seen)) for _ in range(3)]
        await store.commit(kit.step(1))
        assert await asyncio.wait_for(asyncio.gather(*waiters), 5) == [seen + 1] * 3
        assert await store.changed.after(seen) == seen + 1  # a change that came first is not missed


async def test_a_closed_store_says_so(kit, path):
    async with kit.opened(path) as store:
        pass
    with pytest.raises(StoreError, match="closed"):
        await store.commit(kit.step(1))


async def test_wall_clock_in_1970_and_jumping_back(kit, path, monkeypatch):
    """A node without a battery starts in 1970, gets the time, loses it, and once believes it is 2150."""
    walls = [1_000, kit.START_NS, 2_000, 5_680_000_000 * kit.SECOND_NS, kit.START_NS + 1]
    async with kit.opened(path, age_cap_days=1, history_age_cap_days=1) as store:
        for index, wall_ns in enumerate(walls):
            monkeypatch.setattr("time.time_ns", lambda wall_ns=wall_ns: wall_ns)
            clock = kit.clock(wall_ns)
            await store.commit(Step("pump", Batch((Reading("v", float(index), "g", clock),)), b""))
        await store.acknowledge("bulk", 2)
    async with kit.opened(path, age_cap_days=1, history_age_cap_days=1) as store:
        for _ in range(2):  # upkeep, which looks at ages first of all, runs after each call
            await store.status()
        rows = await store.pending("bulk", 0)
        assert [row.record().readings[0].value for row in rows] == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert [rollup.last for rollup in await store.rollups("pump", "v")] == [2.0, 4.0, 3.0]
        found = [reading.value async for chunk in store.readings("pump", until_ns=5_000) for reading in chunk]
        assert found == [0.0, 2.0]
