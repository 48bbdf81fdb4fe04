"""What the node has been born with: each metric's alias, datatype and unit; and how a row becomes metrics.

Aliases are unique over the node and its devices (tck-id-payloads-alias-uniqueness) and stay for the process's life. A
metric's datatype only widens (Boolean, whole number, double, text), so that every value can be told: that takes a new
birth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from millhand.records import Alert, Quality, WorkOrder
from millhand.store.catalog import time_ns
from millhand.store.rows import STREAMS, Bulk, Gap, MetricSpec, Row
from millhand.telemetry.payloads import Metric, Type, Value, as_type, type_of, widest

NODE = ""
"""The device name that stands for the node itself."""

REBIRTH = "Node Control/Rebirth"
BDSEQ = "bdSeq"
EPOCH = "Identity/epoch"
MORE = "Identity/more"
"""How many messages of the same row still follow."""
ACK_EPOCH = "Hub/epoch"
VERSION = "Properties/millhand version"
ALERT, ORDER, GAP = "Alert", "Order", "Gap"
PREDICTION, READING = "Prediction/", "Reading/"

OWN_NAMES = frozenset({BDSEQ, ALERT, ORDER, GAP})
OWN_PREFIXES = (PREDICTION, READING, "Identity/", "Hub/", "Properties/", "Node Control/", "Device Control/")


def identity(stream: str) -> str:
    """The metric that carries a row's seq on `stream`."""
    return f"Identity/{stream}"


def acknowledgement(stream: str) -> str:
    """The metric by which the hub acknowledges `stream`."""
    return f"Hub/ack/{stream}"


def reading_metric(name: str) -> str:
    """The metric of a reading: its name, after `Reading/` where millhand itself uses that name."""
    return READING + name if name in OWN_NAMES or name.startswith(OWN_PREFIXES) else name


@dataclass(frozen=True, slots=True)
class Point:
    """One value on its way: what a metric will say."""

    name: str
    value: Value
    unit: str
    time_ms: int
    quality: Quality = Quality.GOOD


@dataclass(slots=True)
class Definition:
    """What a birth says of a metric; `value` and `time_ms` are the newest."""

    alias: int
    type: Type
    unit: str
    value: Value = None
    time_ms: int = 0


class Definitions:
    """All metrics of the node, by device and name."""

    def __init__(self) -> None:
        self._devices: dict[str, dict[str, Definition]] = {}
        self._aliases = 0

    def devices(self) -> list[str]:
        return [name for name in self._devices if name != NODE]

    def learn(self, spec: MetricSpec) -> None:
        """Take in what the store knows of a metric."""
        self.take(spec.asset, Point(reading_metric(spec.name), spec.value, spec.unit, spec.time_ns // 1_000_000))

    def take(self, device: str, point: Point) -> bool:
        """Remember the newest value; return whether the device must be born anew for it."""
        metrics = self._device(device)
        known = metrics.get(point.name)
        if known is None:
            metrics[point.name] = self._define(type_of(point.value), point)
            return True
        kind = known.type if point.value is None else widest(known.type, type_of(point.value), known.value is None)
        changed = (kind, point.unit) != (known.type, known.unit)
        known.type, known.unit = kind, point.unit
        if point.time_ms >= known.time_ms and point.value is not None:
            known.value, known.time_ms = point.value, point.time_ms
        return changed

    def _device(self, device: str) -> dict[str, Definition]:
        """The metrics of a device. A new one is born with those that every device may need, so it is born once."""
        if device not in self._devices:
            metrics = self._devices[device] = {}
            for stream in STREAMS:
                metrics[identity(stream)] = self._define(Type.INT64, Point(identity(stream), None, "1", 0))
            metrics[EPOCH] = self._define(Type.STRING, Point(EPOCH, None, "", 0))
            metrics[MORE] = self._define(Type.INT64, Point(MORE, None, "1", 0))
            for name in (GAP,) if device == NODE else (ALERT, ORDER):
                metrics[name] = self._define(Type.STRING, Point(name, None, "", 0))
        return self._devices[device]

    def _define(self, kind: Type, point: Point) -> Definition:
        self._aliases += 1
        return Definition(self._aliases, kind, point.unit, point.value, point.time_ms)

    def data(self, device: str, point: Point, historical: bool) -> Metric:
        """The metric of a data message: alias and value alone."""
        known = self._devices[device][point.name]
        return Metric(
            value=as_type(point.value, known.type),
            type=known.type,
            time_ms=point.time_ms,
            alias=known.alias,
            quality=point.quality,
            historical=historical,
        )

    def birth(self, device: str, now_ms: int) -> list[Metric]:
        """Every metric of the device with name, alias, datatype, unit and newest value."""
        return [
            Metric(name, as_type(d.value, d.type), d.type, d.time_ms or now_ms, d.alias, d.unit)
            for name, d in self._device(device).items()
        ]


def readable(row: Row) -> Row:
    """The row, or a gap in its place where its body is damaged: one bad row must not hold up its stream."""
    try:
        row.record()
    except (msgspec.MsgspecError, KeyError):
        gap = Gap(row.stream, row.seq, row.seq, "unreadable")
        return msgspec.structs.replace(row, asset="", kind="gap", body=msgspec.msgpack.encode(gap))
    return row


def points_of(row: Row) -> Iterator[Point]:
    """What a row says, the identity first."""
    created_ms = row.created_ns // 1_000_000
    yield Point(identity(row.stream), row.seq, "1", created_ms)
    yield Point(EPOCH, row.epoch, "", created_ms)
    record = row.record()
    if isinstance(record, Bulk):
        yield from _bulk(record)
    elif isinstance(record, Alert):
        yield Point(ALERT, _json(record), "", (record.changed_ns or record.raised_ns) // 1_000_000)
    elif isinstance(record, WorkOrder):
        yield Point(ORDER, _json(record), "", (record.revised_ns or record.created_ns) // 1_000_000)
    else:
        yield Point(GAP, _json(record), "", created_ms)


def device_of(row: Row) -> str:
    """Gaps are the node's own; everything else belongs to its asset."""
    return NODE if row.kind == "gap" else row.asset


def _bulk(record: Bulk) -> Iterator[Point]:
    for reading in record.readings:
        name, time_ms = reading_metric(reading.name), time_ns(reading.clock) // 1_000_000
        yield Point(name, reading.value, reading.unit, time_ms, reading.quality)
    for prediction in record.predictions:
        base, time_ms = f"{PREDICTION}{prediction.model}/", prediction.window_end_ns // 1_000_000
        yield Point(base + "version", prediction.version, "1", time_ms)
        if prediction.kind:
            yield Point(base + "kind", prediction.kind, "", time_ms)
        for name, value in prediction.values.items():
            yield Point(base + name, float(value), "1", time_ms)


def _json(record: Alert | WorkOrder | Gap) -> str:
    return msgspec.json.encode(record).decode()
