"""Node, broker and hub as real processes, killed in mid-stream: nothing is lost, nothing doubled.

Counted from outside: what the store holds against what the hub's database holds, by set differences.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from millhand.cli.state import telemetry_text

PROCESS = Path(__file__).with_name("publisher_process.py")


def assert_same(rows, center):
    """Every reading, prediction and alert of the store's rows is at the hub, once."""
    bulks = [(row.epoch, row.seq, row.record()) for row in rows if row.kind == "bulk"]
    produced = Counter((e, s, r.name, float(r.value)) for e, s, bulk in bulks for r in bulk.readings)
    stored = Counter(center.query("SELECT epoch, seq, name, value FROM readings"))
    assert produced - stored == Counter(), "lost"
    assert stored - produced == Counter(), "doubled"
    predicted = Counter((e, s, p.model, p.version) for e, s, bulk in bulks for p in bulk.predictions)
    assert Counter(center.query("SELECT epoch, seq, model, version FROM predictions")) == predicted
    alerts = {row.record().id for row in rows if row.kind == "alert"}
    assert {name for (name,) in center.query("SELECT id FROM alerts")} == alerts
    assert center.query("SELECT count(*) FROM ahead") == [(0,)]


async def all_rows(store):
    return await store.pending("bulk", 0, 10**6) + await store.pending("alert", 0, 10**6)


async def drain(kit, publisher, deadline_s=90):
    async def drained():
        return not (await publisher.status())["queued_rows"]

    await kit.until(drained, "the end of the queue", deadline_s)


async def connected(kit, publisher, sessions=1):
    async def counted():
        status = await publisher.status()
        return status["connected"] and status["sessions"] >= sessions

    await kit.until(counted, f"session {sessions}")


async def feed(kit, store, first, last):
    for index in range(first, last):
        await store.commit(
            kit.step(
                index,
                predictions=(kit.prediction(index), kit.prediction(index + 100_000)),
                alerts=(kit.alert(index),) if index % 20 == 0 else (),
            )
        )


async def test_the_broker_is_killed_in_mid_stream(kit, nats_broker, hub, tmp_path):
    center = hub(nats_broker.url)
    async with (
        kit.opened(tmp_path / "s.db") as store,
        kit.publishing(store, nats_broker.url, ack_timeout_s=2) as publisher,
    ):
        for turn in range(3):
            await connected(kit, publisher, turn + 1)
            await feed(kit, store, turn * 200, turn * 200 + 100)
            nats_broker.kill()
            await feed(kit, store, turn * 200 + 100, turn * 200 + 200)
            nats_broker.start()
        await drain(kit, publisher)
        assert_same(await all_rows(store), center)
        assert (await publisher.status())["sessions"] >= 4


async def test_the_hub_is_killed_in_mid_stream(kit, way, hub, tmp_path):
    center = hub(way.url, extra=f'protocol = "{way.protocol}"\n')
    async with (
        kit.opened(tmp_path / "s.db") as store,
        kit.publishing(store, way.url, protocol=way.protocol, ack_timeout_s=2) as publisher,
    ):
        chance = random.Random(7)
        for turn in range(5):
            feeding = chance.randrange(20, 150)
            await feed(kit, store, turn * 200, turn * 200 + feeding)
            center.kill()
            await feed(kit, store, turn * 200 + feeding, turn * 200 + 200)
            center.start()
        await drain(kit, publisher)
        assert_same(await all_rows(store), center)
    assert center.stop() == 0


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.long)])
async def test_the_node_is_killed_again_and_again(kit, nats_broker, hub, tmp_path, kills):
    """kill -9 of the publisher's process, which also commits to its store; the last run ends the work."""
    center, path, chance = hub(nats_broker.url), tmp_path / "s.db", random.Random(11)
    command = [sys.executable, str(PROCESS), str(path), nats_broker.url, "3.1.1", "3000"]
    for _ in range(kills):
        before = held(center)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:  # noqa: ASYNC220
            more = chance.randrange(1, 250)
            await kit.until(lambda b=before, m=more: held(center) >= min(b + m, 3000), "rows at the hub")
            process.send_signal(signal.SIGKILL)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: ASYNC220
        assert process.stdout is not None and process.stdout.readline() == b"committed\n"
        await kit.until(lambda: held(center) == 3000, "the last row")
        process.send_signal(signal.SIGKILL)
    async with kit.opened(path) as store:
        rows = await all_rows(store)
        indexes = [row.record().readings[0].value for row in rows if row.kind == "bulk"]
        assert indexes == list(range(1, 3001))
        assert_same(rows, center)


def held(center):
    rows = center.query("SELECT held FROM streams WHERE stream = 'bulk'")
    return rows[0][0] if rows else 0


