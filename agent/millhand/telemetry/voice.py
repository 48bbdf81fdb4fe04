"""What the edge node says: births, deaths and data, each with its topic and seq."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from paho.mqtt.client import MQTTMessageInfo

from millhand import __version__
from millhand.store.rows import STREAMS, MetricSpec, Row, Stream
from millhand.telemetry.definitions import (
    ACK_EPOCH,
    BDSEQ,
    EPOCH,
    MORE,
    NODE,
    REBIRTH,
    VERSION,
    Definitions,
    Point,
    acknowledgement,
    device_of,
    identity,
    points_of,
    readable,
)
from millhand.telemetry.payloads import Metric, Type, encode
from millhand.telemetry.session import Session, Will
from millhand.telemetry.topics import Topic

MESSAGE_BYTES_CAP = 512 * 1024
"""A row that would make a larger message travels in several: brokers refuse large ones (nats-server above 1 MiB)."""


class Voice:
    """One node's side of Sparkplug. Keeps seq, bdSeq, and which devices are born in the living session."""

    def __init__(self, group: str, node: str) -> None:
        self._group = group
        self._node = node
        self._definitions = Definitions()
        self._born: set[str] = set()
        self._dead: set[str] = set()
        self._lingering: set[str] = set()
        """Dead devices that are born all the same, for rows from their lifetime."""
        self._seq = 0
        self._bdseq = 0

    def topic(self, kind: str, device: str = NODE) -> str:
        return str(Topic(self._group, kind, self._node, device))

    # ---- the node ---------------------------------------------------------------------------------------------------

    def begin(self, bdseq: int) -> Will:
        """A new connection with its own bdSeq; the will is its NDEATH (tck-id-payloads-ndeath-will-message)."""
        self._bdseq = bdseq
        self._born, self._lingering = set(), set()
        return Will(self.topic("NDEATH"), self._death())

    def give_birth(
        self, session: Session, epoch: str, acked: Mapping[Stream, int], specs: Iterable[MetricSpec]
    ) -> None:
        """NBIRTH with seq 0, then a DBIRTH for each living device; a rebirth keeps the session's bdSeq.

        Source: tck-id-payloads-dbirth-order, -operational-behavior-data-commands-rebirth-action-1 to -3.
        """
        for spec in specs:
            self._definitions.learn(spec)
        now_ms = _now_ms()
        for stream in STREAMS:
            self._definitions.take(NODE, Point(identity(stream), acked[stream], "1", now_ms))
        for device in (NODE, *self._definitions.devices()):
            self._definitions.take(device, Point(EPOCH, epoch, "", now_ms))
        metrics = [
            self._bdseq_metric(),
            Metric(REBIRTH, False, Type.BOOLEAN, now_ms),
            Metric(ACK_EPOCH, epoch, Type.STRING, now_ms),
            *(Metric(acknowledgement(stream), acked[stream], Type.UINT64, now_ms) for stream in STREAMS),
            Metric(VERSION, __version__, Type.STRING, now_ms),
            *self._definitions.birth(NODE, now_ms),
        ]
        self._seq = 0
        session.publish(self.topic("NBIRTH"), encode(metrics, time_ms=now_ms, seq=0))
        self._born, self._lingering = set(), set()
        for device in self._definitions.devices():
            if device not in self._dead:
                self._give_device_birth(session, device)

    def say_death(self, session: Session) -> MQTTMessageInfo:
        """NDEATH by ourselves (tck-id-operational-behavior-edge-node-intentional-disconnect-ndeath)."""
        return session.publish(self.topic("NDEATH"), self._death(), qos=1)

    def _death(self) -> bytes:
        return encode([self._bdseq_metric()], time_ms=_now_ms(), seq=None)

    def _bdseq_metric(self) -> Metric:
        return Metric(BDSEQ, self._bdseq, Type.INT64, _now_ms())

    # ---- devices ----------------------------------------------------------------------------------------------------

    def set_alive(self, device: str, alive: bool) -> None:
        """A device began to speak or fell silent."""
        if alive:
            self._dead.discard(device)
        else:
            self._dead.add(device)

    def report_deaths(self, session: Session, *, drained: bool) -> None:
        """DDEATH for each device that fell silent; `drained`: no rows from its lifetime wait any more."""
        gone = self._born & self._dead
        for device in sorted(gone if drained else gone - self._lingering):
            session.publish(self.topic("DDEATH", device), encode([], time_ms=_now_ms(), seq=self._next_seq()))
            self._born.discard(device)
            self._lingering.discard(device)

    def say(self, session: Session, row: Row, *, historical: bool) -> MQTTMessageInfo:
        """One row: NDATA or DDATA, after a DBIRTH where the device is not born or a metric is new or wider."""
        row = readable(row)
        device, points = device_of(row), list(points_of(row))
        changed = [self._definitions.take(device, point) for point in points]
        if device != NODE and (any(changed) or device not in self._born):
            self._give_device_birth(session, device)
        mark, epoch, *metrics = [self._definitions.data(device, point, historical) for point in points]
        # A metric is smaller than its reading in the body, and JSON less than twice as large as a record in it.
        parts = _split(metrics) if len(row.body) > MESSAGE_BYTES_CAP // 2 else [metrics]
        for left in reversed(range(len(parts))):
            more = [self._definitions.data(device, Point(MORE, left, "1", mark.time_ms), historical)] if left else []
            payload = encode([mark, epoch, *more, *parts[-1 - left]], time_ms=_now_ms(), seq=self._next_seq())
            info = session.publish(self.topic("NDATA" if device == NODE else "DDATA", device), payload)
        return info

    def _give_device_birth(self, session: Session, device: str) -> None:
        now_ms = _now_ms()
        metrics = self._definitions.birth(device, now_ms)
        session.publish(self.topic("DBIRTH", device), encode(metrics, time_ms=now_ms, seq=self._next_seq()))
        self._born.add(device)
        if device in self._dead:
            self._lingering.add(device)

    def _next_seq(self) -> int:
        """One count for node and devices, 255 -> 0 (tck-id-payloads-sequence-num-incrementing)."""
        self._seq = (self._seq + 1) % 256
        return self._seq


def _split(metrics: list[Metric]) -> list[list[Metric]]:
    """Halves, until each makes a message of at most MESSAGE_BYTES_CAP."""
    if len(metrics) < 2 or len(encode(metrics, time_ms=0, seq=0)) <= MESSAGE_BYTES_CAP:
        return [metrics]
    middle = len(metrics) // 2
    return [*_split(metrics[:middle]), *_split(metrics[middle:])]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
