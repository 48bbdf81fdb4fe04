"""Counts what was lost and doubled: set differences between the rig's log and the hub's database."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RigLog:
    """What the rig says of itself after the run: its ground truth, and each answer that it served."""

    truth: dict[str, Any]
    served: dict[int, int]
    """Sequence number -> the rig's time of that answer, in milliseconds."""

    @property
    def onset_ms(self) -> int | None:
        onset: int | None = self.truth["onset_ms"]
        return onset

    @property
    def failure_ms(self) -> int | None:
        failure: int | None = self.truth["failure_ms"]
        return failure


def read_rig_log(path: Path) -> RigLog:
    """Read the JSON lines that `python -m millhand_plugins.rig --log` wrote."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    served = {line["sequence"]: line["time_ms"] for line in lines if line["kind"] == "served"}
    return RigLog(lines[0], served)


@dataclass(frozen=True)
class Tally:
    """Answers served by the rig, and what the hub has of them."""

    produced: int
    stored: int
    lost: int
    duplicates: int
    strange: int
    """Sequence numbers at the hub that the rig never served: always 0 unless something invents readings."""


def count(served: Iterable[int], arrived: Iterable[int]) -> Tally:
    """Compare the sequence numbers that were served with those of the hub's `sequence` readings."""
    produced, times = set(served), Counter(arrived)
    stored = set(times)
    return Tally(
        produced=len(produced),
        stored=len(stored & produced),
        lost=len(produced - stored),
        duplicates=sum(number - 1 for number in times.values()),
        strange=len(stored - produced),
    )


class RigTime:
    """Turns source times of readings into the rig's own time, by the answers that both sides know."""

    def __init__(self, rig: RigLog, arrived: Iterable[tuple[int, int]]) -> None:
        """`arrived`: (source time in ns, sequence) of the stored `sequence` readings."""
        pairs = sorted((source_ns, rig.served[number]) for source_ns, number in arrived if number in rig.served)
        self._source_ns = [source_ns for source_ns, _ in pairs]
        self._time_ms = [time_ms for _, time_ms in pairs]

    def of(self, source_ns: int) -> float:
        """Rig milliseconds at `source_ns`, from the answer just before it. Raises ValueError without any answer."""
        if not self._source_ns:
            raise ValueError("the hub holds no answer of the rig")
        index = max(bisect_right(self._source_ns, source_ns) - 1, 0)
        return self._time_ms[index] + (source_ns - self._source_ns[index]) / 1e6
