"""The edge node: carries the outbox to the hub by Sparkplug B, and hears the hub's acknowledgements.

Rows are sent in order, alerts before bulk, at most `in_flight_rows` beyond what the hub acknowledged. What is not
acknowledged is sent again as historical: after a reconnect, when the hub comes back (its STATE), or when
acknowledgements stay away for `ack_timeout_s` (doubled while they stay away, so that a deaf hub costs little).
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from contextlib import suppress
from typing import Any, Protocol

from millhand import __version__
from millhand.errors import MillhandError, TelemetryError
from millhand.store.changes import Changes
from millhand.store.rows import STREAMS, MetricSpec, Row, Stream
from millhand.telemetry.definitions import (
    ACK_EPOCH,
    BDSEQ,
    EPOCH,
    NODE,
    REBIRTH,
    VERSION,
    Definitions,
    Point,
    acknowledgement,
    device_of,
    identity,
    points_of,
)
from millhand.telemetry.payloads import Metric, Type, decode, encode
from millhand.telemetry.session import Arrival, Session, Will
from millhand.telemetry.settings import TelemetrySettings
from millhand.telemetry.topics import Topic, state_topic

log = logging.getLogger("millhand.telemetry")

ROWS_AT_ONCE = 200
ACK_TIMEOUT_GROWTH_CAP = 16
REBIRTH_PAUSE_S = 1.0


class Outbox(Protocol):
    """What the publisher needs of the store."""

    changed: Changes

    @property
    def epoch(self) -> str: ...

    async def pending(self, stream: Stream, after: int, limit: int = 500) -> list[Row]: ...

    async def acknowledge(self, stream: Stream, upto: int, epoch: str | None = None) -> None: ...

    async def acked(self, stream: Stream) -> int: ...

    async def last(self, stream: Stream) -> int: ...

    async def next_bdseq(self) -> int: ...

    async def metric_specs(self) -> list[MetricSpec]: ...


class HostOffline(TelemetryError):
    """The primary host went offline: Sparkplug wants NDEATH, disconnect, and the next server."""


class Publisher:
    """One node's way to its hub. Never blocks the pipeline: it only reads what the store holds."""

    def __init__(self, settings: TelemetrySettings, group: str, node: str, store: Outbox) -> None:
        self._settings = settings
        self._group = group
        self._node = node
        self._store = store
        self._definitions = Definitions()
        self._dead: set[str] = set()
        self._born: set[str] = set()
        self._seq = 0
        self._bdseq = 0
        self._epoch = ""
        self._sent: dict[Stream, int] = {}
        self._acked: dict[Stream, int] = {}
        self._live_from: dict[Stream, int] = {}
        """Rows up to here were there before the birth: they are historical."""
        self._ack_due_s = 0.0
        self._ack_timeout_s = settings.ack_timeout_s
        self._hosts: dict[str, tuple[bool, int]] = {}
        self._session: Session | None = None
        self._wake = asyncio.Event()
        self._rebirth_asked = False
        self._last_rebirth_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._error: MillhandError | None = None
        self._counts = {"sessions": 0, "sent": 0, "resent": 0, "acknowledgements": 0, "rebirths": 0}

    async def start(self) -> None:
        """Begin in the background; a broker that is away shows in `status`."""
        self._task = asyncio.create_task(self._run(), name="publisher")

    async def stop(self) -> None:
        """Say NDEATH and disconnect."""
        self._stopping.set()
        self._wake.set()
        if self._task is not None:
            await self._task

    def set_asset_alive(self, asset: str, alive: bool) -> None:
        """An asset began to speak (DBIRTH) or fell silent (DDEATH)."""
        if alive:
            self._dead.discard(asset)
        else:
            self._dead.add(asset)
        self._wake.set()

    async def status(self) -> dict[str, Any]:
        """Connection, queue and acknowledgements."""
        last = {stream: await self._store.last(stream) for stream in STREAMS}
        acked = {stream: await self._store.acked(stream) for stream in STREAMS}
        return {
            "connected": self._session is not None,
            "broker": self._session.url if self._session else ", ".join(self._settings.brokers),
            "delivery": self._settings.delivery,
            "queued_rows": sum(last[stream] - acked[stream] for stream in STREAMS),
            "last": last,
            "acked": acked,
            **self._counts,
            "error": self._error.message if self._error else "",
            "hint": self._error.hint if self._error else "",
        }

    # ---- sessions ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        delay_s = self._settings.backoff_first_s
        turn = 0
        while not self._stopping.is_set():
            url = self._settings.brokers[turn % len(self._settings.brokers)]
            sessions_before = self._counts["sessions"]
            try:
                await self._serve(url)
            except MillhandError as error:
                self._error = error
                log.warning("%s", error.message)
            except Exception as error:
                log.exception("the publisher failed")
                self._error = TelemetryError(f"the publisher failed: {type(error).__name__}: {error}")
            turn += 1
            if self._counts["sessions"] > sessions_before:
                delay_s = self._settings.backoff_first_s
            if not self._stopping.is_set():
                await self._pause(delay_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, not a secret
                delay_s = min(delay_s * 2, self._settings.backoff_last_s)

    async def _serve(self, url: str) -> None:
        """One session from CONNECT to its end. Returns when told to stop, raises TelemetryError otherwise."""
        self._bdseq = await self._store.next_bdseq()  # committed before CONNECT
        will = Will(self._topic("NDEATH"), encode([self._bdseq_metric()], time_ms=_now_ms(), seq=None))
        session = Session(url, self._settings, f"{self._group}-{self._node}", will)
        await session.connect()
        listener: asyncio.Task[None] | None = None
        try:
            session.subscribe([self._topic("NCMD"), state_topic("+")])
            self._hosts.clear()
            listener = asyncio.create_task(self._listen(session), name="publisher arrivals")
            await self._wait_for_host(session)
            await self._birth(session)
            self._session, self._error = session, None
            self._counts["sessions"] += 1
            log.info("connected to %s", url)
            await self._work(session, listener)
        finally:
            self._session = None
            if listener is not None:
                listener.cancel()
                with suppress(asyncio.CancelledError, MillhandError):
                    await listener
            await self._say_goodbye(session)

    async def _work(self, session: Session, listener: asyncio.Task[None]) -> None:
        """Send what is there; then wait for rows, commands, acknowledgements or the end."""
        while not self._stopping.is_set():
            self._wake.clear()
            if session.closed.is_set():
                raise TelemetryError(
                    f"the connection to '{session.url}' broke: {session.reason}", hint="it is opened again"
                )
            if listener.done():
                listener.result()
            if self._store.epoch != self._epoch or self._rebirth_due():
                await self._birth(session)
            await self._report_deaths(session)
            self._resend_if_overdue()
            seen = self._store.changed.count
            if not await self._send_some(session):
                await self._wait(session, listener, seen)

    async def _wait(self, session: Session, listener: asyncio.Task[None], seen: int) -> None:
        """Until there may be something to do."""
        waits = [
            asyncio.create_task(self._store.changed.after(seen)),
            asyncio.create_task(self._wake.wait()),
            asyncio.create_task(session.closed.wait()),
        ]
        try:
            await asyncio.wait({*waits, listener}, timeout=self._patience_s(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()

    def _patience_s(self) -> float | None:
        now = time.monotonic()
        dues = [self._ack_due_s - now] if self._awaiting_ack() else []
        if self._rebirth_asked:
            dues.append(self._last_rebirth_s + REBIRTH_PAUSE_S - now)
        return max(0.01, min(dues)) if dues else None

    async def _say_goodbye(self, session: Session) -> None:
        """NDEATH first, then DISCONNECT (tck-id-payloads-ndeath-will-message-publisher-disconnect-mqtt311, -mqtt50)."""
        if not session.closed.is_set() and self._settings.protocol != "5":
            with suppress(TelemetryError, TimeoutError):
                async with asyncio.timeout(2.0):
                    death = encode([self._bdseq_metric()], time_ms=_now_ms(), seq=None)
                    await session.written(session.publish(self._topic("NDEATH"), death, qos=1))
        await session.close(with_will=True)

    async def _wait_for_host(self, session: Session) -> None:
        """Wait for the primary host's STATE (tck-id-message-flow-edge-node-birth-publish-phid-wait)."""
        host = self._settings.primary_host
        while host and not self._hosts.get(host, (False, 0))[0]:
            if session.closed.is_set():
                raise TelemetryError(f"the connection to '{session.url}' broke: {session.reason}")
            if self._stopping.is_set():
                return
            self._error = TelemetryError(
                f"primary host '{host}' is offline on '{session.url}'", hint="readings wait in the store meanwhile"
            )
            self._wake.clear()
            await self._wait_awake(session)

    async def _wait_awake(self, session: Session) -> None:
        waits = [asyncio.create_task(self._wake.wait()), asyncio.create_task(session.closed.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()

    # ---- births -----------------------------------------------------------------------------------------------------

    async def _birth(self, session: Session) -> None:
        """NBIRTH, then a DBIRTH for each living asset, before any data; the same bdSeq within a session."""
        self._rebirth_asked, self._last_rebirth_s = False, time.monotonic()
        self._epoch = self._store.epoch
        for spec in await self._store.metric_specs():
            self._definitions.learn(spec)
        for stream in STREAMS:
            self._acked[stream] = self._sent[stream] = await self._store.acked(stream)
            self._live_from[stream] = await self._store.last(stream)
            self._definitions.take(NODE, Point(identity(stream), self._sent[stream], "1", _now_ms()))
        self._definitions.take(NODE, Point("Gap", "", "", 0))
        self._seq = 0
        now_ms = _now_ms()
        metrics = [
            self._bdseq_metric(),
            Metric(REBIRTH, False, Type.BOOLEAN, now_ms),
            Metric(EPOCH, self._epoch, Type.STRING, now_ms),
            Metric(ACK_EPOCH, self._epoch, Type.STRING, now_ms),
            *(Metric(acknowledgement(s), self._acked[s], Type.UINT64, now_ms) for s in STREAMS),
            Metric(VERSION, __version__, Type.STRING, now_ms),
            *self._definitions.birth(NODE, now_ms),
        ]
        session.publish(self._topic("NBIRTH"), encode(metrics, time_ms=now_ms, seq=0))
        self._born = set()
        for device in self._definitions.devices():
            if device not in self._dead:
                self._birth_device(session, device)
        self._restart_ack_clock()
        self._counts["rebirths"] += 1

    def _birth_device(self, session: Session, device: str) -> None:
        now_ms = _now_ms()
        metrics = self._definitions.birth(device, now_ms)
        session.publish(self._topic("DBIRTH", device), encode(metrics, time_ms=now_ms, seq=self._next_seq()))
        self._born.add(device)

    async def _report_deaths(self, session: Session) -> None:
        for device in sorted(self._born & self._dead):
            payload = encode([], time_ms=_now_ms(), seq=self._next_seq())
            session.publish(self._topic("DDEATH", device), payload)
            self._born.discard(device)

    def _rebirth_due(self) -> bool:
        """A host that asks again and again gets one rebirth a second."""
        return self._rebirth_asked and time.monotonic() - self._last_rebirth_s >= REBIRTH_PAUSE_S

    def _next_seq(self) -> int:
        self._seq = (self._seq + 1) % 256
        return self._seq

    def _bdseq_metric(self) -> Metric:
        return Metric(BDSEQ, self._bdseq, Type.INT64, _now_ms())

    # ---- rows -------------------------------------------------------------------------------------------------------

    async def _send_some(self, session: Session) -> bool:
        """Send a page of rows, alerts before bulk; return whether there was one."""
        for stream in STREAMS:
            room = self._acked[stream] + self._settings.in_flight_rows - self._sent[stream]
            if room <= 0:
                continue
            rows = await self._store.pending(stream, self._sent[stream], min(room, ROWS_AT_ONCE))
            if self._store.epoch != self._epoch or any(row.epoch != self._epoch for row in rows):
                return True  # another file: its rows need a birth first
            if rows:
                await self._send(session, stream, rows)
                return True
        return False

    async def _send(self, session: Session, stream: Stream, rows: list[Row]) -> None:
        was_awaiting = self._awaiting_ack()
        for row in rows:
            info = self._send_row(session, row)
            self._sent[stream] = row.record().last if row.kind == "gap" else row.seq  # type: ignore[union-attr]
        self._counts["sent"] += len(rows)
        await session.written(info)
        if not was_awaiting:
            self._restart_ack_clock()
        if self._settings.delivery == "session":
            self._acked[stream] = self._sent[stream]
            await self._store.acknowledge(stream, self._sent[stream], self._epoch)

    def _send_row(self, session: Session, row: Row) -> Any:
        device, points = device_of(row), list(points_of(row))
        changed = [self._definitions.take(device, point) for point in points]
        if device != NODE and (any(changed) or device not in self._born):
            self._birth_device(session, device)
        historical = row.seq <= self._live_from[row.stream]  # type: ignore[index]
        metrics = [self._definitions.data(device, point, historical) for point in points]
        kind = "NDATA" if device == NODE else "DDATA"
        payload = encode(metrics, time_ms=_now_ms(), seq=self._next_seq())
        return session.publish(self._topic(kind, device), payload)

    def _awaiting_ack(self) -> bool:
        return any(self._sent[stream] > self._acked[stream] for stream in STREAMS)

    def _restart_ack_clock(self) -> None:
        self._ack_due_s = time.monotonic() + self._ack_timeout_s

    def _resend_if_overdue(self) -> None:
        if self._settings.delivery == "session" or not self._awaiting_ack() or time.monotonic() < self._ack_due_s:
            return
        cap_s = self._settings.ack_timeout_s * ACK_TIMEOUT_GROWTH_CAP
        self._ack_timeout_s = min(self._ack_timeout_s * 2, cap_s)
        self._error = TelemetryError(
            "the hub does not acknowledge; rows are sent again", hint="is a millhand hub connected to this broker?"
        )
        self._send_again()

    def _send_again(self) -> None:
        """Go back to what the hub has; what was sent since counts as historical."""
        for stream in STREAMS:
            self._counts["resent"] += self._sent[stream] - self._acked[stream]
            self._live_from[stream] = max(self._live_from[stream], self._sent[stream])
            self._sent[stream] = self._acked[stream]
        self._restart_ack_clock()

    # ---- what comes in ----------------------------------------------------------------------------------------------

    async def _listen(self, session: Session) -> None:
        """Handle arrivals. Raises HostOffline where the primary host says so."""
        while True:
            arrival = await session.arrivals.get()
            try:
                if arrival.topic.startswith(state_topic("")):
                    self._hear_state(arrival)
                else:
                    await self._hear_command(arrival)
            except HostOffline:
                raise
            except MillhandError as error:
                log.warning("a message on %s was not understood: %s", arrival.topic, error.message)
            self._wake.set()

    def _hear_state(self, arrival: Arrival) -> None:
        """A stale STATE is ignored by its timestamp (tck-id-operational-behavior-edge-node-termination-host-*)."""
        host = arrival.topic.removeprefix(state_topic(""))
        try:
            state = json.loads(arrival.payload)
            online, timestamp = bool(state["online"]), int(state["timestamp"])
        except (ValueError, KeyError, TypeError) as error:
            raise TelemetryError(f"STATE of host '{host}' is not valid: {error}", retriable=False) from error
        was_online, newest = self._hosts.get(host, (False, -1))
        if timestamp < newest:
            return
        self._hosts[host] = (online, timestamp)
        if host == self._settings.primary_host and was_online and not online:
            raise HostOffline(f"primary host '{host}' went offline", hint="readings wait in the store meanwhile")
        if online and self._sent and not arrival.retained:
            self._ack_timeout_s = self._settings.ack_timeout_s
            self._send_again()

    async def _hear_command(self, arrival: Arrival) -> None:
        message = decode(arrival.payload)
        if message.named(REBIRTH):
            self._rebirth_asked = True
        epoch = message.named(ACK_EPOCH)
        if epoch != self._epoch:
            return
        for stream in STREAMS:
            upto = message.named(acknowledgement(stream))
            if isinstance(upto, int) and stream in self._acked and upto > self._acked[stream]:
                await self._store.acknowledge(stream, upto, str(epoch))
                self._acked[stream] = await self._store.acked(stream)
                self._sent[stream] = max(self._sent[stream], self._acked[stream])
                self._counts["acknowledgements"] += 1
                self._ack_timeout_s = self._settings.ack_timeout_s
                self._restart_ack_clock()
                self._error = None

    def _topic(self, kind: str, device: str = "") -> str:
        return str(Topic(self._group, kind, self._node, device))

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
