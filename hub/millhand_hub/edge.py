"""What the hub knows of one edge node between two births (its aliases, its seq), and what its messages say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from millhand.errors import TelemetryError
from millhand.store.rows import STREAMS
from millhand.telemetry.definitions import (
    ALERT,
    BDSEQ,
    EPOCH,
    GAP,
    MORE,
    NODE,
    ORDER,
    PREDICTION,
    READING,
    VERSION,
    acknowledgement,
    identity,
)
from millhand.telemetry.payloads import Message, Metric, Value

IDENTITIES = {identity(stream): stream for stream in STREAMS}
# The largest integer that SQLite holds.
LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Birth:
    """A node is there. `base`: what it says a hub acknowledged already, by stream."""

    group: str
    node: str
    epoch: str
    version: str
    born_ms: int
    base: dict[str, int]


@dataclass(frozen=True, slots=True)
class Death:
    """A node is gone."""

    group: str
    node: str


@dataclass(frozen=True, slots=True)
class ReadingRow:
    asset: str
    name: str
    time_ms: int
    value: Value
    unit: str
    quality: int
    historical: bool


@dataclass(slots=True)
class PredictionRow:
    asset: str
    model: str
    time_ms: int
    version: int | None = None
    kind: str = ""
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """An alert or a work order: the columns that the hub sorts by, and the whole as JSON text."""

    id: str
    columns: tuple[str | int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class GapRow:
    stream: str
    first: int
    last: int
    reason: str


@dataclass(slots=True)
class Delivery:
    """One outbox row as it arrived: its identity, and what it holds."""

    group: str
    node: str
    epoch: str
    stream: str
    seq: int
    readings: list[ReadingRow] = field(default_factory=list)
    predictions: list[PredictionRow] = field(default_factory=list)
    alert: Record | None = None
    order: Record | None = None
    gap: GapRow | None = None
    unread: bytes | None = None
    """The whole payload, where the hub could not read it: a newer node may say what this hub does not know."""


Event = Birth | Death | Delivery


class NeedsBirth(TelemetryError):
    """Data came that the last birth does not explain: the node is asked for a new one."""


class Unreadable(TelemetryError):
    """A row of ours with an identity, but not with a content that this hub can read."""

    def __init__(self, message: str, row: Delivery) -> None:
        super().__init__(message, retriable=False)
        self.row = row


@dataclass(frozen=True, slots=True)
class _Name:
    device: str
    name: str
    unit: str


class EdgeNode:
    """One node. Raises NeedsBirth wherever the hub may have missed something."""

    def __init__(self, group: str, node: str) -> None:
        self.group = group
        self.node = node
        self.is_foreign = False
        """Another vendor's node on the same broker: no business of ours."""
        self._online = False
        self._in_step = False
        """Nothing was missed since the birth."""
        self._epoch = ""
        self._bdseq: int | None = None
        self._seq = -1
        self._aliases: dict[int, _Name] = {}
        self._unfinished: Delivery | None = None
        """A row that comes in several messages, and is not whole yet."""

    def birth(self, message: Message) -> Birth | None:
        """NBIRTH: forget the last one. None for a foreign node."""
        epoch, bdseq = message.named(EPOCH), message.named(BDSEQ)
        self.is_foreign = not isinstance(epoch, str) or not isinstance(bdseq, int)
        if not isinstance(epoch, str) or not isinstance(bdseq, int):
            return None
        self._online = self._in_step = True
        self._epoch, self._bdseq = epoch, bdseq
        self._seq = message.seq or 0
        self._aliases, self._unfinished = {}, None
        self._learn(NODE, message)
        named = {stream: message.named(acknowledgement(stream)) for stream in STREAMS}
        base: dict[str, int] = {s: value for s, value in named.items() if isinstance(value, int) and value <= LARGEST}
        return Birth(self.group, self.node, epoch, str(message.named(VERSION) or ""), message.time_ms, base)

    def device_birth(self, device: str, message: Message) -> None:
        self._follow(message)
        self._learn(device, message)

    def device_death(self, message: Message) -> None:
        self._follow(message)

    def death(self, message: Message) -> Death | None:
        """NDEATH; None where its bdSeq is not the living birth's: a broker may deliver it after the next NBIRTH."""
        if not self._online or message.named(BDSEQ) != self._bdseq:
            return None
        self._online = False
        return Death(self.group, self.node)

    def data(self, device: str, message: Message) -> Delivery | None:
        """NDATA or DDATA: one outbox row; None while more of its messages follow.

        Raises TelemetryError where it holds no row of ours, Unreadable where it holds one that cannot be read.
        """
        self._follow(message)
        named = [(self._resolve(metric), metric) for metric in message.metrics]
        marks = [(IDENTITIES[name.name], metric.value) for name, metric in named if name.name in IDENTITIES]
        if len(marks) != 1:
            raise TelemetryError(f"data of {self.group}/{self.node}/{device} carries no identity", retriable=False)
        epochs = {metric.value for name, metric in named if name.name == EPOCH}
        if not epochs <= {self._epoch}:
            self._in_step = False
            raise NeedsBirth("a row of another epoch came: a birth was missed")
        stream, seq = marks[0]
        if not isinstance(seq, int) or not 0 < seq <= LARGEST:
            raise TelemetryError(f"data of {self.group}/{self.node}/{device}: its seq is {seq}", retriable=False)
        delivery = self._unfinished or Delivery(self.group, self.node, self._epoch, stream, seq)
        if (delivery.stream, delivery.seq) != (stream, seq):
            self._in_step = False
            raise NeedsBirth(f"row {seq} of '{stream}' came within row {delivery.seq} of '{delivery.stream}'")
        follows = any(name.name == MORE and metric.value for name, metric in named)
        self._unfinished = delivery if follows else None
        try:
            for name, metric in named:
                _sort_in(delivery, name, metric)
        except TelemetryError as error:
            self._unfinished = None
            row = Delivery(self.group, self.node, self._epoch, stream, seq)
            raise Unreadable(error.message, row) from error
        return None if follows else delivery

    def _follow(self, message: Message) -> None:
        """seq rises by one over all messages of the node (tck-id-payloads-sequence-num-incrementing)."""
        if not self._online:
            raise NeedsBirth("it speaks without a birth")
        expected = (self._seq + 1) % 256
        if not self._in_step or message.seq != expected:
            # Until the next birth: 256 messages on, the seq would fit again, whatever was missed.
            self._in_step = False
            raise NeedsBirth(f"seq {message.seq} came where {expected} was due")
        self._seq = expected

    def _learn(self, device: str, message: Message) -> None:
        for metric in message.metrics:
            if metric.alias is not None:
                self._aliases[metric.alias] = _Name(device, metric.name, metric.unit)

    def _resolve(self, metric: Metric) -> _Name:
        name = self._aliases.get(metric.alias) if metric.alias is not None else None
        if name is None:
            self._in_step = False
            raise NeedsBirth(f"alias {metric.alias} was not in a birth")
        return name


