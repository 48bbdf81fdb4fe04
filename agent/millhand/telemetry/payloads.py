"""Sparkplug B payloads: metrics to protobuf and back.

Source: Eclipse Sparkplug 3.0.0 (ISO/IEC 20237), chapter 6. Births carry name, alias and datatype; data carries the
alias alone. Times are Unix milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from millhand.errors import TelemetryError
from millhand.records import Quality
from millhand.telemetry.wire import Payload

Value = float | int | bool | str | None

NAME_LENGTH_CAP = 1024
LATEST_MS = 253_402_300_799_000  # the year 9999


class Type(IntEnum):
    """Datatypes of the specification that we send or understand (chapter 6.4.16)."""

    INT8 = 1
    INT16 = 2
    INT32 = 3
    INT64 = 4
    UINT8 = 5
    UINT16 = 6
    UINT32 = 7
    UINT64 = 8
    FLOAT = 9
    DOUBLE = 10
    BOOLEAN = 11
    STRING = 12
    DATETIME = 13
    TEXT = 14
    UUID = 15


WIDENING = (Type.BOOLEAN, Type.INT64, Type.DOUBLE, Type.STRING)
"""The datatypes that our values have, each able to carry those before it."""

HIGHEST_TYPE = 34
FIRST_FOREIGN_FIELD = 17
"""From here on a metric's fields are data sets, templates and extensions, which we skip."""

SIGNED_BITS = {Type.INT8: 8, Type.INT16: 16, Type.INT32: 32, Type.INT64: 64}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `name` is empty in data messages, `type` 0 there; `alias` is None where there is none."""

    name: str = ""
    value: Value = None
    type: int = 0
    time_ms: int = 0
    alias: int | None = None
    unit: str = ""
    quality: Quality = Quality.GOOD
    historical: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """A decoded payload. `seq` is None in NDEATH and NCMD."""

    time_ms: int = 0
    seq: int | None = None
    metrics: Sequence[Metric] = field(default_factory=tuple)

    def named(self, name: str) -> Value:
        """The value of the metric `name`, None where there is none."""
        return next((metric.value for metric in self.metrics if metric.name == name), None)


def type_of(value: Value) -> Type:
    """The datatype that a value is born with. Whole numbers beyond 64 bits become doubles; None is a double."""
    if isinstance(value, bool):
        return Type.BOOLEAN
    if isinstance(value, str):
        return Type.STRING
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return Type.INT64
    return Type.DOUBLE


def encode(metrics: Iterable[Metric], *, time_ms: int | None, seq: int | None) -> bytes:
    """Encode a message, its metrics in chronological order; `seq` and `time_ms` None leave the field out.

    Source of the order: tck-id-operational-behavior-data-publish-nbirth-order and -dbirth-order.
    """
    payload = Payload()
    if time_ms is not None:
        payload.timestamp = max(time_ms, 0)
    if seq is not None:
        payload.seq = seq
    for metric in sorted(metrics, key=lambda metric: metric.time_ms):
        _add(payload, metric)
    return payload.SerializeToString()


def _add(payload: Payload, metric: Metric) -> None:
    entry = payload.metrics.add()
    if metric.name:
        entry.name = metric.name
        entry.datatype = metric.type
    if metric.alias is not None:
        entry.alias = metric.alias
    entry.timestamp = max(metric.time_ms, 0)
    if metric.historical:
        entry.is_historical = True
    if metric.unit and metric.name:
        entry.properties.keys.append("engUnit")
        entry.properties.values.add(type=Type.STRING, string_value=metric.unit)
    if metric.quality is not Quality.GOOD:
        entry.properties.keys.append("Quality")
        entry.properties.values.add(type=Type.INT32, int_value=int(metric.quality))
    _set_value(entry, metric)


def _set_value(entry: Payload.Metric, metric: Metric) -> None:
    value = metric.value
    if value is None:
        entry.is_null = True
    elif metric.type in SIGNED_BITS:
        _set_integer(entry, int(value), metric.type)
    elif metric.type in (Type.UINT8, Type.UINT16, Type.UINT32):
        entry.int_value = int(value)
    elif metric.type in (Type.UINT64, Type.DATETIME):
        entry.long_value = int(value)
    elif metric.type == Type.BOOLEAN:
        entry.boolean_value = bool(value)
    elif metric.type in (Type.STRING, Type.TEXT, Type.UUID):
        entry.string_value = str(value)
    elif metric.type == Type.FLOAT:
        entry.float_value = float(value)
    else:
        entry.double_value = float(value)


def _set_integer(entry: Payload.Metric, value: int, kind: int) -> None:
    """Signed integers travel as two's complement: 8 to 32 bits in int_value, 64 in long_value."""
    if kind == Type.INT64:
        entry.long_value = value & (2**64 - 1)
    else:
        entry.int_value = value & (2**32 - 1)


