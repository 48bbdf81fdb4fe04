"""What flows through the node: readings and waveforms in, predictions, alerts and work orders out.

Every record is an immutable msgspec Struct, so it has one compact binary form (MessagePack) for the store and the
worker protocol, and one JSON form for the CLI, the control socket and the sinks.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray


class Quality(IntEnum):
    """OPC UA / Sparkplug quality codes: only GOOD values reach a model."""

    GOOD = 192
    STALE = 500
    BAD = 0


class AssetState(StrEnum):
    """What a machine is doing; rules say in which states they speak."""

    RUNNING = "running"
    IDLE = "idle"
    SETUP = "setup"
    SERVICE = "service"
    UNKNOWN = "unknown"


class AlertState(StrEnum):
    """`open` until a person acknowledges it (`acked`) or its rule clears it (`cleared`)."""

    OPEN = "open"
    ACKED = "acked"
    CLEARED = "cleared"


class Severity(StrEnum):
    """How soon a person must act: `info` never, `warning` at the next stop, `critical` now."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class Clock(msgspec.Struct, frozen=True, array_like=True):
    """When a value was taken and received.

    source_ns: the asset's own time, Unix nanoseconds; what windows and rules run on when `synced` is true.
    receive_ns: the node's wall clock at receipt, Unix nanoseconds; for people and Sparkplug, never for arithmetic.
    monotonic_ns: the node's CLOCK_BOOTTIME at receipt, comparable only within one `boot_id`.
    """

    source_ns: int
    receive_ns: int
    monotonic_ns: int
    boot_id: str = ""
    synced: bool = True


class Reading(msgspec.Struct, frozen=True, array_like=True):
    """One scalar from one asset. `unit` is UCUM-like text ("Cel", "mm/s", "1" for none)."""

    name: str
    value: float | int | bool | str | None
    unit: str
    clock: Clock
    quality: Quality = Quality.GOOD


class Waveform(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot of samples at a fixed rate. `samples` is little-endian float32, 1-D; see `array`.

    Waveforms stay on the node (a ring with a byte cap); only their features travel.
    """

    name: str
    samples: bytes
    sample_rate_hz: float
    unit: str
    clock: Clock
    quality: Quality = Quality.GOOD

    @property
    def array(self) -> NDArray[np.float32]:
        """The samples as a read-only float32 array of shape [n]."""
        return np.frombuffer(self.samples, dtype="<f4")


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """What an adapter hands over in one step.

    cursor: where to resume after this batch, opaque to everyone but the adapter; None for a live source. It is
    committed together with everything that this batch causes, so that a restart neither repeats nor skips.
    """

    readings: tuple[Reading, ...] = ()
    waveforms: tuple[Waveform, ...] = ()
    cursor: bytes | None = None
    state: AssetState | None = None


class Prediction(msgspec.Struct, frozen=True):
    """What one model says of one window. Unique by (asset, model, window_end_ns).

    values: named outputs, each a plain number: "rul" in `rul_unit`, or one probability per fault kind.
    kind: the class a classifier chose, else "".
    confidence: 0..1.
    evidence: measured facts from the window behind the prediction, e.g. {"velocity_rms_mm_s": 4.2}.
    """

    asset: str
    model: str
    version: int
    window_start_ns: int
    window_end_ns: int
    values: dict[str, float]
    kind: str = ""
    confidence: float = 1.0
    state: AssetState = AssetState.UNKNOWN
    evidence: dict[str, float] = {}
    latency_ms: float = 0.0


class Alert(msgspec.Struct, frozen=True):
    """A rule that fired. `id` is derived from (asset, rule, raised_ns), so a replay raises the same alert."""

    id: str
    asset: str
    model: str
    rule: str
    kind: str
    severity: Severity
    message: str
    raised_ns: int
    state: AlertState = AlertState.OPEN
    changed_ns: int = 0
    acked_by: str = ""
    evidence: dict[str, Any] = {}


TECHNICIAN = "technician"
"""How the `writer` of a version begins that a person wrote."""


class Citation(msgspec.Struct, frozen=True):
    """A passage that an order rests on: its id in the knowledge base, and its place for people."""

    id: str
    place: str


class Struck(msgspec.Struct, frozen=True):
    """Something that validation took out of an order.

    field: where it stood: `symptom`, `action[2]` (from 0, as the reviser wrote them). text: what stood there.
    """

    field: str
    text: str
    why: str


class WorkOrder(msgspec.Struct, frozen=True):
    """What a technician is asked to do. `priority` 1 (now) to 4 (next planned stop).

    An order has versions with the same `id`; `revision` counts them from 1, the deterministic writer's draft.
    minutes: how long the work takes, 0 where that is not known. skill: the trade it needs. evidence_ids: the facts that
    it rests on, by their ids (see `evidence_facts`). struck: what validation took out of this version. language: `en`
    or `zh`. revised_ns: when this version was written, Unix nanoseconds; 0 for a draft. writer: who wrote it: a
    writer's or reviser's name, or `technician <name>`.
    """

    id: str
    alert_id: str
    asset: str
    symptom: str
    likely_cause: str
    action: tuple[str, ...]
    priority: int
    created_ns: int
    evidence: dict[str, Any] = {}
    writer: str = ""
    state: str = "open"
    parts: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    skill: str = ""
    minutes: int = 0
    evidence_ids: tuple[str, ...] = ()
    citations: tuple[Citation, ...] = ()
    struck: tuple[Struck, ...] = ()
    language: str = "en"
    revision: int = 1
    revised_ns: int = 0


def evidence_facts(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Fact id -> value. A fact's id is its path: `measured`, `facts.velocity_rms_mm_s`; it says what the fact is, and
    is the same in every version of an order.
    """
    facts: dict[str, Any] = {}
    for name, value in evidence.items():
        if isinstance(value, Mapping):
            facts |= {f"{name}.{inner}": found for inner, found in evidence_facts(value).items()}
        else:
            facts[str(name)] = value
    return facts
