"""The hub's work: state its presence, receive, commit, acknowledge."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import time
from contextlib import suppress

from millhand.errors import MillhandError, StoreError, TelemetryError
from millhand.telemetry.definitions import ACK_EPOCH, REBIRTH, acknowledgement
from millhand.telemetry.payloads import Metric, Type, decode, encode
from millhand.telemetry.session import Arrival, Session, Will
from millhand.telemetry.topics import NAMESPACE, Topic, parse, state_topic
from millhand_hub.database import Acknowledgement, Database
from millhand_hub.edge import Delivery, EdgeNode, NeedsBirth
from millhand_hub.settings import HubSettings

log = logging.getLogger("millhand.hub")

BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.5, 30.0
REBIRTH_PAUSE_S = 2.0
PRUNE_EVERY_S = 60.0
ROWS_AT_ONCE = 2000


class Receiver:
    """One hub. `run` serves until told to stop."""

    def __init__(self, settings: HubSettings) -> None:
        self._settings = settings
        self._database = Database(settings.database_path)
        self._nodes: dict[tuple[str, str], EdgeNode] = {}
        self._changed: set[tuple[str, str]] = set()
        self._deliveries: list[tuple[EdgeNode, Delivery]] = []
        self._asked_s: dict[tuple[str, str], float] = {}
        self._stopping = asyncio.Event()
        self._pruned_s = time.monotonic()
        self.refused = 0
        """Messages that were no Sparkplug of ours."""

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; every connection that breaks is opened again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        delay_s = BACKOFF_FIRST_S
        while not self._stopping.is_set():
            try:
                await self._serve()
                delay_s = BACKOFF_FIRST_S
            except MillhandError as error:
                log.warning("%s", error.message)
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay_s * random.uniform(0.8, 1.2)):  # noqa: S311 - jitter
                        await self._stopping.wait()
                delay_s = min(delay_s * 2, BACKOFF_LAST_S)
        self._database.close()

    async def _serve(self) -> None:
        """One session. Raises TelemetryError when it breaks, StoreError when the database does not take rows."""
        settings = self._settings
        born_ms = time.time_ns() // 1_000_000
        topic = state_topic(settings.host_id)
        will = Will(topic, _state(False, born_ms), retain=True)
        session = Session(settings.broker, settings.link(), f"hub-{settings.host_id}", will)
        await session.connect()
        try:
            self._nodes.clear()
            session.subscribe([f"{NAMESPACE}/{settings.group}/#"], qos=1)
            session.publish(topic, _state(True, born_ms), qos=1, retain=True)
            log.info("receiving from %s", settings.broker)
            while not self._stopping.is_set():
                await self._receive(session)
                await self._commit(session)
                await self._prune()
        finally:
            with suppress(TelemetryError, TimeoutError):
                async with asyncio.timeout(2.0):
                    info = session.publish(topic, _state(False, time.time_ns() // 1_000_000), qos=1, retain=True)
                    await session.written(info)
            await session.close()

    # ---- receiving --------------------------------------------------------------------------------------------------

    async def _receive(self, session: Session) -> None:
        """Take what comes within `commit_ms` of the first message."""
        first = await self._first(session)
        if first is None:
            return
        self._take(session, first)
        deadline = time.monotonic() + self._settings.commit_ms / 1000
        while time.monotonic() < deadline and len(self._deliveries) < ROWS_AT_ONCE:
            if session.arrivals.empty():
                await asyncio.sleep(0.002)
                continue
            self._take(session, session.arrivals.get_nowait())

    async def _first(self, session: Session) -> Arrival | None:
        waits = [
            asyncio.create_task(session.arrivals.get()),
            asyncio.create_task(session.closed.wait()),
            asyncio.create_task(self._stopping.wait()),
        ]
        arrival, closed = waits[0], waits[1]
        await asyncio.wait(waits, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            if not task.done():
                task.cancel()
        if arrival.done() and not arrival.cancelled():
            return arrival.result()  # type: ignore[return-value]
        if closed.done() and not closed.cancelled():
            raise TelemetryError(f"the connection to '{session.url}' broke: {session.reason}")
        return None

    def _take(self, session: Session, arrival: Arrival) -> None:
        """One message; what is not understood is counted, never fatal."""
        try:
            topic = parse(arrival.topic)
            if topic.kind in ("NCMD", "DCMD") or (arrival.retained and topic.kind != "NDEATH"):
                return
            self._handle(topic, arrival.payload)
        except NeedsBirth as error:
            self._ask_rebirth(session, topic, error)
        except MillhandError as error:
            self.refused += 1
            log.warning("message on %s refused: %s", arrival.topic[:120], error.message)
        except (ValueError, KeyError, TypeError) as error:
            self.refused += 1
            log.warning("message on %s refused: %s: %s", arrival.topic[:120], type(error).__name__, error)

    def _handle(self, topic: Topic, payload: bytes) -> None:
        message = decode(payload)
        key = (topic.group, topic.node)
        node = self._nodes.get(key)
        if topic.kind == "NBIRTH":
            node = self._nodes.setdefault(key, EdgeNode(*key))
            node.birth(message)
            self._changed.add(key)
            return
        if node is None:
            if topic.kind == "NDEATH":
                return
            raise NeedsBirth(f"{topic.group}/{topic.node} is not known")
        if topic.kind == "NDEATH":
            if node.death(message):
                self._changed.add(key)
        elif topic.kind == "DBIRTH":
            node.device_birth(topic.device, message)
        elif topic.kind == "DDEATH":
            node.device_death(message)
        else:
            self._deliveries.append((node, node.data(topic.device, message)))

    def _ask_rebirth(self, session: Session, topic: Topic, why: NeedsBirth) -> None:
        key = (topic.group, topic.node)
        if time.monotonic() - self._asked_s.get(key, -REBIRTH_PAUSE_S) < REBIRTH_PAUSE_S:
            return
        self._asked_s[key] = time.monotonic()
        log.info("%s: asking for a birth", why.message)
        now_ms = time.time_ns() // 1_000_000
        command = encode([Metric(REBIRTH, True, Type.BOOLEAN, now_ms)], time_ms=now_ms, seq=None)
        with suppress(TelemetryError):
            session.publish(str(Topic(*_node_topic(topic))), command, qos=1)

    # ---- committing -------------------------------------------------------------------------------------------------

    async def _commit(self, session: Session) -> None:
        """Store, then acknowledge. What could not be stored is not acknowledged and will come again."""
        if not self._deliveries and not self._changed:
            return
        deliveries, self._deliveries = self._deliveries, []
        changed = [self._nodes[key] for key in self._changed if key in self._nodes]
        self._changed.clear()
        try:
            acknowledgements = await asyncio.to_thread(self._database.commit, deliveries, changed)
        except StoreError:
            self._nodes.clear()  # ask for births: the rows must come again
            raise
        for acknowledgement_ in acknowledgements:
            self._acknowledge(session, acknowledgement_)

    def _acknowledge(self, session: Session, acknowledged: Acknowledgement) -> None:
        now_ms = time.time_ns() // 1_000_000
        metrics = [Metric(ACK_EPOCH, acknowledged.epoch, Type.STRING, now_ms)]
        metrics += [
            Metric(acknowledgement(stream), upto, Type.UINT64, now_ms) for stream, upto in acknowledged.upto.items()
        ]
        topic = Topic(acknowledged.group, "NCMD", acknowledged.node)
        session.publish(str(topic), encode(metrics, time_ms=now_ms, seq=None), qos=1)

    async def _prune(self) -> None:
        if not self._settings.keep_days or time.monotonic() - self._pruned_s < PRUNE_EVERY_S:
            return
        self._pruned_s = time.monotonic()
        await asyncio.to_thread(self._database.prune, self._settings.keep_days)


def _node_topic(topic: Topic) -> tuple[str, str, str]:
    return topic.group, "NCMD", topic.node


def _state(online: bool, timestamp_ms: int) -> bytes:
    return json.dumps({"online": online, "timestamp": timestamp_ms}).encode()


def run(settings: HubSettings) -> None:
    """Run the hub until it is told to stop. Raises StoreError where its database cannot be opened."""

    async def serve() -> None:
        await Receiver(settings).run()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())