async def test_a_dead_hub_is_told_at_once(kit, nats_broker, hub, tmp_path):
    """Its will says so, long before the acknowledgement is overdue."""
    center = hub(nats_broker.url)
    async with kit.opened(tmp_path / "s.db") as store, kit.publishing(store, nats_broker.url) as publisher:
        await feed(kit, store, 0, 50)
        await drain(kit, publisher)
        assert (await publisher.status())["hosts_offline"] == []
        center.kill()

        async def told():
            return (await publisher.status())["hosts_offline"] == ["millhand-hub"]

        await kit.until(told, "the hub's will")
        await feed(kit, store, 50, 60)

        async def silent():
            return (await publisher.status())["hub_silent_s"]

        await kit.until(silent, "the silence")
        text = telemetry_text({"enabled": True, **await publisher.status()})
        assert "hub millhand-hub is offline, 10 rows wait" in text
        center.start()
        await drain(kit, publisher)
        assert (await publisher.status())["hosts_offline"] == []


async def test_a_hub_that_lost_its_database(kit, nats_broker, hub, tmp_path):
    """It goes on behind what the node says was acknowledged; what was not acknowledged comes again."""
    center = hub(nats_broker.url)
    async with kit.opened(tmp_path / "s.db") as store, kit.publishing(store, nats_broker.url) as publisher:
        await feed(kit, store, 0, 50)
        await drain(kit, publisher)
        center.kill()
        for path in center.database.parent.glob("hub.db*"):
            path.unlink()
        await feed(kit, store, 50, 80)
        center.start()
        await drain(kit, publisher)
        assert center.query("SELECT first, held FROM streams WHERE stream = 'bulk'") == [(51, 80)]
        assert [seq for (seq,) in center.query("SELECT DISTINCT seq FROM readings")] == list(range(51, 81))


async def test_a_hub_knows_who_is_there(kit, nats_broker, hub, tmp_path, listen):
    """Restarted beside a silent node, the hub asks for its birth; a killed or stopped node is offline."""
    center = hub(nats_broker.url)
    online = "SELECT online FROM nodes"
    async with kit.opened(tmp_path / "s.db") as store:
        async with kit.publishing(store, nats_broker.url) as publisher:
            await feed(kit, store, 0, 3)
            await drain(kit, publisher)
            assert center.query(online) == [(1,)]
            center.kill()
            center.start()
            await kit.until(lambda: center.query(online) == [(1,)], "the birth that was asked for")
        await kit.until(lambda: center.query(online) == [(0,)], "the death")


async def test_strangers_on_the_broker_do_no_harm(kit, mosquitto_broker, hub, listen, tmp_path):
    """Another vendor's node, garbage, retained ghosts and a foreign STATE, while rows arrive."""
    from millhand.telemetry.payloads import Metric, Type, encode

    listener = listen(mosquitto_broker.url)
    stranger = "spBv1.0/plant/{}/robot"
    listener.publish("spBv1.0/plant/NBIRTH/ghost", encode([], time_ms=1, seq=0), retain=True)
    center = hub(mosquitto_broker.url)
    for payload in (b"", b"\xff", os.urandom(300), encode([Metric("x", 1, Type.INT64)], time_ms=1, seq=0)):
        for kind in ("NBIRTH", "NDATA", "NDEATH"):
            listener.publish(stranger.format(kind), payload)
        listener.publish("spBv1.0/plant/DDATA/robot/arm", payload)
        listener.publish("spBv1.0/nonsense", payload)
        listener.publish("spBv1.0/STATE/elsewhere", payload)
    async with kit.opened(tmp_path / "s.db") as store, kit.publishing(store, mosquitto_broker.url) as publisher:
        await feed(kit, store, 0, 30)
        await drain(kit, publisher)
        assert_same(await all_rows(store), center)
    assert center.query("SELECT node FROM nodes") == [("node-1",)]
    asked = [one for one in listener.of("NCMD") if one.topic.node == "robot"]
    assert len(asked) <= 1, "a stranger is not asked again and again"
    assert center.log().count("refused") >= 3


async def test_the_hub_answers_its_own_old_will(kit, nats_broker, hub, tmp_path):
    """A late will of the hub's last connection must not leave `offline` behind for nodes that wait for it."""
    center = hub(nats_broker.url)
    async with kit.opened(tmp_path / "s.db") as store:
        import paho.mqtt.publish

        paho.mqtt.publish.single(
            "spBv1.0/STATE/millhand-hub",
            b'{"online": false, "timestamp": 1}',
            qos=1,
            retain=True,
            port=nats_broker.port,
        )
        async with kit.publishing(store, nats_broker.url, primary_host="millhand-hub") as publisher:
            await feed(kit, store, 0, 3)
            await drain(kit, publisher)
    assert center.stop() == 0


async def test_a_wrong_password_is_told(kit, tmp_path):
    with kit.mosquitto(tmp_path / "m", users={"node": "right"}) as broker:
        async with kit.opened(tmp_path / "s.db") as store:
            async with kit.publishing(store, broker.url, username="node", password="wrong") as publisher:

                async def refused():
                    return (await publisher.status())["error"]

                error = await kit.until(refused, "the refusal")
                assert "refused" in error and broker.url in error
                assert "password" in (await publisher.status())["hint"]
            async with kit.publishing(store, broker.url, username="node", password="right") as publisher:
                await connected(kit, publisher)


