"""What is sent, when it is sent again, and what an acknowledgement does, with a host that says only what it is told."""

from __future__ import annotations

import pytest

from millhand.telemetry.flight import Flight
from millhand.telemetry.payloads import Metric, Type


def sequences(heard, stream="bulk"):
    """(seq, historical) of each row of a stream, in order of arrival."""
    found, alias = [], {}
    for one in heard:
        for metric in one.message.metrics:
            if metric.name == f"Identity/{stream}":
                alias[one.topic.device] = metric.alias
            elif metric.alias == alias.get(one.topic.device) and one.topic.kind in ("NDATA", "DDATA"):
                found.append((metric.value, metric.historical))
    return found


async def commit(kit, store, first, last, **parts):
    for index in range(first, last + 1):
        await store.commit(kit.step(index, **parts))


async def test_what_is_not_acknowledged_is_sent_again(kit, nats_broker, listen, tmp_path):
    listener = listen(nats_broker.url)
    async with (
        kit.opened(tmp_path / "s.db") as store,
        kit.publishing(store, nats_broker.url, ack_timeout_s=0.3) as publisher,
    ):
        await kit.until(lambda: listener.of("NBIRTH"), "NBIRTH")
        await commit(kit, store, 1, 5)
        await kit.until(lambda: len(sequences(listener.heard)) >= 10, "the rows again")
        assert sequences(listener.heard)[:10] == [(n, False) for n in range(1, 6)] + [(n, True) for n in range(1, 6)]
        status = await publisher.status()
        assert "does not acknowledge" in status["error"]
        assert status["hub_silent_s"] >= 0.3, "counted from the first row on, not from the repeats"
        listener.acknowledge("another epoch", bulk=5)
        listener.publish("spBv1.0/plant/NCMD/node-1", b"\xff\xff garbage")
        listener.publish("spBv1.0/plant/NCMD/node-1", b"")
        listener.command(Metric("Hub/epoch", 7, Type.INT64), Metric("Hub/ack/bulk", "5", Type.STRING))
        listener.acknowledge(store.epoch, bulk=3)

        async def acked():
            return await store.acked("bulk")

        assert await kit.until(acked, "the acknowledgement") == 3
        status = await publisher.status()
        assert status["queued_rows"] == 2 and status["error"] == "" and status["acknowledgements"] == 1
        seen = len(listener.heard)
        await kit.until(lambda: len(sequences(listener.heard)) > len(sequences(listener.heard[:seen])), "row 4 again")
        listener.acknowledge(store.epoch, bulk=2)  # never goes back
        listener.acknowledge(store.epoch, bulk=5)

        async def drained():
            return not (await publisher.status())["queued_rows"]

        await kit.until(drained, "the end of the queue")
        assert (await publisher.status())["hub_silent_s"] is None


def test_patience_with_a_deaf_hub_grows_and_comes_back():
    flight = Flight(10, 1000, 1.0)
    flight.begin("epoch", {"alert": 0, "bulk": 0}, {"alert": 0, "bulk": 0})
    assert flight.patience_s is None
    flight.send("bulk", 4, 1)
    for expected_s in (2, 4, 8, 16, 16):
        flight.grow_patience()
        assert flight.rewind() == 4
        flight.send("bulk", 4, 1)
        assert flight.patience_s == pytest.approx(expected_s, abs=0.2)
    flight.acknowledge("bulk", 2)
    assert flight.patience_s == pytest.approx(1, abs=0.2) and flight.room("bulk") == 8
    flight.acknowledge("bulk", 9)
    assert flight.sent["bulk"] == 9 and not flight.is_awaiting


def test_the_window_in_bytes():
    """Bytes count like rows: freed by an acknowledgement, by going back, and by a birth; one row always may go."""
    flight, none = Flight(10, 100, 1.0), {"alert": 0, "bulk": 0}
    flight.begin("epoch", none, none)
    flight.send("bulk", 1, 60)
    assert flight.room("bulk") == 9
    flight.send("bulk", 2, 900)
    assert flight.room("bulk") == 0 and flight.room("alert") == 10
    flight.acknowledge("bulk", 1)
    assert flight.room("bulk") == 0
    flight.acknowledge("bulk", 2)
    assert flight.room("bulk") == 10
    flight.send("bulk", 3, 100)
    flight.rewind()
    assert flight.room("bulk") == 10
    flight.send("bulk", 3, 100)
    flight.begin("other", none, none)
    assert flight.room("bulk") == 10


async def test_the_window(kit, nats_broker, listen, tmp_path):
    """No more than `in_flight_rows` beyond the acknowledged row."""
    listener = listen(nats_broker.url)
    async with kit.opened(tmp_path / "s.db") as store:
        await commit(kit, store, 1, 40)
        async with kit.publishing(store, nats_broker.url, in_flight_rows=15, ack_timeout_s=60) as publisher:
            for acked, expected in ((0, 15), (10, 25), (25, 40)):
                listener.acknowledge(store.epoch, bulk=acked)
                await kit.until(lambda e=expected: len(sequences(listener.heard)) >= e, f"row {expected}")
                listener.command(Metric("probe", True, Type.BOOLEAN))
                await kit.until(lambda: listener.of("NCMD")[-1].message.metrics[0].name == "probe", "the probe")
                assert [seq for seq, _ in sequences(listener.heard)] == list(range(1, expected + 1))
            assert (await publisher.status())["sent"] == 40


