"""What the hub makes of a node's messages, and when it asks for a birth."""

from __future__ import annotations

import json

import pytest

from millhand.errors import TelemetryError
from millhand.telemetry.payloads import Message, Metric, Type
from millhand_hub.edge import EdgeNode, NeedsBirth


def death(bdseq):
    return Message(1, None, (Metric("bdSeq", bdseq, Type.INT64),))


def test_a_late_death_is_ignored(kit):
    """A broker may deliver NDEATH (QoS 1) after the next NBIRTH (QoS 0): its bdSeq is not the living birth's."""
    pair = kit.Pair()
    pair.birth()
    assert pair.ear.death(death(2)) is None
    assert pair.say(kit.bulk(1, 1.0))
    assert pair.ear.death(death(3)) is not None
    with pytest.raises(NeedsBirth):
        pair.say(kit.bulk(2, 1.0))
    assert pair.birth() and pair.say(kit.bulk(2, 1.0))


def test_a_message_that_is_missing_is_noticed(kit):
    """tck-id-payloads-sequence-num-incrementing, seen from the host; and 255 -> 0 is no hole."""
    pair = kit.Pair()
    pair.birth()
    assert len(pair.say(*(kit.bulk(seq, 1.0) for seq in range(1, 600)))) == 599
    pair.voice.say(pair.wire, kit.bulk(600, 1.0), historical=False)
    pair.wire.sent.clear()
    for _ in range(2):
        with pytest.raises(NeedsBirth, match="was due"):
            pair.say(kit.bulk(601, 1.0))
    assert pair.birth() and len(pair.say(kit.bulk(600, 1.0))) == 1


def test_a_node_without_birth_is_asked_for_one(kit):
    with pytest.raises(NeedsBirth):
        kit.Pair().say(kit.bulk(1, 1.0))


def test_a_foreign_node_is_left_alone():
    node = EdgeNode("plant", "robot")
    assert node.birth(Message(1, 0, (Metric("bdSeq", 1, Type.INT64),))) is None and node.is_foreign


def mixed(pair, name, value, kind=Type.STRING):
    """A data message whose metric `name` says `value`."""
    birth = Message(1, 0, (
        Metric("bdSeq", 0, Type.INT64), Metric("Identity/epoch", "e", Type.STRING),
        Metric("Identity/bulk", 0, Type.INT64, alias=1), Metric("Identity/alert", 0, Type.INT64, alias=2),
        Metric(name, None, kind, alias=3),
    ))  # fmt: skip
    pair.ear.birth(birth)
    return pair.ear.data("", Message(1, 1, (Metric(value=1, alias=2), Metric(value=value, alias=3))))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Alert", "no json"),
        ("Alert", None),
        ("Alert", "[1]"),
        ("Alert", '{"id": "\\ud800"}'),
        ("Alert", json.dumps({"id": "a", "raised_ns": 2**70})),
        ("Order", json.dumps({"id": "a", "priority": "high"})),
        ("Gap", "{}"),
        ("Gap", json.dumps({"stream": "other", "first": 1, "last": 2, "reason": ""})),
        ("Gap", json.dumps({"stream": "bulk", "first": 9, "last": 2, "reason": ""})),
        ("Prediction/rul/rul", 3.0),
    ],
)
def test_what_is_no_record_is_refused(kit, name, value):
    with pytest.raises(TelemetryError):
        mixed(kit.Pair(), name, value)


def test_a_newer_node_may_say_more(kit):
    found = mixed(kit.Pair(), "Alert", '{"id": "a", "severity": "doom", "colour": "red"}')
    assert found.alert is not None and found.alert.columns == ("", "", "doom", "", 0, 0)


def test_numbers_that_the_file_cannot_hold_become_doubles(kit):
    assert mixed(kit.Pair(), "count", 2**64 - 1, Type.UINT64).readings[0].value == float(2**64 - 1)


@pytest.mark.parametrize("seq", [0, -1, None, "7", 2**63])
def test_a_row_without_a_number_is_refused(kit, seq):
    pair = kit.Pair()
    mixed(pair, "m", "x")
    with pytest.raises(TelemetryError):
        pair.ear.data("", Message(1, 2, (Metric(value=seq, alias=1),)))


def test_a_reading_named_like_ours_comes_back_under_its_name(kit):
    import msgspec

    from millhand.records import Clock, Reading
    from millhand.store.rows import Bulk, Row

    names = ("Alert", "Identity/bulk", "Prediction/x/version", "Reading/a", "plain")
    clock = Clock(kit.START_NS, kit.START_NS, 0)
    body = msgspec.msgpack.encode(Bulk(tuple(Reading(name, 1.0, "1", clock) for name in names)))
    pair = kit.Pair()
    pair.birth()
    (delivery,) = pair.say(Row("bulk", 1, "pump", "bulk", kit.START_NS, body, kit.EPOCH))
    assert tuple(row.name for row in delivery.readings) == names and not delivery.predictions
