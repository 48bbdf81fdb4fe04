"""What the hub makes of a node's messages, and which rows it counts as held: without a broker, byte for byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millhand.errors import TelemetryError
from millhand.telemetry.payloads import Metric, Type, decode, encode
from millhand_hub.edge import Birth, Death, EdgeNode, NeedsBirth
from millhand_hub.held import Held


def message(metrics, seq):
    return decode(encode(metrics, time_ms=1000, seq=seq))


def birth(bdseq=0, *extra, epoch="e"):
    named = [
        Metric("bdSeq", bdseq, Type.INT64, 1),
        Metric("Identity/epoch", epoch, Type.STRING, 1),
        Metric("Hub/ack/bulk", 4, Type.UINT64, 1),
    ]
    return message([*named, *extra], 0)


ALIASES = {"Identity/bulk": 1, "Identity/alert": 2, "speed": 3, "Alert": 4, "Gap": 5, "Prediction/m/version": 6}
ALIASES |= {"Prediction/m/rul": 7, "Reading/Alert": 8, "Identity/epoch": 9}


def born():
    node = EdgeNode("g", "n")
    node.birth(birth())
    node.device_birth("d", message([Metric(n, None, Type.DOUBLE, 1, a, "Hz") for n, a in ALIASES.items()], 1))
    return node


def row(seq, **values):
    names = {"row": "Identity/bulk", "speed": "speed", "gap": "Gap", "alert": "Alert"}
    kinds = {int: Type.INT64, float: Type.DOUBLE, str: Type.STRING}
    return message([Metric("", v, kinds[type(v)], 1, ALIASES[names[k]]) for k, v in values.items()], seq)


def test_a_row_is_read_by_its_aliases():
    """tck-id-payloads-alias-data-cmd-requirement, as a host sees it."""
    delivery = born().data("d", row(2, row=9, speed=1.5))
    assert (delivery.epoch, delivery.stream, delivery.seq) == ("e", "bulk", 9)
    (reading,) = delivery.readings
    assert (reading.asset, reading.name, reading.value, reading.unit) == ("d", "speed", 1.5, "Hz")


def test_predictions_of_one_millisecond_stay_apart():
    metrics = [Metric("", 1, Type.INT64, 1, 1)]
    for rul in (1.0, 2.0):
        metrics += [Metric("", 3, Type.INT64, 5, 6), Metric("", rul, Type.DOUBLE, 5, 7)]
    found = born().data("d", message(metrics, 2)).predictions
    assert [(p.model, p.version, p.time_ms, p.values) for p in found] == [
        ("m", 3, 5, {"rul": 1.0}),
        ("m", 3, 5, {"rul": 2.0}),
    ]


def test_a_reading_may_be_called_alert():
    metrics = [Metric("", 1, Type.INT64, 1, 1), Metric("", "x", Type.STRING, 1, 8)]
    delivery = born().data("d", message(metrics, 2))
    assert delivery.alert is None and delivery.readings[0].name == "Alert"


def test_a_missed_message_asks_for_a_birth_and_nothing_else_helps():
    """tck-id-operational-behavior-host-reordering-rebirth: also when the seq fits again 256 messages later."""
    node = born()
    with pytest.raises(NeedsBirth, match="seq 3 came where 2 was due"):
        node.data("d", row(3, row=1))
    with pytest.raises(NeedsBirth):
        node.data("d", row(2, row=2))
    node.birth(birth())
    node.device_birth("d", message([Metric("Identity/bulk", None, Type.INT64, 1, 1)], 1))
    assert node.data("d", row(2, row=2)).seq == 2


def test_a_row_of_another_epoch_is_not_taken_for_ours():
    """A lost NBIRTH may leave a seq that fits by chance; the row itself says which file it is of."""
    node = born()
    mine, other = (Metric("", epoch, Type.STRING, 1, 9) for epoch in ("e", "f"))
    assert node.data("d", message([Metric("", 1, Type.INT64, 1, 1), mine], 2)).seq == 1
    with pytest.raises(NeedsBirth, match="another epoch"):
        node.data("d", message([Metric("", 2, Type.INT64, 1, 1), other], 3))
    with pytest.raises(NeedsBirth):
        node.data("d", message([Metric("", 2, Type.INT64, 1, 1), mine], 4))


def test_nothing_is_believed_before_a_birth():
    node = EdgeNode("g", "n")
    with pytest.raises(NeedsBirth):
        node.data("d", row(2, row=1))
    assert node.death(message([Metric("bdSeq", 0, Type.INT64, 1)], None)) is None


def test_an_old_death_is_ignored():
    """tck-id-payloads-ndeath-will-message, bdSeq: the will of the last connection may come after the next birth."""
    node = born()
    node.birth(birth(bdseq=1))
    assert node.death(message([Metric("bdSeq", 0, Type.INT64, 1)], None)) is None
    assert node.death(message([Metric("bdSeq", 1, Type.INT64, 1)], None)) == Death("g", "n")


def test_a_birth_tells_what_was_acknowledged():
    assert EdgeNode("g", "n").birth(birth()) == Birth("g", "n", "e", "", 1000, {"bulk": 4})


def test_a_foreign_node_is_no_business_of_ours():
    node = EdgeNode("g", "n")
    assert node.birth(message([Metric("bdSeq", 0, Type.INT64, 1)], 0)) is None and node.is_foreign


@pytest.mark.parametrize(
    "values",
    [
        {"speed": 1.0},
        {"row": 0},
        {"row": 1, "gap": "[]"},
        {"row": 1, "gap": json.dumps({"stream": "bulk", "first": 5, "last": 4})},
        {"row": 1, "alert": '{"raised_ns": 1e400}'},
        {"row": 1, "alert": '{"id": "\\ud800"}'},
    ],
)
def test_a_row_that_cannot_be_read_is_refused(values):
    with pytest.raises(TelemetryError):
        born().data("d", row(2, **values))


spans = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 8)), max_size=40)


@given(spans)
def test_held_is_the_set_of_its_numbers(found):
    """Against a plain set: `upto` is the longest run from 1, `has` is containment."""
    held, truth = Held(), set()
    for first, more in found:
        numbers = set(range(first, first + more + 1))
        assert held.has(first, first + more) == (numbers <= truth)
        held.add(first, first + more)
        truth |= numbers
        run = next(number for number in range(1, 100) if number not in truth) - 1
        assert held.upto == run
        ahead = {number for start, end in held.ahead.items() for number in range(start, end + 1)}
        assert ahead == {number for number in truth if number > run}
