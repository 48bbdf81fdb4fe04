"""Payloads: what is encoded is decoded, what is no Sparkplug is refused, and the schema is the compiled one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millhand.errors import TelemetryError
from millhand.records import Quality
from millhand.telemetry import topics
from millhand.telemetry.payloads import LATEST_MS, Metric, Type, decode, encode, type_of, widest
from millhand.telemetry.wire import Payload

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts


@given(value=values, time_ms=st.integers(0, LATEST_MS), historical=st.booleans(), quality=st.sampled_from(Quality))
def test_a_birth_comes_back_whole(value, time_ms, historical, quality):
    """tck-id-payloads-alias-birth-requirement, -metric-datatype-req, -propertyset-quality-value-type."""
    sent = Metric("speed", value, type_of(value), time_ms, 7, "rad/s", quality, historical)
    message = decode(encode([sent], time_ms=time_ms, seq=255))
    assert list(message.metrics) == [sent] and (message.time_ms, message.seq) == (time_ms, 255)
    found = message.metrics[0].value
    assert type(found) is type(value)


@given(value=values)
def test_data_carries_neither_name_nor_datatype(value):
    """tck-id-payloads-alias-data-cmd-requirement, -metric-datatype-not-req."""
    payload = Payload()
    payload.ParseFromString(encode([Metric("", value, type_of(value), 5, 7, "mm/s")], time_ms=1, seq=0))
    (metric,) = payload.metrics
    assert (metric.alias, metric.timestamp, metric.is_null) == (7, 5, value is None)
    assert not metric.name and not metric.datatype and not list(metric.properties.keys)


def test_metrics_are_in_chronological_order():
    """tck-id-operational-behavior-data-publish-nbirth-order, -dbirth-order."""
    metrics = [Metric("", float(n), Type.DOUBLE, time_ms, n) for n, time_ms in enumerate((30, 10, 20, 10))]
    message = decode(encode(metrics, time_ms=40, seq=1))
    assert [(metric.time_ms, metric.alias) for metric in message.metrics] == [(10, 1), (10, 3), (20, 2), (30, 0)]


@pytest.mark.parametrize(
    ("kind", "bits", "wire", "value"),
    [
        (Type.INT8, "int_value", 0xFF, -1),
        (Type.INT8, "int_value", 0xFFFFFFFF, -1),
        (Type.INT16, "int_value", 0x8000, -32768),
        (Type.INT32, "int_value", 0x80000000, -(2**31)),
        (Type.INT64, "long_value", 2**64 - 5, -5),
        (Type.UINT32, "int_value", 0xFFFFFFFF, 2**32 - 1),
        (Type.UINT64, "long_value", 2**64 - 1, 2**64 - 1),
    ],
)
def test_integers_are_twos_complement(kind, bits, wire, value):
    """Sparkplug 3.0.0, 6.4.16: signed integers lie in unsigned fields; 8 and 16 bits come extended or not."""
    payload = Payload()
    payload.timestamp = 1
    metric = payload.metrics.add()
    metric.name, metric.datatype = "x", kind
    setattr(metric, bits, wire)
    assert decode(payload.SerializeToString()).metrics[0].value == value


def test_datatypes_only_widen():
    assert widest(Type.INT64, Type.BOOLEAN, False) is Type.INT64
    assert widest(Type.INT64, Type.DOUBLE, False) is Type.DOUBLE
    assert widest(Type.DOUBLE, Type.STRING, False) is Type.STRING
    assert widest(Type.DOUBLE, Type.STRING, True) is Type.STRING, "a null binds nothing"
    assert widest(Type.DOUBLE, Type.BOOLEAN, True) is Type.BOOLEAN


@given(data=st.binary(max_size=200))
def test_foreign_bytes_are_refused_or_read(data):
    check(data)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6))
def test_damaged_payloads_are_refused_or_read(damage):
    """A flipped byte may leave a valid payload; it must never raise anything but TelemetryError."""
    data = bytearray(encode([Metric("a", "b", Type.STRING, 5, 7, "°C", Quality.BAD, True)] * 3, time_ms=1, seq=0))
    for place, byte in damage:
        data[place % len(data)] = byte
    check(bytes(data))


def check(data):
    try:
        message = decode(data)
    except TelemetryError as error:
        assert error.message and not error.retriable
    else:
        assert all(metric.name or metric.alias is not None for metric in message.metrics)


@pytest.mark.parametrize("data", [b"", b"\x18\x01", b"\xff" * 9, b"\x08\x01\x30\x05", b"\x08\x01\x18\x80\x02"])
def test_what_is_no_sparkplug(data):
    """Nothing, a bare seq, no protobuf, an unknown field, a seq of 256."""
    with pytest.raises(TelemetryError, match="no Sparkplug B payload"):
        decode(data)


@pytest.mark.data
@pytest.mark.skipif("MILLHAND_DATA" not in os.environ, reason="MILLHAND_DATA names no folder of data sets")
@pytest.mark.parametrize("name", ["not_sparkplug_26bytes.bin", "not_sparkplug_36bytes.bin"])
def test_recorded_foreign_messages_are_refused(name):
    with pytest.raises(TelemetryError, match="no Sparkplug B payload"):
        decode((Path(os.environ["MILLHAND_DATA"]) / "protocols" / "sparkplug" / name).read_bytes())


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
def test_the_descriptor_is_the_compiled_schema(tmp_path):
    """The committed descriptor is what the command in wire.py makes of sparkplug.proto."""
    folder = files("millhand.telemetry")
    target = tmp_path / "made.binpb"
    command = [sys.executable, "-W", "ignore", "-m", "grpc_tools.protoc", "-I", str(folder)]
    subprocess.run([*command, f"--descriptor_set_out={target}", "sparkplug.proto"], check=True)
    assert target.read_bytes() == (folder / "sparkplug.binpb").read_bytes()


@pytest.mark.parametrize("text", ["spBv1.0/g/DDATA/n/d", "spBv1.0/g/NBIRTH/n"])
def test_topics_come_back(text):
    assert str(topics.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["spBv1.0/g/NDATA/n/d", "spBv1.0/g/DDATA/n", "spAv1.0/g/NDATA/n", "spBv1.0//NDATA/n", "x", ""]
)
def test_other_topics_are_refused(text):
    with pytest.raises(TelemetryError, match="no Sparkplug B topic"):
        topics.parse(text)
