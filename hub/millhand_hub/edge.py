"""What the hub knows of one living edge node: its birth, its aliases, its seq; and what a data message says."""

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
    ORDER,
    VERSION,
    acknowledgement,
    identity,
)
from millhand.telemetry.payloads import Message, Metric, Value

IDENTITIES = {identity(stream): stream for stream in STREAMS}
PREDICTION = "Prediction/"


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


@dataclass(slots=True)
class Delivery:
    """One outbox row as it arrived: its identity, and what it holds."""

    epoch: str
    stream: str
    seq: int
    readings: list[ReadingRow] = field(default_factory=list)
    predictions: list[PredictionRow] = field(default_factory=list)
    alert: dict[str, Any] | None = None
    order: dict[str, Any] | None = None
    gap: dict[str, Any] | None = None


class NeedsBirth(TelemetryError):
    """Data came that the last birth does not explain: the node is asked for a new one."""


@dataclass(slots=True)
class _Name:
    device: str
    name: str
    unit: str


class EdgeNode:
    """One node between two births. Raises NeedsBirth wherever the hub may have missed something."""

    def __init__(self, group: str, node: str) -> None:
        self.group = group
        self.node = node
        self.online = False
        self.epoch = ""
        self.version = ""
        self.bdseq: int | None = None
        self.born_ms = 0
        self.base: dict[str, int] = {}
        """What the node says an earlier hub acknowledged, by stream."""
        self._seq = -1
        self._aliases: dict[int, _Name] = {}

    def birth(self, message: Message) -> None:
        """NBIRTH: forget the last one. Raises TelemetryError where a metric that must be there is missing."""
        epoch, bdseq = message.named(EPOCH), message.named(BDSEQ)
        if not isinstance(epoch, str) or not isinstance(bdseq, int):
            raise TelemetryError(f"NBIRTH of {self.group}/{self.node} is not millhand's: no {EPOCH} or {BDSEQ}")
        self.online, self.epoch, self.bdseq, self.born_ms = True, epoch, bdseq, message.time_ms
        self.version = str(message.named(VERSION) or "")
        named = {stream: message.named(acknowledgement(stream)) for stream in STREAMS}
        self.base = {stream: value for stream, value in named.items() if isinstance(value, int)}
        self._seq = message.seq if message.seq is not None else 0
        self._aliases = {}
        self._learn("", message)

    def device_birth(self, device: str, message: Message) -> None:
        self._follow(message)
        self._learn(device, message)

    def device_death(self, message: Message) -> None:
        self._follow(message)

    def death(self, message: Message) -> bool:
        """NDEATH; one whose bdSeq is not the living birth's comes late and is ignored. Returns whether it counts."""
        if message.named(BDSEQ) != self.bdseq:
            return False
        self.online = False
        return True

    def data(self, device: str, message: Message) -> Delivery:
        """NDATA or DDATA: one outbox row."""
        self._follow(message)
        named = [(self._resolve(metric), metric) for metric in message.metrics]
        marks = [(IDENTITIES[name.name], metric) for name, metric in named if name.name in IDENTITIES]
        if len(marks) != 1 or not isinstance(marks[0][1].value, int):
            raise TelemetryError(f"data of {self.group}/{self.node}/{device} carries no identity", retriable=False)
        delivery = Delivery(self.epoch, marks[0][0], marks[0][1].value)
        predictions: dict[tuple[str, int], PredictionRow] = {}
        for name, metric in named:
            _sort_in(delivery, predictions, name, metric)
        delivery.predictions = list(predictions.values())
        return delivery

    def _follow(self, message: Message) -> None:
        """seq rises by one over all messages of the node (tck-id-payloads-sequence-num-incrementing)."""
        if not self.online:
            raise NeedsBirth(f"{self.group}/{self.node} speaks without a birth")
        expected = (self._seq + 1) % 256
        if message.seq != expected:
            raise NeedsBirth(f"{self.group}/{self.node}: seq {message.seq} came where {expected} was due")
        self._seq = expected

    def _learn(self, device: str, message: Message) -> None:
        for metric in message.metrics:
            if metric.alias is not None:
                self._aliases[metric.alias] = _Name(device, metric.name, metric.unit)

    def _resolve(self, metric: Metric) -> _Name:
        name = self._aliases.get(metric.alias) if metric.alias is not None else None
        if name is None:
            raise NeedsBirth(f"{self.group}/{self.node}: alias {metric.alias} was not in a birth")
        return name


def _sort_in(
    delivery: Delivery, predictions: dict[tuple[str, int], PredictionRow], name: _Name, metric: Metric
) -> None:
    if name.name in IDENTITIES:
        return
    if name.name.startswith(PREDICTION):
        model, _, key = name.name.removeprefix(PREDICTION).rpartition("/")
        row = predictions.setdefault((model, metric.time_ms), PredictionRow(name.device, model, metric.time_ms))
        if key == "version" and isinstance(metric.value, int):
            row.version = metric.value
        elif key == "kind":
            row.kind = str(metric.value)
        elif isinstance(metric.value, float | int):
            row.values[key] = float(metric.value)
    elif name.name == ALERT and delivery.stream == "alert":
        delivery.alert = json.loads(str(metric.value))
    elif name.name == ORDER and delivery.stream == "alert":
        delivery.order = json.loads(str(metric.value))
    elif name.name == GAP and not name.device:
        delivery.gap = json.loads(str(metric.value))
    else:
        delivery.readings.append(
            ReadingRow(
                name.device, name.name, metric.time_ms, metric.value, name.unit, int(metric.quality), metric.historical
            )
        )
