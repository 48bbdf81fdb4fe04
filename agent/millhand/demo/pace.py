"""How fast the rig may live on this machine: a snapshot of its vibration must be read before the next one comes."""

from __future__ import annotations

import os
from dataclasses import dataclass

SLOWEST = 0.1
"""The slowest pace that the demo takes by itself, where ten processes want each core: a life takes six minutes."""
SLOWEST_ASKED = 0.02
"""The slowest that it takes when told, for a machine that is slow, such as an emulated one: half an hour a life."""


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


def slower(scale: float) -> float | None:
    """A pace to try where `scale` was too fast; None where there is none."""
    return max(SLOWEST_ASKED, round(scale / 4, 2)) if scale > SLOWEST_ASKED else None


def slowed(duration: float, scale: float) -> float:
    """A period or deadline of a rig that lives at its own pace, for one that lives at `scale`, in the same unit.

    The whole demo goes slower with its rig: how often the agent asks, how long it waits, how long it is waited for. A
    rig that lives faster shortens nothing.
    """
    return duration / min(scale, 1.0)