def decode(data: bytes) -> Message:
    """Decode a payload. Raises TelemetryError for bytes that are no Sparkplug payload, however well they parse.

    Protobuf accepts many foreign bytes; so a payload must carry what the specification demands: a plausible timestamp
    or metrics, each with a name or an alias, a plausible time and a known datatype, and nothing else.
    """
    payload = Payload()
    try:
        payload.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise _refusal("it is no protobuf") from error
    if not payload.HasField("timestamp") and not payload.metrics:
        raise _refusal("no timestamp, no metrics")
    if len(UnknownFieldSet(payload)):
        raise _refusal("fields that the specification does not know")
    if payload.HasField("timestamp") and payload.timestamp > LATEST_MS:
        raise _refusal(f"timestamp {payload.timestamp} is no time")
    if payload.HasField("seq") and payload.seq > 255:
        raise _refusal(f"seq {payload.seq} is above 255")
    metrics = tuple(_metric(entry) for entry in payload.metrics)
    return Message(payload.timestamp, payload.seq if payload.HasField("seq") else None, metrics)


def _refusal(why: str) -> TelemetryError:
    return TelemetryError(f"the payload is no Sparkplug B payload: {why}", retriable=False)


def _metric(entry: Payload.Metric) -> Metric:
    if not entry.name and not entry.HasField("alias"):
        raise _refusal("a metric without name and alias")
    if len(entry.name) > NAME_LENGTH_CAP or entry.timestamp > LATEST_MS or entry.datatype > HIGHEST_TYPE:
        raise _refusal("a metric out of bounds")
    unknown = UnknownFieldSet(entry)
    if any(unknown[index].field_number < FIRST_FOREIGN_FIELD for index in range(len(unknown))):
        raise _refusal("a metric with a field of the wrong type")
    unit, quality = "", Quality.GOOD
    for key, item in zip(entry.properties.keys, entry.properties.values, strict=False):
        if key == "engUnit":
            unit = item.string_value
        elif key == "Quality":
            quality = Quality(item.int_value) if item.int_value in Quality.__members__.values() else Quality.BAD
    return Metric(
        name=entry.name,
        value=_value(entry),
        type=entry.datatype,
        time_ms=entry.timestamp,
        alias=entry.alias if entry.HasField("alias") else None,
        unit=unit,
        quality=quality,
        historical=entry.is_historical,
    )


def _value(entry: Payload.Metric) -> Value:
    which = entry.WhichOneof("value")
    if which is None or entry.is_null:
        return None
    value = getattr(entry, which)
    if isinstance(value, bytes):
        return value.hex()
    bits = SIGNED_BITS.get(Type(entry.datatype)) if entry.datatype in Type.__members__.values() else None
    return to_signed(value, bits) if bits and isinstance(value, int) else value


def to_signed(value: int, bits: int) -> int:
    """Undo two's complement. 8- to 32-bit integers may come sign-extended to 32 bits, or not."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def widest(known: Type, new: Type, undecided: bool) -> Type:
    """The datatype that carries values of both. `undecided`: no value came yet, so the new one decides alone."""
    if undecided:
        return new
    return max(known, new, key=WIDENING.index)


def as_type(value: Value, kind: Type) -> Value:
    """`value` as a metric of datatype `kind` carries it; `kind` is as wide as the value's own, or wider."""
    return str(value) if kind is Type.STRING and value is not None else value