async def test_a_host_that_comes_back_is_told_again(kit, nats_broker, listen, tmp_path):
    listener = listen(nats_broker.url)
    async with kit.opened(tmp_path / "s.db") as store, kit.publishing(store, nats_broker.url):
        await kit.until(lambda: listener.of("NBIRTH"), "NBIRTH")
        await commit(kit, store, 1, 3)
        await kit.until(lambda: len(sequences(listener.heard)) == 3, "the rows")
        listener.say_state(True, 5)
        await kit.until(lambda: len(sequences(listener.heard)) == 6, "the rows again")
        assert sequences(listener.heard)[3:] == [(1, True), (2, True), (3, True)]


async def test_session_delivery(kit, way, listen, tmp_path):
    """A host that never acknowledges: rows count as delivered when the broker has them, while the host is online."""
    listener = listen(way.url)
    async with kit.opened(tmp_path / "s.db") as store:
        await commit(kit, store, 1, 450, alerts=())
        options = {"delivery": "session", "primary_host": kit.HOST, "protocol": way.protocol}
        async with kit.publishing(store, way.url, **options) as publisher:

            async def waits():
                return "offline" in (await publisher.status())["error"]

            await kit.until(waits, "the wait for the host")
            assert await store.acked("bulk") == 0
            listener.say_state(True, 1)

            async def delivered():
                return await store.acked("bulk") == 450

            await kit.until(delivered, "the end of the queue")
            await kit.until(lambda: len(sequences(listener.heard)) == 450, "the rows")
        assert [seq for seq, _ in sequences(listener.heard)] == list(range(1, 451))


async def test_gaps_travel_on_their_stream(kit, nats_broker, listen, hub, tmp_path):
    """Rows that the store had to drop come as a gap, and the hub's count goes on behind it."""
    async with kit.opened(tmp_path / "s.db", bytes_cap=2**20, waveform_bytes_cap=0) as store:
        many = tuple(kit.reading(f"m{n}", "x" * 200, 0) for n in range(20))
        for index in range(1, 401):
            await store.commit(kit.step(index, extra=many, alerts=(kit.alert(index),) if index == 1 else ()))
        rows = await store.pending("bulk", 0)
        assert rows[0].kind == "gap"
        gap = rows[0].record()
        listener, center = listen(nats_broker.url), hub(nats_broker.url)
        async with kit.publishing(store, nats_broker.url) as publisher:

            async def drained():
                return not (await publisher.status())["queued_rows"]

            await kit.until(drained, "the end of the queue")
        ((stream, first, last),) = center.query("SELECT stream, first, last FROM gaps")
        assert (stream, first) == ("bulk", 1) and last >= gap.last  # the store may have dropped more meanwhile
        stored = [seq for (seq,) in center.query("SELECT DISTINCT seq FROM readings ORDER BY seq")]
        assert stored == list(range(last + 1, 401))
        assert center.query("SELECT stream, held FROM streams ORDER BY 1") == [("alert", 1), ("bulk", 400)]
        gaps = [one for one in listener.of("NDATA") if len(one.message.metrics) == 3]
        assert gaps and all(one.topic.device == "" for one in gaps)


async def test_a_new_store_file_is_a_new_epoch(kit, nats_broker, listen, hub, tmp_path):
    """The file is deleted while in use: a birth tells the new epoch, and rows of both arrive."""
    listener, center = listen(nats_broker.url), hub(nats_broker.url)
    path = tmp_path / "s.db"
    async with kit.opened(path) as store, kit.publishing(store, nats_broker.url) as publisher:

        async def drained():
            return not (await publisher.status())["queued_rows"]

        await commit(kit, store, 1, 30)
        await kit.until(drained, "the end of the queue")
        before = store.epoch
        for name in ("s.db", "s.db-wal"):
            (tmp_path / name).unlink()

        async def renewed():
            await store.commit(kit.step(31))
            return store.epoch != before

        await kit.until(renewed, "the new file")
        await commit(kit, store, 32, 60)
        await kit.until(drained, "the end of the queue")
        epochs = [one.message.named("Identity/epoch") for one in listener.of("NBIRTH")]
        assert epochs[0] == before and epochs[-1] == store.epoch
        assert len({one.message.named("bdSeq") for one in listener.of("NBIRTH")}) == 1
        held = center.query("SELECT epoch, held FROM streams WHERE stream = 'bulk'")
        assert held == sorted([(before, 30 + held_extra(held, before)), (store.epoch, await store.last("bulk"))])
        values = center.query("SELECT DISTINCT value FROM readings WHERE epoch = ?", store.epoch)
        assert {value for (value,) in values} >= set(range(32, 61))


def held_extra(held, epoch):
    """Rows 31 may have gone to the old file before it was noticed to be gone."""
    return dict(held)[epoch] - 30


async def test_a_store_that_fails_does_not_end_the_publisher(kit, nats_broker, listen, tmp_path):
    """An acknowledgement that cannot be stored is told in the log; a broken `pending` ends the session alone."""
    listener = listen(nats_broker.url)
    async with kit.opened(tmp_path / "s.db") as store, kit.publishing(store, nats_broker.url) as publisher:
        await commit(kit, store, 1, 3)
        await kit.until(lambda: len(sequences(listener.heard)) >= 3, "the rows")
        await store.close()
        listener.acknowledge(store.epoch, bulk=3)
        listener.command(Metric("Node Control/Rebirth", True, Type.BOOLEAN))
        await kit.until(lambda: listener.of("NDEATH"), "NDEATH")
        assert publisher._task is not None and not publisher._task.done()
