"""The hub's work: state its presence, receive, commit, acknowledge."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import time
from contextlib import suppress

from millhand.errors import MillhandError, StoreError, TelemetryError
from millhand.telemetry.definitions import ACK_EPOCH, REBIRTH, acknowledgement
from millhand.telemetry.hosts import read_state, state
from millhand.telemetry.payloads import Metric, Type, decode, encode
from millhand.telemetry.session import Arrival, Session, Will
from millhand.telemetry.topics import NAMESPACE, Topic, parse, state_topic
from millhand_hub.database import Acknowledgement, Database
from millhand_hub.edge import EdgeNode, Event, NeedsBirth, Unreadable
from millhand_hub.settings import HubSettings

log = logging.getLogger("millhand.hub")

BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.5, 30.0
REBIRTH_PAUSE_FIRST_S, REBIRTH_PAUSE_LAST_S = 2.0, 60.0
PRUNE_EVERY_S = 60.0
IDLE_S = 1.0
MESSAGES_AT_ONCE = 2000
GOODBYE_DEADLINE_S = 2.0


class Receiver:
    """One hub. `run` serves until told to stop."""

    def __init__(self, settings: HubSettings) -> None:
        """Raises StoreError where the database cannot be opened."""
        self._settings = settings
        self._state_topic = state_topic(settings.host_id)
        self._born_ms = 0
        self._database = Database(settings.database_path)
        self._nodes: dict[tuple[str, str], EdgeNode] = {}
        self._asked: dict[tuple[str, str], tuple[float, int]] = {}
        """When a node was asked for a birth, and how often since its last one."""
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._pruned_s = -PRUNE_EVERY_S
        self.refused = 0
        """Messages that were not understood."""

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; every connection that breaks is opened again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        delay_s = BACKOFF_FIRST_S
        while not self._stopping.is_set():
            started_s = time.monotonic()
            try:
                await self._serve()
            except MillhandError as error:
                log.warning("%s", error.message)
                if time.monotonic() - started_s > BACKOFF_LAST_S:
                    delay_s = BACKOFF_FIRST_S
                await self._pause(delay_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, not a secret
                delay_s = min(delay_s * 2, BACKOFF_LAST_S)
        self._database.close()

    def stop(self) -> None:
        """Let `run` say goodbye and return."""
        self._stopping.set()
        self._wake.set()

    async def _serve(self) -> None:
        """One session. Raises TelemetryError when it breaks, StoreError when the database does not take rows."""
        settings = self._settings
        known = await asyncio.to_thread(self._database.forget_online)
        self._nodes.clear()
        self._asked.clear()
        self._born_ms = _now_ms()
        will = Will(self._state_topic, state(False, self._born_ms), retain=True)
        session = Session(settings.broker, settings, f"hub/{settings.host_id}", will, self._wake.set)
        await session.connect()
        try:
            await session.subscribe([f"{NAMESPACE}/{settings.group}/#", self._state_topic])
            session.publish(self._state_topic, state(True, self._born_ms), qos=1, retain=True)
            log.info("receiving from %s", settings.broker)
            for group, node in known:
                if settings.group in ("+", group):
                    self._ask_rebirth(session, (group, node), "the hub begins")
            while not self._stopping.is_set():
                self._wake.clear()
                session.check()
                await self._commit(session, await self._receive(session))
                await self._prune()
        finally:
            with suppress(TelemetryError, TimeoutError):
                async with asyncio.timeout(GOODBYE_DEADLINE_S):
                    await session.written(
                        session.publish(self._state_topic, state(False, _now_ms()), qos=1, retain=True)
                    )
            await session.close()

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    # ---- receiving --------------------------------------------------------------------------------------------------

    async def _receive(self, session: Session) -> list[Event]:
        """What comes within `commit_ms` of the first message; empty after a quiet second."""
        if not session.arrivals:
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await self._wake.wait()
        if not session.arrivals:
            return []
        if len(session.arrivals) < MESSAGES_AT_ONCE:
            await self._pause(self._settings.commit_ms / 1000)
        taken = [session.arrivals.popleft() for _ in range(min(len(session.arrivals), MESSAGES_AT_ONCE))]
        events = [self._take(session, arrival) for arrival in taken]
        return [event for event in events if event is not None]

    def _take(self, session: Session, arrival: Arrival) -> Event | None:
        """One message. What is not understood is counted, never fatal."""
        try:
            if arrival.topic.startswith(state_topic("")):
                self._hear_state(session, arrival)
                return None
            topic = parse(arrival.topic)
            if topic.kind in ("NCMD", "DCMD") or arrival.retained:
                return None  # a retained birth or value is of the past, whatever it says
            return self._understand(session, topic, arrival.payload)
        except MillhandError as error:
            self.refused += 1
            log.warning("message on %s refused: %s", arrival.topic[:120], error.message)
            return None

    def _understand(self, session: Session, topic: Topic, payload: bytes) -> Event | None:
        key = (topic.group, topic.node)
        node = self._nodes.setdefault(key, EdgeNode(*key))
        if node.is_foreign and topic.kind != "NBIRTH":
            return None
        message = decode(payload)
        try:
            match topic.kind:
                case "NBIRTH":
                    if key in self._asked:
                        self._asked[key] = (self._asked[key][0], 1)
                    return node.birth(message)
                case "NDEATH":
                    return node.death(message)
                case "DBIRTH":
                    node.device_birth(topic.device, message)
                case "DDEATH":
                    node.device_death(message)
                case _:
                    return node.data(topic.device, message)
        except NeedsBirth as error:
            self._ask_rebirth(session, key, error.message)
        except Unreadable as error:
            self.refused += 1
            log.warning("a row on %s is kept unread: %s", topic, error.message)
            error.row.unread = payload
            return error.row
        return None

    def _hear_state(self, session: Session, arrival: Arrival) -> None:
        """The will of our own last connection may come after our birth: then say again that we are here.

        Source: tck-id-host-topic-phid-birth-message, chapter 5.8: a host answers a false STATE of its own at once.
        """
        if arrival.topic == self._state_topic and not read_state(arrival.payload)[0]:
            session.publish(self._state_topic, state(True, self._born_ms), qos=1, retain=True)

    def _ask_rebirth(self, session: Session, key: tuple[str, str], why: str) -> None:
        """A node that does not answer is asked ever more rarely: it may be another vendor's."""
        at_s, times = self._asked.get(key, (float("-inf"), 0))
        if time.monotonic() - at_s < min(REBIRTH_PAUSE_FIRST_S * 2 ** (times - 1), REBIRTH_PAUSE_LAST_S):
            return
        self._asked[key] = (time.monotonic(), min(times + 1, 10))
        log.info("asking %s/%s for a birth: %s", *key, why)
        self._command(session, key, [Metric(REBIRTH, True, Type.BOOLEAN, _now_ms())])

    # ---- committing -------------------------------------------------------------------------------------------------

    async def _commit(self, session: Session, events: list[Event]) -> None:
        """Store, then acknowledge. What could not be stored is not acknowledged and will come again."""
        if not events:
            return
        for acknowledged in await asyncio.to_thread(self._database.commit, events):
            self._acknowledge(session, acknowledged)

    def _acknowledge(self, session: Session, acknowledged: Acknowledgement) -> None:
        now_ms = _now_ms()
        metrics = [Metric(ACK_EPOCH, acknowledged.epoch, Type.STRING, now_ms)]
        metrics += [
            Metric(acknowledgement(stream), upto, Type.UINT64, now_ms) for stream, upto in acknowledged.upto.items()
        ]
        self._command(session, (acknowledged.group, acknowledged.node), metrics)

    def _command(self, session: Session, key: tuple[str, str], metrics: list[Metric]) -> None:
        group, node = key
        topic = Topic(group, "NCMD", node)
        session.publish(str(topic), encode(metrics, time_ms=_now_ms(), seq=None), qos=1)

    async def _prune(self) -> None:
        """A full pass is followed by the next one, between commits, until all is gone."""
        if not self._settings.keep_days or time.monotonic() - self._pruned_s < PRUNE_EVERY_S:
            return
        try:
            if await asyncio.to_thread(self._database.prune, self._settings.keep_days):
                self._pruned_s = time.monotonic()
        except StoreError as error:
            log.warning("old rows were not deleted: %s", error.message)
            self._pruned_s = time.monotonic()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def run(settings: HubSettings) -> None:
    """Run the hub until it is told to stop. Raises ConfigError and StoreError where it cannot begin."""
    settings.secret()

    async def serve() -> None:
        await Receiver(settings).run()

    asyncio.run(serve())
