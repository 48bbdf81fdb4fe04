"""The rig: a motor, a bearing and a pump on one skid, from healthy to failure, any seed, any fault.

Everything is a function of (seed, fault, rig time): the same arguments give the same life, whoever polls it and when.
The rig's clock is in milliseconds from 0 to END_MS; scale (rig seconds a wall second) is the business of whoever
drives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand_plugins.rig.asset import LIFE_MS, SNAPSHOT, Fault, draw_traits, random_stream
from millhand_plugins.rig.bearing import BearingGeometry
from millhand_plugins.rig.operation import END_MS, GRID_MS, measure, operate
from millhand_plugins.rig.registers import PROCESS, encode
from millhand_plugins.rig.vibration import SAMPLES, Vibration

SNAPSHOT_MS = 500
G_PER_COUNT = float(np.float32(32.0 / 32_768))
"""The transmitter's range is +-32 g."""

DROP_RATE = 0.025
"""Share of snapshots that the transmitter could not take."""
STUCK_RATE = 0.025
"""Share of snapshots that hold the previous one's samples again."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The SAMPLES before `time_ms`, int16 counts [2, SAMPLES], radial and axial, taken at SAMPLE_RATE_HZ.

    g_per_count is NaN where the transmitter could not take the snapshot (the counts are 0 then).
    """

    counter: int
    time_ms: int
    counts: NDArray[np.int16]
    g_per_count: float


class Simulator:
    """One life of one rig."""

    def __init__(self, seed: int, fault: Fault) -> None:
        self.seed = seed
        self.fault = fault
        self.traits = draw_traits(seed, fault)
        self.geometry = BearingGeometry()
        self.operation = operate(self.traits)
        self._vibration = Vibration(self.traits, self.operation, self.geometry)
        measured = measure(self.traits, self.operation)
        self._raw = {field.name: encode(field, getattr(measured, field.source)) for field in PROCESS}
        # Torn reads and stuck buffers ask for the same snapshot again and again.
        self._counts = lru_cache(maxsize=4)(self._take)

    def process(self, time_ms: int) -> dict[str, int]:
        """The raw register values at `time_ms`, by reading name, and `state`."""
        index = min(max(time_ms, 0), END_MS) // GRID_MS
        values = {name: int(raw[index]) for name, raw in self._raw.items()}
        values["state"] = int(self.operation.state[index])
        return values

    def counter(self, time_ms: int) -> int:
        """The number of the newest snapshot at `time_ms`; number n is complete at n * SNAPSHOT_MS."""
        return min(max(time_ms, 0), END_MS) // SNAPSHOT_MS

    def snapshot(self, counter: int) -> Snapshot:
        """Make snapshot `counter`; always the same for the same number."""
        time_ms = counter * SNAPSHOT_MS
        luck = self._luck(counter)
        if luck < DROP_RATE:
            return Snapshot(counter, time_ms, np.zeros((2, SAMPLES), np.int16), float("nan"))
        source = counter
        while source > 0 and DROP_RATE <= self._luck(source) < DROP_RATE + STUCK_RATE:
            source -= 1
        return Snapshot(counter, time_ms, self._counts(source), G_PER_COUNT)

    def truth(self) -> dict[str, Any]:
        """What only the rig's log may say: fault, onset and failure on the rig's clock."""
        faulty = self.fault != "none"
        return {
            "seed": self.seed,
            "fault": self.fault,
            "onset_ms": self.traits.onset_ms if faulty else None,
            "failure_ms": LIFE_MS if faulty else None,
            "life_ms": LIFE_MS,
            "end_ms": END_MS,
            "snapshot_ms": SNAPSHOT_MS,
        }

    def _luck(self, counter: int) -> float:
        return float(random_stream(self.seed, SNAPSHOT, counter, 1).random())

    def _take(self, counter: int) -> NDArray[np.int16]:
        acceleration = self._vibration.acceleration_g(counter * SNAPSHOT_MS, counter)
        counts = np.clip(np.rint(acceleration / G_PER_COUNT), -32_768, 32_767).astype(np.int16)
        counts.flags.writeable = False
        return counts
