"""Sparkplug B topics and ids: `spBv1.0/<group>/<type>/<node>[/<device>]`, and `spBv1.0/STATE/<host>`."""

from __future__ import annotations

from dataclasses import dataclass

from millhand.errors import TelemetryError

NAMESPACE = "spBv1.0"
NODE_TYPES = ("NBIRTH", "NDEATH", "NDATA", "NCMD")
DEVICE_TYPES = ("DBIRTH", "DDEATH", "DDATA", "DCMD")


@dataclass(frozen=True, slots=True)
class Topic:
    """One parsed topic; `device` is empty for node messages."""

    group: str
    kind: str
    node: str
    device: str = ""

    def __str__(self) -> str:
        base = f"{NAMESPACE}/{self.group}/{self.kind}/{self.node}"
        return f"{base}/{self.device}" if self.device else base


def parse(text: str) -> Topic:
    """Raises TelemetryError for what is no Sparkplug message topic."""
    parts = text.split("/")
    if parts[0] == NAMESPACE and all(parts):
        if len(parts) == 4 and parts[2] in NODE_TYPES:
            return Topic(parts[1], parts[2], parts[3])
        if len(parts) == 5 and parts[2] in DEVICE_TYPES:
            return Topic(parts[1], parts[2], parts[3], parts[4])
    raise TelemetryError(f"topic '{text[:80]}' is no Sparkplug B topic", retriable=False)


def state_topic(host: str) -> str:
    """Where a host application says whether it is online."""
    return f"{NAMESPACE}/STATE/{host}"