async def test_a_broker_that_is_away(kit, nats_broker, tmp_path):
    """The state says so, the next attempt comes later and later, and a broker that comes is used."""
    nats_broker.stop()
    async with (
        kit.opened(tmp_path / "s.db") as store,
        kit.publishing(store, nats_broker.url, backoff_first_s=0.02, backoff_last_s=0.3) as publisher,
    ):

        async def away():
            return "cannot be reached" in (await publisher.status())["error"]

        await kit.until(away, "the word of the broker that is away")
        await store.commit(kit.step(0))
        assert (await publisher.status())["queued_rows"] == 1
        nats_broker.start()

        await connected(kit, publisher)
        # 0.02 + 0.04 + ... + 0.3 s: few attempts, each with a bdSeq of its own
        assert await store.next_bdseq() < 40


async def test_no_thread_and_no_socket_is_left_behind(kit, nats_broker, tmp_path):
    """Twenty connections, ended by the broker's death, by refusal and by ourselves."""
    async with kit.opened(tmp_path / "s.db") as store:
        await store.commit(kit.step(0))
        async with kit.publishing(store, nats_broker.url):
            pass
        threads, files = names(), open_files()
        async with kit.publishing(store, nats_broker.url) as publisher:
            for turn in range(10):
                await connected(kit, publisher, turn + 1)
                nats_broker.kill()
                nats_broker.start()
        for _ in range(10):
            async with kit.publishing(store, nats_broker.url) as publisher:
                await connected(kit, publisher)
        assert names() - threads == Counter()
        assert open_files() <= files + 3  # one session's may still be held by the error that `status` tells


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def names():
    """Threads by name; the executor's threads are kept for the next call and are no leak."""
    return Counter(thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_"))


async def test_a_broker_that_hangs_does_not_hold_the_node(kit, mosquitto_broker, tmp_path):
    """A stopped process keeps its sockets open: the node still ends, within its deadlines."""
    async with kit.opened(tmp_path / "s.db") as store:
        async with kit.publishing(store, mosquitto_broker.url) as publisher:
            await connected(kit, publisher)
            mosquitto_broker.process.send_signal(signal.SIGSTOP)
            await feed(kit, store, 0, 40)
            begin_s = time.monotonic()
            await publisher.stop()
            assert time.monotonic() - begin_s < 8
        mosquitto_broker.process.send_signal(signal.SIGCONT)


async def test_a_port_that_never_answers(kit, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"mqtt://127.0.0.1:{deaf.getsockname()[1]}"
        async with (
            kit.opened(tmp_path / "s.db") as store,
            kit.publishing(store, url, connect_timeout_s=0.3) as publisher,
        ):

            async def told():
                return "did not answer" in (await publisher.status())["error"]

            await kit.until(told, "the word of the silent port")


async def test_a_full_disk_at_the_hub_acknowledges_nothing(kit, nats_broker, hub, tmp_path):
    """The hub's files may not grow (RLIMIT_FSIZE, like a full disk): rows stay at the node until there is room."""
    import resource

    center = hub(nats_broker.url)
    async with (
        kit.opened(tmp_path / "s.db") as store,
        kit.publishing(store, nats_broker.url, ack_timeout_s=1) as publisher,
    ):
        await feed(kit, store, 0, 20)
        await drain(kit, publisher)
        limit = center.database.stat().st_size + 20_000
        resource.prlimit(center.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        await feed(kit, store, 20, 600)
        await kit.until(lambda: "could not commit" in center.log(), "the hub's complaint")
        status = await publisher.status()
        assert status["queued_rows"] > 0
        assert status["acked"]["bulk"] <= held(center)
        assert center.process.poll() is None
        resource.prlimit(center.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await drain(kit, publisher, 60)
        assert_same(await all_rows(store), center)


@pytest.mark.slow
async def test_throughput(kit, nats_broker, hub, tmp_path, record_property, capsys):
    """A backlog of rows with ten readings each, node to acknowledged, through nats-server."""
    center = hub(nats_broker.url)
    extra = tuple(kit.reading(f"m{number}", 1.5 * number) for number in range(7))
    async with kit.opened(tmp_path / "s.db") as store:
        for first in range(0, 3000, 100):
            await asyncio.gather(*(store.commit(kit.step(first + more, extra=extra)) for more in range(100)))
        begin_s = time.monotonic()
        async with kit.publishing(store, nats_broker.url) as publisher:
            await drain(kit, publisher, 90)
            rate = 3000 / (time.monotonic() - begin_s)
        assert_same(await all_rows(store), center)
    with capsys.disabled():
        print(f"\n{rate:.0f} rows/s, {rate * 10:.0f} readings/s through nats-server to the hub")
    assert rate > 200
