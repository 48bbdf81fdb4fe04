"""Sparkplug B 3.0, rule by rule (tck-id in each docstring), as a host on nats-server and mosquitto sees it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from millhand.telemetry.payloads import Metric, Type
from millhand.telemetry.wire import Payload

PROCESS = Path(__file__).with_name("publisher_process.py")


def check_order(heard):
    """What holds over everything that a node sends in one session.

    tck-id-payloads-sequence-num-incrementing, -topics-nbirth-seq-num, -payloads-dbirth-order,
    -payloads-alias-uniqueness, -payloads-alias-birth-requirement, -payloads-alias-data-cmd-requirement,
    -payloads-metric-datatype-req, -not-req, -payloads-name-birth-data-requirement, -topics-ndata-mqtt, -ddata-mqtt
    """
    seq, node_aliases, aliases = None, {}, {}
    for one in heard:
        kind, message = one.topic.kind, one.message
        if kind == "NDEATH":
            assert message.seq is None
            continue
        assert one.qos == 0 and not one.retained and message.time_ms > 0
        if kind == "NBIRTH":
            assert message.seq == 0
            node_aliases, aliases = {}, {}
        else:
            assert message.seq == (seq + 1) % 256
        seq = message.seq
        device = one.topic.device
        if kind in ("NBIRTH", "DBIRTH"):
            for metric in message.metrics:
                assert metric.name and metric.type and metric.time_ms > 0
                if metric.alias is not None:
                    assert node_aliases.setdefault(metric.alias, (device, metric.name)) == (device, metric.name)
                    aliases[device, metric.alias] = metric.name
        elif kind in ("NDATA", "DDATA"):
            for metric in message.metrics:
                assert not metric.name and not metric.type and (device, metric.alias) in aliases
        else:
            assert kind == "DDEATH" and not message.metrics
            aliases = {key: name for key, name in aliases.items() if key[0] != device}


def named(heard):
    return {metric.name: metric for metric in heard.message.metrics}


async def test_births_and_data(kit, way, listen, tmp_path):
    """Order and content of everything from CONNECT to a clean stop.

    tck-id-principles-birth-certificates-order, -topics-nbirth-metric-reqs, -topics-nbirth-bdseq-increment,
    -operational-behavior-data-publish-nbirth-values, -operational-behavior-data-commands-rebirth-name-aliases,
    -rebirth-datatype, -rebirth-value, -operational-behavior-edge-node-intentional-disconnect-ndeath,
    -payloads-ndeath-will-message-publisher-disconnect-mqtt311, -mqtt50
    """
    listener = listen(way.url)
    async with kit.opened(tmp_path / "s.db") as store:
        for index in range(3):
            await store.commit(kit.step(index))
        await store.commit(kit.step(3, asset="fan", alerts=(kit.alert(1, "fan"),)))
        async with kit.publishing(store, way.url, protocol=way.protocol):
            await kit.until(lambda: len(listener.of("DDATA")) >= 5, "the first rows")
            for index in range(4, 304):
                await store.commit(kit.step(index, predictions=(kit.prediction(index),)))
            await kit.until(lambda: len(listener.of("DDATA")) >= 305, "all rows")
        await kit.until(lambda: listener.of("NDEATH"), "NDEATH")
    heard = listener.from_node()
    assert [one.topic.kind for one in heard[:3]] == ["NBIRTH", "DBIRTH", "DBIRTH"]
    birth = named(heard[0])
    assert birth["bdSeq"].value == 0 and birth["bdSeq"].type == Type.INT64
    rebirth = birth["Node Control/Rebirth"]
    assert (rebirth.value, rebirth.type, rebirth.alias) == (False, Type.BOOLEAN, None)
    assert named(heard[1])["vibration"].value == 2.0, "a birth tells the newest value"
    assert named(heard[1])["Alert"].value is None, "and a null where there is none yet"
    check_order(heard)
    deaths = listener.of("NDEATH")
    assert len(deaths) == 1 and heard[-1] is deaths[0]
    rows = [one for one in heard if one.topic.kind == "DDATA"]
    assert [any(m.historical for m in one.message.metrics) for one in rows] == [True] * 5 + [False] * 300
    assert rows[0].topic.device == "fan" and len(rows[0].message.metrics) == 3, "the alert goes first"


async def test_the_will(kit, way, listen, tmp_path):
    """NDEATH of a node that was killed.

    tck-id-payloads-ndeath-will-message, -qos, -retain, -topics-ndeath-payload, -topics-ndeath-seq,
    -topics-nbirth-bdseq-matching, -bdseq-increment
    """
    listener = listen(way.url)
    for number in range(2):
        command = [sys.executable, str(PROCESS), str(tmp_path / "s.db"), way.url, way.protocol, "0"]
        with subprocess.Popen(command) as process:  # noqa: ASYNC220 - starting it takes no time
            await kit.until(lambda n=number: len(listener.of("NBIRTH")) == n + 1, "NBIRTH")
            process.send_signal(signal.SIGKILL)
        await kit.until(lambda n=number: len(listener.of("NDEATH")) == n + 1, "NDEATH")
    for number, (birth, death) in enumerate(zip(listener.of("NBIRTH"), listener.of("NDEATH"), strict=True)):
        assert [(m.name, m.value, m.type) for m in death.message.metrics] == [("bdSeq", number, Type.INT64)]
        assert birth.message.named("bdSeq") == number
        assert death.message.seq is None and death.qos == 1 and not death.retained


async def test_rebirth(kit, way, listen, tmp_path):
    """tck-id-operational-behavior-data-commands-rebirth-action-1, -2, -3: full births with the same bdSeq."""
    listener = listen(way.url)
    async with kit.opened(tmp_path / "s.db") as store:
        await store.commit(kit.step(0))
        async with kit.publishing(store, way.url, protocol=way.protocol):
            await kit.until(lambda: listener.of("DDATA"), "data")
            listener.command(Metric("Node Control/Rebirth", True, Type.BOOLEAN))
            await kit.until(lambda: len(listener.of("DBIRTH")) == 2, "the second birth")
    first, second = listener.of("NBIRTH")
    assert first.message.named("bdSeq") == second.message.named("bdSeq") == 0
    assert set(named(first)) == set(named(second))
    check_order(listener.from_node())


async def test_a_new_or_wider_metric_is_born(kit, way, listen, tmp_path):
    """tck-id-payloads-name-birth-data-requirement: nothing is in data that a birth did not describe."""
    listener = listen(way.url)
    values = [True, 3, 2**53 + 1, 0.5, 2**63, "stuck", 7]
    async with kit.opened(tmp_path / "s.db") as store:
        async with kit.publishing(store, way.url, protocol=way.protocol):
            await kit.until(lambda: listener.of("NBIRTH"), "NBIRTH")
            for index, value in enumerate(values):
                await store.commit(kit.step(index, extra=(kit.reading("mode", value, index),)))
            await kit.until(lambda: len(listener.of("DDATA")) == len(values), "all rows")
        await kit.until(lambda: listener.of("NDEATH"), "NDEATH")
    check_order(listener.from_node())
    types = [named(one)["mode"].type for one in listener.of("DBIRTH")]
    assert types == [Type.BOOLEAN, Type.INT64, Type.DOUBLE, Type.STRING]
    alias = named(listener.of("DBIRTH")[0])["mode"].alias
    sent = [metric.value for one in listener.of("DDATA") for metric in one.message.metrics if metric.alias == alias]
    assert sent[:1] + sent[3:] == [True, 0.5, 2.0**63, "stuck", "7"]
    raw = Payload()
    raw.ParseFromString(listener.of("DDATA")[2].payload)
    assert [m.long_value for m in raw.metrics if m.alias == alias] == [2**53 + 1]


async def test_device_death(kit, mosquitto_broker, listen, tmp_path):
    """tck-id-operational-behavior-device-ddeath, -payloads-ddeath-seq-inc, -topics-ddeath-mqtt (its own timestamp).

    On mosquitto, since nats-server mends a DDEATH that lacks its timestamp.
    """
    listener = listen(mosquitto_broker.url)
    async with kit.opened(tmp_path / "s.db") as store:
        await store.commit(kit.step(0))
        async with kit.publishing(store, mosquitto_broker.url) as publisher:
            await kit.until(lambda: listener.of("DDATA"), "data")
            publisher.set_asset_alive("pump", False)
            await kit.until(lambda: listener.of("DDEATH"), "DDEATH")
            await store.commit(kit.step(1))  # a row from its lifetime comes late
            await kit.until(lambda: len(listener.of("DDEATH")) == 2, "DDEATH after the late row")
            listener.command(Metric("Node Control/Rebirth", True, Type.BOOLEAN))
            await kit.until(lambda: len(listener.of("DDEATH")) == 3, "DDEATH after the rows that were sent again")
            births = len(listener.of("DBIRTH"))
            publisher.set_asset_alive("pump", True)
            await store.commit(kit.step(2))
            await kit.until(lambda: len(listener.of("DBIRTH")) == births + 1, "the next birth")
        await kit.until(lambda: listener.of("NDEATH"), "NDEATH")
    heard = listener.from_node()
    check_order(heard)
    assert [one.topic.kind for one in heard[:7]] == [
        "NBIRTH",
        "DBIRTH",
        "DDATA",
        "DDEATH",
        "DBIRTH",
        "DDATA",
        "DDEATH",
    ]
    assert all(one.message.time_ms > 0 and one.message.seq is not None for one in listener.of("DDEATH"))


async def test_nothing_is_retained(kit, mosquitto_broker, listen, tmp_path):
    """tck-id-topics-nbirth-mqtt, -topics-dbirth-mqtt, -topics-ddata-mqtt: a late subscriber finds nothing.

    On mosquitto, since nats-server keeps no retained births under spBv1.0/ by itself.
    """
    listener = listen(mosquitto_broker.url)
    async with kit.opened(tmp_path / "s.db") as store:
        await store.commit(kit.step(0))
        async with kit.publishing(store, mosquitto_broker.url):
            await kit.until(lambda: listener.of("DDATA"), "data")
            late = listen(mosquitto_broker.url)
            late.publish("spBv1.0/probe/NCMD/probe", b"\x08\x01")  # comes after every retained message
            await kit.until(lambda: late.heard, "the probe")
            assert [str(one.topic) for one in late.heard] == ["spBv1.0/probe/NCMD/probe"]


async def test_waits_for_the_primary_host(kit, way, listen, tmp_path):
    """tck-id-message-flow-edge-node-birth-publish-phid-wait, -id, -online, -timestamp, -offline;
    -operational-behavior-edge-node-termination-host-offline, -timestamp.
    """
    listener = listen(way.url)
    async with kit.opened(tmp_path / "s.db") as store:
        async with kit.publishing(store, way.url, protocol=way.protocol, primary_host=kit.HOST) as publisher:
            listener.say_state(True, 50, host="another")
            listener.publish("spBv1.0/STATE/scada", b'{"online": "true", "timestamp": 90}', retain=True)
            listener.publish("spBv1.0/STATE/scada", b"\xff\x00", retain=True)
            listener.say_state(False, 100)

            async def waits():
                return "offline" in (await publisher.status())["error"]

            await kit.until(waits, "the word of the host that is away")
            assert not listener.of("NBIRTH")
            listener.say_state(True, 100)
            await kit.until(lambda: listener.of("NBIRTH"), "NBIRTH")
            listener.say_state(False, 99)  # stale
            await store.commit(kit.step(0))
            await kit.until(lambda: listener.of("DDATA"), "data in spite of the stale STATE")
            assert not listener.of("NDEATH")
            listener.say_state(False, 101)
            await kit.until(lambda: listener.of("NDEATH"), "NDEATH")
            await kit.until(waits, "the word of the host that is away")
            listener.say_state(True, 102)
            await kit.until(lambda: len(listener.of("NBIRTH")) == 2, "the second NBIRTH")
        first, second = listener.of("NBIRTH")
        assert second.message.named("bdSeq") > first.message.named("bdSeq")


async def test_walks_to_where_the_host_is(kit, tmp_path, listen):
    """tck-id-operational-behavior-primary-application-state-with-multiple-servers-walk, -single-server;
    -operational-behavior-edge-node-termination-host-offline-reconnect.
    """
    with kit.mosquitto(tmp_path / "a") as one, kit.mosquitto(tmp_path / "b") as two:
        first, second = listen(one.url), listen(two.url)
        first.say_state(False, 100)
        second.say_state(True, 100)
        async with (
            kit.opened(tmp_path / "s.db") as store,
            kit.publishing(store, one.url, two.url, primary_host=kit.HOST),
        ):
            await kit.until(lambda: second.of("NBIRTH"), "NBIRTH on the second broker")
            assert not first.of("NBIRTH")
            first.say_state(True, 200)
            second.say_state(False, 200)
            await kit.until(lambda: first.of("NBIRTH"), "NBIRTH on the first broker")
            assert len(second.of("NDEATH")) == 1


@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
async def test_a_broker_keeps_nothing_of_the_session(kit, mosquitto_broker, listen, tmp_path, protocol):
    """tck-id-principles-persistence-clean-session-311, -50: commands sent while it was away never reach the node."""
    listener = listen(mosquitto_broker.url)
    async with kit.opened(tmp_path / "s.db") as store:
        async with kit.publishing(store, mosquitto_broker.url, protocol=protocol):
            await kit.until(lambda: listener.of("NBIRTH"), "NBIRTH")
        await kit.until(lambda: listener.of("NDEATH"), "NDEATH")
        listener.command(Metric("Node Control/Rebirth", True, Type.BOOLEAN))
        async with kit.publishing(store, mosquitto_broker.url, protocol=protocol):
            await store.commit(kit.step(0))
            await kit.until(lambda: listener.of("DDATA"), "data")
            listener.acknowledge(store.epoch, bulk=1)

            async def acked():
                return await store.acked("bulk") == 1

            await kit.until(acked, "the acknowledgement")  # an old command would have been heard before
        await kit.until(lambda: len(listener.of("NDEATH")) == 2, "NDEATH")
    assert len(listener.of("NBIRTH")) == 2
