"""Metrics as they are defined, and foreign input that is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millhand.errors import TelemetryError
from millhand.telemetry.definitions import Definitions, Point, reading_metric
from millhand.telemetry.hosts import Hosts, read_state, state
from millhand.telemetry.payloads import WIDENING, Metric, decode, encode
from millhand.telemetry.session import Arrival

VALUES = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=12)


@given(st.lists(VALUES, min_size=1))
def test_a_metric_widens_so_that_no_value_is_lost(values):
    """Each value can be told with the type that the metric has when it is told; the type never narrows again."""
    definitions, kinds = Definitions(), []
    for number, value in enumerate(values):
        definitions.take("pump", Point("m", value, "1", number))
        told = definitions.data("pump", Point("m", value, "1", number), historical=False)
        came = decode(encode([Metric("m", told.value, told.type, 1)], time_ms=1, seq=1)).metrics[0].value
        if value is None:
            assert came is None
            continue
        kinds.append(WIDENING.index(told.type))
        if isinstance(came, str):
            assert came == str(value)
        else:
            assert float(came) == pytest.approx(float(value), rel=1e-15, nan_ok=True)
    assert kinds == sorted(kinds)


def test_aliases_are_unique_and_stay():
    """tck-id-payloads-alias-uniqueness; a new unit takes a new birth too."""
    definitions, devices = Definitions(), ("", "pump", "fan")
    for device in devices:
        for name in ("a", "b"):
            assert definitions.take(device, Point(name, 1, "1", 1))
            assert not definitions.take(device, Point(name, 2, "1", 2))
            assert definitions.take(device, Point(name, 2, "mm", 3))
    aliases = [metric.alias for device in devices for metric in definitions.birth(device, 1)]
    assert len(set(aliases)) == len(aliases)
    assert aliases == [metric.alias for device in devices for metric in definitions.birth(device, 2)]


@pytest.mark.parametrize(
    "name", ["Alert", "Identity/bulk", "Prediction/x", "bdSeq", "Reading/a", "Node Control/Reboot"]
)
def test_readings_never_take_our_own_names(name):
    assert reading_metric(name) == f"Reading/{name}"
    assert reading_metric(f"my {name}") == f"my {name}"


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"1", b"{}", b'{"online": 1, "timestamp": 2}', b'{"online": true}', b"\xff", b"[" * 100_000]
)
def test_foreign_states_are_refused(payload):
    with pytest.raises(TelemetryError):
        read_state(payload)


def test_a_stale_state_is_ignored():
    """tck-id-operational-behavior-edge-node-termination-host-offline-timestamp: older than the last, nothing."""
    hosts = Hosts()
    assert hosts.is_online("a") is None
    for online, time_ms, expected in ((True, 5, True), (False, 4, True), (False, 5, False), (True, 9, True)):
        hosts.hear(Arrival("spBv1.0/STATE/a", state(online, time_ms)))
        assert hosts.is_online("a") is expected
