"""Writes a work order from an alert and a table of what is known about its kind.

Every number that is filled into the texts stands in the order's evidence; nothing is invented. The order's id is
derived from the alert's, so that one alert has one order however often it is written.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    """Text; {asset} and {message}, the alert's own text, are filled in."""
    likely_cause: str
    action: tuple[str, ...] = Field(min_length=1)
    facts: tuple[str, ...] = ()
    """Facts that the symptom quotes, if the alert's evidence has them: names, or patterns with `*`."""
    parts: tuple[str, ...] = ()
    """Parts that it may need, in words; part numbers stand in the plant's own parts lists."""
    tools: tuple[str, ...] = ()
    skill: str = ""
    """The trade that it needs."""
    minutes: int = Field(default=0, ge=0)
    """Roughly how long the first visit takes; 0 where nobody can say."""


class Knowledge(StrictTable):
    kinds: dict[str, Kind]


Language = Literal["en", "zh"]


class Phrases(NamedTuple):
    """The fixed words of one language around what the table and the evidence bring."""

    measured: str
    join: str
    once: str
    often: str


PHRASES: dict[str, Phrases] = {
    "en": Phrases(
        " Measured: {}.",
        ", ",
        "This machine was reported for {kind} once before: ask what was done then, and look for the root cause.",
        "This machine was reported for {kind} {times} times before: ask what was done then, and look for the"
        " root cause.",
    ),
    "zh": Phrases(
        "实测：{}。",
        "，",
        "该设备此前曾报告过同类故障（{kind}）：询问当时的处理，并查找根本原因。",
        "该设备此前曾 {times} 次报告同类故障（{kind}）：询问当时的处理，并查找根本原因。",
    ),
}


def read_knowledge(own: Path | None = None, language: Language = "en") -> dict[str, Kind]:
    """The shipped table of a language, overlaid by the owner's file. Raises ConfigError naming file, key and value."""
    shipped = Path(__file__).with_name("knowledge.toml" if language == "en" else f"knowledge.{language}.toml")
    kinds = dict(validate(Knowledge, read_toml(shipped), f"knowledge '{shipped.name}'").kinds)
    if own is not None:
        kinds.update(validate(Knowledge, read_toml(own), f"knowledge '{own}'").kinds)
    return kinds


class DeterministicWriter:
    """The same alert and history always give the same order."""

    name = "deterministic"

    def __init__(self, kinds: Mapping[str, Kind], language: Language = "en") -> None:
        self._kinds = kinds
        self._language = language
        self._phrases = PHRASES[language]

    def write(self, alert: Alert, history: Sequence[Alert]) -> WorkOrder:
        kind = self._kinds.get(alert.kind) or self._kinds[GENERAL]
        repeats = sum(earlier.kind == alert.kind for earlier in history)
        quoted = [name for name, _ in _facts(kind, alert)]
        return WorkOrder(
            id=str(uuid.uuid5(uuid.UUID(alert.id), "order")),
            alert_id=alert.id,
            asset=alert.asset,
            symptom=self._symptom(kind, alert),
            likely_cause=kind.likely_cause,
            action=(*kind.action, *self._repeat_step(alert, repeats)),
            priority=_priority(alert, repeats),
            created_ns=alert.raised_ns,
            evidence={**alert.evidence, "earlier_alerts": repeats},
            writer=self.name,
            parts=kind.parts,
            tools=kind.tools,
            skill=kind.skill,
            minutes=kind.minutes,
            evidence_ids=tuple(f"facts.{name}" for name in quoted),
            language=self._language,
        )

    def _symptom(self, kind: Kind, alert: Alert) -> str:
        text = kind.symptom.replace("{asset}", alert.asset).replace("{message}", alert.message)
        quoted = [_quote(name, value) for name, value in _facts(kind, alert)]
        return text + self._phrases.measured.format(self._phrases.join.join(quoted)) if quoted else text

    def _repeat_step(self, alert: Alert, repeats: int) -> list[str]:
        if not repeats:
            return []
        pattern = self._phrases.once if repeats == 1 else self._phrases.often
        return [pattern.format(kind=alert.kind.replace("_", " "), times=repeats)]


def _facts(kind: Kind, alert: Alert) -> Iterator[tuple[str, float]]:
    """The facts to quote, in the table's order; a fact that is not a finite number is left out."""
    facts: Mapping[str, Any] = alert.evidence.get("facts", {})
    told = set()
    for pattern in kind.facts:
        for name, value in facts.items():
            if fnmatchcase(name, pattern) and name not in told and isinstance(value, float | int):
                told.add(name)
                if math.isfinite(value):
                    yield name, value


def _priority(alert: Alert, repeats: int) -> int:
    """1 (now) to 4 (next planned stop)."""
    return max(1, BASE_PRIORITY[alert.severity] - (repeats >= REPEATS_THAT_RAISE))


# The unit is the last part of a fact's name; see millhand.hookspecs.Features.evidence.
UNITS = {"mm_s": "mm/s", "g": "g", "hz": "Hz", "cel": "Cel", "rpm": "rpm", "sigma": "sigma", "cycles": "cycles"}
UNITS |= {"bar": "bar", "a": "A", "percent": "%", "l_min": "l/min"}


def _quote(name: str, value: float) -> str:
    """`velocity_rms_mm_s`, 4.237 -> "velocity rms 4.24 mm/s"."""
    number = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    unit = next((unit for unit in UNITS if name.endswith("_" + unit)), None)
    if unit is None:
        return f"{name.replace('_', ' ')} {number}"
    return f"{name.removesuffix('_' + unit).replace('_', ' ')} {number} {UNITS[unit]}"