def _sort_in(delivery: Delivery, name: _Name, metric: Metric) -> None:
    if name.name in IDENTITIES or name.name in (EPOCH, MORE):
        return
    if name.name.startswith(PREDICTION):
        _add_prediction(delivery, name, metric)
    elif name.name == ALERT:
        delivery.alert = _record(metric.value, ("asset", "kind", "severity", "state"), ("raised_ns", "changed_ns"))
    elif name.name == ORDER:
        delivery.order = _record(metric.value, ("asset",), ("priority", "created_ns", "revision"))
    elif name.name == GAP:
        delivery.gap = _gap(metric.value)
    else:
        reading, value = name.name.removeprefix(READING), metric.value
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            value = float(value)
        row = ReadingRow(name.device, reading, metric.time_ms, value, name.unit, int(metric.quality), metric.historical)
        delivery.readings.append(row)


def _add_prediction(delivery: Delivery, name: _Name, metric: Metric) -> None:
    """The version is each prediction's first metric; a model's name holds no slash."""
    model, _, key = name.name.removeprefix(PREDICTION).partition("/")
    if key == "version" and isinstance(metric.value, int):
        delivery.predictions.append(PredictionRow(name.device, model, metric.time_ms, metric.value))
        return
    row = next((found for found in reversed(delivery.predictions) if found.model == model), None)
    if row is None:
        raise TelemetryError(f"a prediction of '{model}' without its version", retriable=False)
    if key == "kind":
        row.kind = str(metric.value)
    elif isinstance(metric.value, float | int):
        row.values[key] = float(metric.value)


def _record(value: Value, words: tuple[str, ...], numbers: tuple[str, ...]) -> Record:
    """Read a record as far as the hub must: a newer node may say more. Raises TelemetryError for what is none."""
    found = _object(value)
    columns: tuple[str | int, ...] = (
        *(str(found.get(key, "")) for key in words),
        *(_integer(found.get(key, 0)) for key in numbers),
    )
    return Record(str(found.get("id", "")), columns, str(value))


def _gap(value: Value) -> GapRow:
    found = _object(value)
    gap = GapRow(
        str(found.get("stream")),
        _integer(found.get("first")),
        _integer(found.get("last")),
        str(found.get("reason", "")),
    )
    if gap.stream not in STREAMS or not 0 < gap.first <= gap.last:
        raise TelemetryError(f"{value!r:.200} is no gap", retriable=False)
    return gap


def _object(value: Value) -> dict[str, Any]:
    try:
        found = json.loads(str(value))
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate could not be stored
    except (ValueError, RecursionError) as error:
        raise TelemetryError(f"{value!r:.200} is no record", retriable=False) from error
    if not isinstance(found, dict):
        raise TelemetryError(f"{value!r:.200} is no record", retriable=False)
    return found


def _integer(value: Any) -> int:
    if not isinstance(value, int) or not -LARGEST <= value <= LARGEST:
        raise TelemetryError(f"{value!r:.200} is no whole number of 64 bits", retriable=False)
    return value
