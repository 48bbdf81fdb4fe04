"""The edge node: carries the outbox to the hub by Sparkplug B, and hears the hub's acknowledgements.

Rows are sent in order, alerts before bulk, at most `in_flight_rows` and about `in_flight_bytes` beyond what the hub
acknowledged. What is not acknowledged is sent again as historical: after a reconnect, when the hub comes back (its
STATE), or when acknowledgements stay away for `ack_timeout_s` (doubled while they stay away, so that a deaf hub costs
little).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from millhand.errors import MillhandError, TelemetryError
from millhand.store.changes import Changes
from millhand.store.rows import STREAMS, MetricSpec, Row, Stream
from millhand.telemetry.definitions import ACK_EPOCH, REBIRTH, acknowledgement
from millhand.telemetry.flight import Flight, Rate
from millhand.telemetry.hosts import Hosts
from millhand.telemetry.payloads import decode
from millhand.telemetry.session import Arrival, Session
from millhand.telemetry.settings import TelemetrySettings
from millhand.telemetry.topics import state_topic
from millhand.telemetry.voice import Voice

log = logging.getLogger("millhand.telemetry")

ROWS_AT_ONCE = 200
BYTES_AT_ONCE = 4 * 1024 * 1024
"""About so much of the outbox is in memory at a time."""
PACE_S = 0.05
"""Rows that are committed shortly after each other go out together: waking for each one costs the pipeline its time."""
REBIRTH_PAUSE_S = 1.0
GOODBYE_DEADLINE_S = 2.0


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
        """group, node: Sparkplug ids, safe in a topic."""
        self._settings = settings
        self._client_id = f"{group}/{node}"
        self._store = store
        self._voice = Voice(group, node)
        self._flight = Flight(settings.in_flight_rows, settings.in_flight_bytes, settings.ack_timeout_s)
        self._sent_rate, self._acked_rate = Rate(), Rate()
        self._hosts = Hosts()
        self._session: Session | None = None
        self._row_bytes = 1
        self._wake = asyncio.Event()
        self._rebirth_asked = False
        self._last_birth_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._fault, self._hint = "", ""
        """What is wrong now. Text, since an exception's traceback would keep the dead session's sockets alive."""
        self._counts = {"sessions": 0, "sent": 0, "resent": 0, "acknowledgements": 0, "births": 0}

    async def start(self) -> None:
        """Begin in the background; a broker that is away shows in `status`."""
        self._task = asyncio.create_task(self._run(), name="publisher")

    async def stop(self) -> None:
        """Say NDEATH and disconnect. Takes up to `connect_timeout_s` where a broker is just being tried."""
        self._stopping.set()
        self._wake.set()
        if self._task is not None:
            await self._task

    def set_asset_alive(self, asset: str, alive: bool) -> None:
        """An asset began to speak (DBIRTH) or fell silent (DDEATH). Assets count as alive until told otherwise."""
        self._voice.set_alive(asset, alive)
        self._wake.set()

    async def status(self) -> dict[str, Any]:
        """Connection, queue and acknowledgements; rates are those of the last ten seconds.

        `hub_silent_s`: how long the hub has left what was sent unacknowledged; None when nothing is awaited.
        `hosts_offline`: the Sparkplug hosts on the broker, where none of them is online.
        """
        silent_s = self._flight.silent_s if self._session else None
        last = {stream: await self._store.last(stream) for stream in STREAMS}
        acked = {stream: await self._store.acked(stream) for stream in STREAMS}
        return {
            "connected": self._session is not None,
            "broker": self._session.url if self._session else ", ".join(self._settings.brokers),
            "delivery": self._settings.delivery,
            "queued_rows": sum(last[stream] - acked[stream] for stream in STREAMS),
            "hub_silent_s": None if silent_s is None else round(silent_s, 1),
            "hosts_offline": self._hosts.all_offline if self._session else [],
            "oldest_unsent_s": await self._oldest_unsent_s(acked),
            "sent_rows_per_s": round(self._sent_rate.rows_per_s, 1),
            "acked_rows_per_s": round(self._acked_rate.rows_per_s, 1),
            "last": last,
            "acked": acked,
            **self._counts,
            "error": self._fault,
            "hint": self._hint,
        }

    def _complain(self, fault: str, hint: str) -> None:
        self._fault, self._hint = fault, hint

    async def _oldest_unsent_s(self, acked: Mapping[Stream, int]) -> float:
        """Age of the oldest row that is not acknowledged, by the node's clock; 0 when there is none."""
        rows = [row for stream in STREAMS for row in await self._store.pending(stream, acked[stream], 1)]
        born_ns = min((row.created_ns for row in rows), default=time.time_ns())
        return round(max(0, time.time_ns() - born_ns) / 1e9, 1)

    # ---- sessions ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        delay_s = self._settings.backoff_first_s
        turn = 0
        while not self._stopping.is_set():
            sessions_before = self._counts["sessions"]
            try:
                await self._serve(self._settings.brokers[turn % len(self._settings.brokers)])
            except MillhandError as error:
                self._complain(error.message, error.hint)
                log.warning("%s", error.message)
            except Exception as error:
                log.exception("the publisher failed")
                self._complain(f"the publisher failed: {type(error).__name__}: {error}", "see the log")
            turn += 1
            if self._counts["sessions"] > sessions_before:
                delay_s = self._settings.backoff_first_s
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s * random.uniform(0.8, 1.2)):  # noqa: S311 - jitter, not a secret
                    await self._stopping.wait()
            delay_s = min(delay_s * 2, self._settings.backoff_last_s)

    async def _serve(self, url: str) -> None:
        """One session from CONNECT to its end. Returns when told to stop, raises TelemetryError otherwise."""
        will = self._voice.begin(await self._store.next_bdseq())  # committed before CONNECT
        session = Session(url, self._settings, self._client_id, will, self._wake.set)
        await session.connect()
        self._hosts = Hosts()
        try:
            await session.subscribe([self._voice.topic("NCMD"), state_topic("+")])
            if not await self._wait_for_host(session):
                return
            await self._birth(session)
            self._session = session
            self._complain("", "")
            self._counts["sessions"] += 1
            log.info("connected to %s", url)
            await self._work(session)
        finally:
            was_born, self._session = self._session is not None, None
            await self._say_goodbye(session, was_born)

    async def _work(self, session: Session) -> None:
        """Hear what came in, send what is there; then wait for rows, commands, acknowledgements or the end."""
        while not self._stopping.is_set():
            self._wake.clear()
            session.check()
            await self._hear(session)
            if self._store.epoch != self._flight.epoch or self._rebirth_due():
                await self._birth(session)
            if self._flight.is_overdue:
                self._flight.grow_patience()
                self._complain(
                    "the hub does not acknowledge; rows are sent again", "is a millhand hub connected to this broker?"
                )
                self._counts["resent"] += self._flight.rewind()
            self._voice.report_deaths(session, drained=False)
            seen = self._store.changed.count
            if not await self._send_some(session):
                self._voice.report_deaths(session, drained=all(self._flight.room(stream) > 0 for stream in STREAMS))
                await self._wait(seen)

    async def _wait(self, seen: int) -> None:
        """Until there may be something to do."""
        dues = [self._flight.patience_s]
        if self._rebirth_asked:
            dues.append(self._last_birth_s + REBIRTH_PAUSE_S - time.monotonic())
        timeout_s = min((due for due in dues if due is not None), default=None)
        waits = [
            asyncio.create_task(self._store.changed.after(seen)),
            asyncio.create_task(self._wake.wait()),
        ]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        await asyncio.sleep(PACE_S)

    async def _say_goodbye(self, session: Session, was_born: bool) -> None:
        """NDEATH first, then DISCONNECT (tck-id-payloads-ndeath-will-message-publisher-disconnect-mqtt311, -mqtt50)."""
        if was_born and self._settings.protocol != "5":
            with suppress(TelemetryError, TimeoutError):
                async with asyncio.timeout(GOODBYE_DEADLINE_S):
                    await session.written(self._voice.say_death(session))
        await session.close(with_will=was_born)

    async def _wait_for_host(self, session: Session) -> bool:
        """Wait for the primary host's STATE (tck-id-message-flow-edge-node-birth-publish-phid-wait).

        Returns False when told to stop. Where there are several brokers, one on which the host is offline is left for
        the next one (tck-id-operational-behavior-primary-application-state-with-multiple-servers-walk).
        """
        host, several = self._settings.primary_host, len(self._settings.brokers) > 1
        give_up_s = time.monotonic() + self._settings.connect_timeout_s
        while host:
            self._wake.clear()
            session.check()
            await self._hear(session)
            online = self._hosts.is_online(host)
            if online or self._stopping.is_set():
                break
            offline = HostOffline(
                f"primary host '{host}' is offline on '{session.url}'", hint="readings wait in the store meanwhile"
            )
            self._complain(offline.message, offline.hint)
            left_s = give_up_s - time.monotonic()
            if several and (online is False or left_s <= 0):
                raise offline
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s if several else None):
                    await self._wake.wait()
        return not self._stopping.is_set()

    async def _birth(self, session: Session) -> None:
        self._rebirth_asked, self._last_birth_s = False, time.monotonic()
        epoch, specs = self._store.epoch, await self._store.metric_specs()
        acked = {stream: await self._store.acked(stream) for stream in STREAMS}
        last = {stream: await self._store.last(stream) for stream in STREAMS}
        if self._store.epoch != epoch:
            return await self._birth(session)  # another file came in between
        self._flight.begin(epoch, acked, last)
        self._voice.give_birth(session, epoch, acked, specs)
        self._counts["births"] += 1
        return None

    def _rebirth_due(self) -> bool:
        """A host that asks again and again gets one birth a second."""
        return self._rebirth_asked and time.monotonic() - self._last_birth_s >= REBIRTH_PAUSE_S

    # ---- rows -------------------------------------------------------------------------------------------------------

    async def _send_some(self, session: Session) -> bool:
        """Send a page of rows, alerts before bulk; return whether there was one."""
        for stream in STREAMS:
            room = self._flight.room(stream)
            if room <= 0:
                continue
            page = max(1, min(room, ROWS_AT_ONCE, BYTES_AT_ONCE // self._row_bytes))
            rows = await self._store.pending(stream, self._flight.sent[stream], page)
            if any(row.epoch != self._flight.epoch for row in rows):
                return True  # another file: its rows need a birth first
            if rows:
                await self._send(session, stream, rows)
                return True
        return False

    async def _send(self, session: Session, stream: Stream, rows: list[Row]) -> None:
        self._row_bytes = max(len(row.body) for row in rows)
        for row in rows:
            info = self._voice.say(session, row, historical=self._flight.is_historical(row))
            self._flight.send(stream, row.seq, len(row.body))
        self._counts["sent"] += len(rows)
        self._sent_rate.add(len(rows))
        if self._settings.delivery == "session":
            await session.confirmed()
            await self._store.acknowledge(stream, rows[-1].seq, self._flight.epoch)
            self._flight.acknowledge(stream, rows[-1].seq)
            self._acked_rate.add(len(rows))
        else:
            await session.written(info)  # no more in paho's queue than a page

    # ---- what comes in ----------------------------------------------------------------------------------------------

    async def _hear(self, session: Session) -> None:
        """Take what came in. Raises HostOffline where the primary host says so."""
        while session.arrivals:
            arrival = session.arrivals.popleft()
            try:
                if arrival.topic.startswith(state_topic("")):
                    self._hear_state(arrival)
                else:
                    await self._hear_command(arrival)
            except HostOffline:
                raise
            except MillhandError as error:
                log.warning("a message on %s was not understood: %s", arrival.topic, error.message)

    def _hear_state(self, arrival: Arrival) -> None:
        """The primary host's end ends the session; a host that comes may have missed what is in flight."""
        heard = self._hosts.hear(arrival)
        if heard is None:
            return
        host, online = heard
        if host == self._settings.primary_host and not online and self._session is not None:
            raise HostOffline(f"primary host '{host}' went offline", hint="readings wait in the store meanwhile")
        if online and not arrival.retained:
            self._flight.reset_patience()
            self._counts["resent"] += self._flight.rewind()

    async def _hear_command(self, arrival: Arrival) -> None:
        message = decode(arrival.payload)
        if message.named(REBIRTH) is True:
            self._rebirth_asked = True
        if message.named(ACK_EPOCH) != self._flight.epoch:
            return
        for stream in STREAMS:
            upto = message.named(acknowledgement(stream))
            if isinstance(upto, int) and upto > self._flight.acked[stream]:
                await self._store.acknowledge(stream, upto, self._flight.epoch)
                before, now = self._flight.acked[stream], await self._store.acked(stream)
                self._flight.acknowledge(stream, now)
                self._acked_rate.add(now - before)
                self._counts["acknowledgements"] += 1
                self._complain("", "")
