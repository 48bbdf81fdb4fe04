"""How fast the rig may live on this machine: a snapshot of its vibration must be read before the next one comes."""

from __future__ import annotations

import os
from dataclasses import dataclass

SLOWEST = 0.25
"""At this pace a life takes two and a half minutes."""


@dataclass(frozen=True)
class Load:
    """What the machine does beside the demo: the mean number of runnable processes of the last minute."""

    processes: float = 0.0
    cores: int = 1

    @property
    def busy(self) -> bool:
        """Whether more wants to run than can."""
        return self.processes > self.cores

    def __str__(self) -> str:
        return f"load {self.processes:.1f} on {self.cores} cores"


def machine_load() -> Load:
    """The load now."""
    return Load(os.getloadavg()[0], os.cpu_count() or 1)


def suitable_pace(load: Load) -> float:
    """Rig seconds a second: 1, and on a busy machine as much less as there is less of it for each process."""
    return max(SLOWEST, round(load.cores / load.processes, 2)) if load.busy else 1.0
