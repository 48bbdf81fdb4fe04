"""Rows that do not fit or cannot be read: too large for one message, damaged in the store, unknown to the hub."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing

from millhand.store.rows import Gap, Row
from millhand.telemetry.definitions import ACK_EPOCH, EPOCH, acknowledgement, identity, readable
from millhand.telemetry.payloads import Metric, Type, encode
from millhand.telemetry.voice import MESSAGE_BYTES_CAP

# nats-server's own limit is 1 MiB, the embedded one's 8 MiB: this row is beyond both.
MANY, LENGTH = 600, 20_000


async def test_a_row_larger_than_a_message(kit, nats_broker, listen, hub, tmp_path):
    """It travels in several messages, in order, and the hub counts it once it is whole."""
    listener, center = listen(nats_broker.url), hub(nats_broker.url)
    extra = tuple(kit.reading(f"m{n % 10}", f"{n:03}" * (LENGTH // 3), n) for n in range(MANY))
    async with kit.opened(tmp_path / "s.db") as store, kit.publishing(store, nats_broker.url):
        for index in (0, 1):
            await store.commit(kit.step(index, extra=extra if index == 0 else (), predictions=(kit.prediction(index),)))

        async def acked():
            return await store.acked("bulk") == 2

        await kit.until(acked, "both rows", 60)
    parts = listener.of("DDATA")
    assert len(parts) > MANY * LENGTH * 0.9 / MESSAGE_BYTES_CAP and max(len(one.payload) for one in parts) < 2**20
    ((count, numbers),) = center.query("SELECT count(*), count(DISTINCT value) FROM readings WHERE name LIKE 'm%'")
    assert (count, numbers) == (MANY, MANY)
    assert center.query("SELECT held FROM streams WHERE stream = 'bulk'") == [(2,)]
    assert center.query("SELECT count(*) FROM predictions") == [(2,)]


def test_a_damaged_row_becomes_a_gap():
    for kind, body in (("bulk", b"\xc1"), ("bulk", b"\x92"), ("new kind", b"\x90")):
        row = readable(Row("bulk", 7, "pump", kind, 1, body, "e"))
        assert (row.asset, row.kind, row.record()) == ("", "gap", Gap("bulk", 7, 7, "unreadable"))


async def test_a_damaged_row_does_not_hold_up_its_stream(kit, nats_broker, hub, tmp_path):
    """The body of row 2 is overwritten in the file, as a failing disk may do."""
    path, center = tmp_path / "s.db", hub(nats_broker.url)
    async with kit.opened(path) as store:
        for index in range(3):
            await store.commit(kit.step(index))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE bulk SET body = x'c1c1' WHERE seq = 2")
        connection.commit()
    async with kit.opened(path) as store, kit.publishing(store, nats_broker.url):

        async def acked():
            return await store.acked("bulk") == 3

        await kit.until(acked, "the rows around it")
    assert center.query("SELECT first, last, reason FROM gaps") == [(2, 2, "unreadable")]
    assert center.query("SELECT DISTINCT seq FROM readings ORDER BY 1") == [(1,), (3,)]


async def test_the_hub_keeps_what_it_cannot_read(kit, mosquitto_broker, hub, listen):
    """An alert in a form that this hub does not know: kept as it came, acknowledged, told in the log."""
    listener, center = listen(mosquitto_broker.url), hub(mosquitto_broker.url)
    base, device = f"spBv1.0/{kit.GROUP}", f"{kit.NODE}/pump"
    births = [Metric("bdSeq", 0, Type.INT64, 1), Metric(EPOCH, "e", Type.STRING, 1)]
    names = {identity("alert"): 1, "Alert": 2}
    listener.publish(f"{base}/NBIRTH/{kit.NODE}", encode(births, time_ms=1, seq=0))
    born = [Metric(name, None, Type.STRING, 1, alias) for name, alias in names.items()]
    listener.publish(f"{base}/DBIRTH/{device}", encode(born, time_ms=1, seq=1))
    row = encode([Metric("", 1, Type.INT64, 1, 1), Metric("", "<alert/>", Type.STRING, 1, 2)], time_ms=1, seq=2)
    listener.publish(f"{base}/DDATA/{device}", row)

    def acknowledged():
        return [h for h in listener.of("NCMD") if h.message.named(acknowledgement("alert")) == 1]

    found = await kit.until(acknowledged, "the acknowledgement")
    assert found[0].message.named(ACK_EPOCH) == "e"
    assert center.query("SELECT stream, seq, payload FROM unread") == [("alert", 1, row)]
    assert "kept unread" in center.log()


async def test_status_tells_age_and_rates(kit, nats_broker, listen, tmp_path):
    """The oldest row's age grows until it is acknowledged; the rates count what went and what was acknowledged."""
    listener = listen(nats_broker.url)
    async with kit.opened(tmp_path / "s.db") as store, kit.publishing(store, nats_broker.url) as publisher:
        assert (await publisher.status())["oldest_unsent_s"] == 0
        for index in range(20):
            await store.commit(kit.step(index))

        async def waits():
            status = await publisher.status()
            return status["oldest_unsent_s"] >= 0.1 and status["sent_rows_per_s"] == 2.0

        await kit.until(waits, "an age of 0.1 s, and 20 rows in the last ten seconds")
        assert (await publisher.status())["acked_rows_per_s"] == 0
        listener.acknowledge(store.epoch, bulk=20)

        async def acked():
            status = await publisher.status()
            return status["acked_rows_per_s"] == 2.0 and status["oldest_unsent_s"] == 0

        await kit.until(acked, "the acknowledgement")


async def test_a_node_that_does_not_answer_is_asked_ever_more_rarely(kit, mosquitto_broker, hub, listen):
    """tck-id-operational-behavior-data-commands-ncmd-rebirth-*: another vendor's node must not be drummed at."""
    hub(mosquitto_broker.url)
    listener = listen(mosquitto_broker.url)
    data = encode([Metric("", 1, Type.INT64, 1, 1)], time_ms=1, seq=9)
    begin_s = time.monotonic()

    def asked():
        listener.publish("spBv1.0/other/DDATA/plc/line", data)
        return len(listener.of("NCMD")) == 3

    await kit.until(asked, "three requests")
    assert time.monotonic() - begin_s > 5.5, "2 s, then 4 s"
    assert all(one.message.named("Node Control/Rebirth") is True for one in listener.of("NCMD"))
