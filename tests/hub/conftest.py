"""A real hub database, and events to put into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millhand.records import Alert, AlertState, Clock, Prediction, Reading, Severity, WorkOrder
from millhand.store.rows import Bulk, Gap, Row
from millhand.telemetry.payloads import Message, decode
from millhand.telemetry.topics import parse
from millhand.telemetry.voice import Voice
from millhand_hub.database import Database
from millhand_hub.edge import EdgeNode, Event

START_NS = 1_700_000_000_000_000_000
EPOCH = "epoch-1"


class Wire:
    """Stands for the session: keeps what a node publishes."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        self.sent.append((topic, decode(payload)))


class Pair:
    """A node's real voice, and the hub's ear for it, without a broker between them."""

    def __init__(self, group: str = "plant", node: str = "node-1") -> None:
        self.voice = Voice(group, node)
        self.voice.begin(3)
        self.wire: Any = Wire()
        self.ear = EdgeNode(group, node)

    def birth(self, epoch: str = EPOCH, **acked: int) -> list[Event]:
        self.voice.give_birth(self.wire, epoch, {"alert": 0, "bulk": 0, **acked}, [])
        return self.hear()

    def say(self, *rows: Row) -> list[Event]:
        for row in rows:
            self.voice.say(self.wire, row, historical=False)
        return self.hear()

    def hear(self) -> list[Event]:
        """What the hub makes of everything that was published since."""
        events: list[Event | None] = []
        sent, self.wire.sent = self.wire.sent, []
        for text, message in sent:
            topic = parse(text)
            if topic.kind == "NBIRTH":
                events.append(self.ear.birth(message))
            elif topic.kind == "DBIRTH":
                self.ear.device_birth(topic.device, message)
            elif topic.kind in ("NDATA", "DDATA"):
                events.append(self.ear.data(topic.device, message))
        return [event for event in events if event is not None]


def clock(index: int) -> Clock:
    return Clock(source_ns=START_NS + index, receive_ns=START_NS + index, monotonic_ns=index)


def bulk(seq: int, *values: Any, predictions: tuple[Prediction, ...] = (), epoch: str = EPOCH) -> Row:
    readings = tuple(Reading(f"m{number}", value, "mm/s", clock(seq)) for number, value in enumerate(values))
    body = msgspec.msgpack.encode(Bulk(readings, predictions))
    return Row("bulk", seq, "pump", "bulk", START_NS, body, epoch)


def alert(seq: int, number: int = 1, **changes: Any) -> Row:
    values = {"state": AlertState.OPEN, "changed_ns": START_NS + seq, **changes}
    record = Alert(f"alert-{number}", "pump", "m", "r", "k", Severity.CRITICAL, "worn out", START_NS + number, **values)
    return Row("alert", seq, "pump", "alert", START_NS, msgspec.msgpack.encode(record), EPOCH)


def order(seq: int, number: int = 1, **changes: object) -> Row:
    record = WorkOrder(
        f"order-{number}", "alert-1", "pump", "it hums", "bearing", ("replace it",), 2, START_NS + number
    )
    record = msgspec.structs.replace(record, **changes)
    return Row("alert", seq, "pump", "order", START_NS, msgspec.msgpack.encode(record), EPOCH)


def gap(stream: str, first: int, last: int) -> Row:
    body = msgspec.msgpack.encode(Gap(stream, first, last, "byte cap"))
    return Row(stream, last, "", "gap", START_NS, body, EPOCH)


def prediction(index: int, model: str = "rul", kind: str = "") -> Prediction:
    end_ns = START_NS + index
    return Prediction("pump", model, 4, end_ns - 5, end_ns, {"rul/h": float(index)}, kind)


class Kit:
    START_NS, EPOCH = START_NS, EPOCH
    Pair = Pair
    bulk, alert, order, gap = staticmethod(bulk), staticmethod(alert), staticmethod(order), staticmethod(gap)
    prediction = staticmethod(prediction)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    found = Database(tmp_path / "hub.db")
    yield found
    found.close()
