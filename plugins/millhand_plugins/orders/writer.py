"""Writes a work order from an alert and a table of what is known about its kind.

Every number in the text comes from the alert's evidence; nothing is invented. The order's id is derived from the
alert's, so that one alert has one order however often it is written.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from millhand.records import Alert, Severity, WorkOrder
from millhand.validation import StrictTable, read_toml, validate

GENERAL = "general"
REPEATS_THAT_RAISE = 2
"""So many earlier alerts of the same kind in the history raise the priority by one."""
BASE_PRIORITY = {Severity.CRITICAL: 1, Severity.WARNING: 2, Severity.INFO: 4}


class Kind(StrictTable):
    """What a plant knows about one kind of fault."""

    symptom: str
    """Text; {asset} and the names of the alert's facts in braces are filled in."""
    likely_cause: str
    action: tuple[str, ...] = Field(min_length=1)
    facts: tuple[str, ...] = ()
    """Facts that the symptom quotes, by name, if the alert's evidence has them."""


class Knowledge(StrictTable):
    kinds: dict[str, Kind]


def read_knowledge(own: Path | None = None) -> dict[str, Kind]:
    """The shipped table, overlaid by the owner's file. Raises ConfigError naming file, key and value."""
    shipped = Path(__file__).with_name("knowledge.toml")
    kinds = dict(validate(Knowledge, read_toml(shipped), f"knowledge '{shipped.name}'").kinds)
    if own is not None:
        kinds.update(validate(Knowledge, read_toml(own), f"knowledge '{own}'").kinds)
    return kinds


class DeterministicWriter:
    """The same alert and history always give the same order."""

    name = "deterministic"

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds

    def write(self, alert: Alert, history: Sequence[Alert]) -> WorkOrder:
        kind = self._kinds.get(alert.kind) or self._kinds[GENERAL]
        repeats = sum(earlier.kind == alert.kind for earlier in history)
        return WorkOrder(
            id=str(uuid.uuid5(uuid.UUID(alert.id), "order")),
            alert_id=alert.id,
            asset=alert.asset,
            symptom=_symptom(kind, alert),
            likely_cause=kind.likely_cause,
            action=(*kind.action, *_repeat_step(alert, repeats)),
            priority=_priority(alert, repeats),
            created_ns=alert.raised_ns,
            evidence=dict(alert.evidence),
            writer=self.name,
        )


def _symptom(kind: Kind, alert: Alert) -> str:
    facts: Mapping[str, Any] = alert.evidence.get("facts", {})
    quoted = [f"{_words(name)} {_number(facts[name])}{_unit(name)}" for name in kind.facts if name in facts]
    text = kind.symptom.replace("{asset}", alert.asset).replace("{message}", alert.message)
    return f"{text} Measured: {', '.join(quoted)}." if quoted else text


def _priority(alert: Alert, repeats: int) -> int:
    """1 (now) to 4 (next planned stop)."""
    return max(1, BASE_PRIORITY[alert.severity] - (repeats >= REPEATS_THAT_RAISE))


def _repeat_step(alert: Alert, repeats: int) -> list[str]:
    if not repeats:
        return []
    times = "once" if repeats == 1 else f"{repeats} times"
    name = alert.kind.replace("_", " ")
    return [
        f"This machine was reported for {name} {times} before: ask what was done then, and look for the root cause."
    ]


# The unit is the last part of a fact's name; see millhand.hookspecs.Features.evidence.
UNITS = {"mm_s": " mm/s", "g": " g", "hz": " Hz", "cel": " Cel", "rpm": " rpm", "sigma": " sigma", "cycles": " cycles"}


def _unit(name: str) -> str:
    return next((text for ending, text in UNITS.items() if name.endswith("_" + ending)), "")


def _words(name: str) -> str:
    ending = next((ending for ending in UNITS if name.endswith("_" + ending)), "")
    return name.removesuffix("_" + ending).replace("_", " ") if ending else name.replace("_", " ")


def _number(value: float) -> str:
    return f"{value:.3g}"
