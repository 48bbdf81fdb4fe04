"""Whether a hub is there, asked of the broker: its STATE is retained, and its will takes it back."""

from __future__ import annotations

import asyncio
import os

from millhand.errors import TelemetryError
from millhand.telemetry.hosts import read_state
from millhand.telemetry.session import ECHO_TOPIC, Session, Will
from millhand.telemetry.topics import state_topic
from millhand_hub.settings import HubSettings

ANSWER_DEADLINE_S = 5.0
"""A broker sends what it retains at once after the subscription."""


async def online_since_ms(settings: HubSettings) -> int:
    """When the hub went online, in Unix milliseconds.

    A hub that dies or hangs is offline after 1.5 `keepalive_s` at the latest. Raises TelemetryError where the broker
    does not answer, or says that the hub is offline or was never there.
    """
    arrived = asyncio.Event()
    # A broker has one connection of each client id: never the hub's own.
    client_id = f"hub/{settings.host_id}/health-{os.getpid()}"
    session = Session(settings.broker, settings, client_id, Will(ECHO_TOPIC, b""), arrived.set)
    await session.connect()
    try:
        await session.subscribe([state_topic(settings.host_id)])
        async with asyncio.timeout(ANSWER_DEADLINE_S):
            while not session.arrivals:
                arrived.clear()
                session.check()
                await arrived.wait()
        online, time_ms = read_state(session.arrivals[-1].payload)
    except TimeoutError as error:
        raise _absent(settings, "was never there") from error
    finally:
        await session.close()
    if not online:
        raise _absent(settings, "is offline")
    return time_ms


def _absent(settings: HubSettings, what: str) -> TelemetryError:
    return TelemetryError(f"the hub '{settings.host_id}' {what}, says '{settings.broker}'", hint="see the hub's log")
