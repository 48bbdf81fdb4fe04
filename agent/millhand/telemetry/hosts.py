"""Host applications and whether they are online: `spBv1.0/STATE/<id>`, Sparkplug 3.0.0 chapter 5."""

from __future__ import annotations

import json

from millhand.errors import TelemetryError
from millhand.telemetry.session import Arrival
from millhand.telemetry.topics import state_topic


def state(online: bool, time_ms: int) -> bytes:
    """The payload of a STATE message."""
    return json.dumps({"online": online, "timestamp": time_ms}).encode()


def read_state(payload: bytes) -> tuple[bool, int]:
    """(online, time in Unix milliseconds). Raises TelemetryError for anything else."""
    try:
        found = json.loads(payload)
        online, time_ms = found["online"], found["timestamp"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TelemetryError(f"the STATE is not valid: {error!r}", retriable=False) from error
    if not isinstance(online, bool) or not isinstance(time_ms, int):
        raise TelemetryError("the STATE is not valid: 'online' must be a boolean, 'timestamp' an integer")
    return online, time_ms


class Hosts:
    """What one connection has heard of the hosts."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[bool, int]] = {}

    def hear(self, arrival: Arrival) -> tuple[str, bool] | None:
        """(host, online) of a STATE; None for one that is older than what is known.

        Source: tck-id-operational-behavior-edge-node-termination-host-offline-timestamp and
        -message-flow-edge-node-birth-publish-phid-timestamp. Raises TelemetryError for what is no STATE.
        """
        host = arrival.topic.removeprefix(state_topic(""))
        online, time_ms = read_state(arrival.payload)
        if host in self._states and time_ms < self._states[host][1]:
            return None
        self._states[host] = (online, time_ms)
        return host, online

    @property
    def all_offline(self) -> list[str]:
        """The hosts, where some are known and none of them is online; else nothing."""
        online = any(online for online, _ in self._states.values())
        return [] if online else sorted(self._states)

    def is_online(self, host: str) -> bool | None:
        """None: nothing was heard of it."""
        return self._states[host][0] if host in self._states else None
