"""Windows of simulated lives, as the pipeline cuts them, at any places of a life: for training and tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from millhand.pipeline.windows import Window
from millhand.records import Clock, Waveform
from millhand_plugins.rig.operation import END_MS, GRID_MS
from millhand_plugins.rig.registers import CHANNELS, STATES
from millhand_plugins.rig.simulator import SNAPSHOT_MS, Simulator
from millhand_plugins.rig.vibration import SAMPLE_RATE_HZ

STEP_MS = 50
STEPS = 21


@dataclass(frozen=True, slots=True)
class Moment:
    """One window of a life and the truth about it."""

    time_ms: int
    severity: float
    window: Window


def moments(simulator: Simulator, counters: Iterable[int] = range(1, END_MS // SNAPSHOT_MS + 1)) -> Iterator[Moment]:
    """The windows that end with the given snapshots; those that the transmitter could not take are left out."""
    for counter in counters:
        snapshot = simulator.snapshot(counter)
        if np.isnan(snapshot.g_per_count):
            continue
        time_ms = snapshot.time_ms
        times_ms = np.arange(max(time_ms - STEP_MS * (STEPS - 1), time_ms % STEP_MS), time_ms + 1, STEP_MS)
        steps = [simulator.process(int(step_ms)) for step_ms in times_ms]
        clock = Clock(time_ms * 1_000_000, 0, 0)
        samples = (snapshot.counts * np.float32(snapshot.g_per_count)).astype("<f4")
        waveforms = {
            name: Waveform(name, row.tobytes(), SAMPLE_RATE_HZ, "g", clock)
            for name, row in zip(CHANNELS, samples, strict=True)
        }
        window = Window(
            asset=f"rig-{simulator.seed}",
            start_ns=int(times_ms[0]) * 1_000_000,
            end_ns=time_ms * 1_000_000,
            times_ns=times_ms.astype(np.int64) * 1_000_000,
            signals={"speed": np.asarray([float(step["speed"]) for step in steps])},
            waveforms=waveforms,
            state=STATES[steps[-1]["state"]],
        )
        yield Moment(time_ms, float(simulator.operation.severity[time_ms // GRID_MS]), window)
