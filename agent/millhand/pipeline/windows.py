"""Windows: the part of an asset's recent past that one model looks at.

Rules, which docs/pipeline.md states for people:

- A step is all readings of one source time. A step closes when the newest source time lies `lateness_s` behind it;
  without lateness at the end of the batch that brought it. A closed step never changes.
- Readings older than the newest closed step are late: dropped and counted. The same name at the same time again is a
  duplicate: the first finite value wins.
- Source time that goes back by more than CLOCK_RESET_S (and the lateness) is a reset of the asset's clock: the window
  begins anew. A hole longer than `max_gap_s` does the same.
- An unsynced source is placed on the node's monotonic clock of one boot; a new boot begins the window anew. The wall
  clock is never used.
- BAD and STALE values, non-finite ones and those outside the asset's limits are NaN.
- With waveforms, a window is due once for each complete fresh set of GOOD snapshots and ends with the newest of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.records import AssetState, Batch, Clock, Quality, Reading, Waveform
from millhand.serving.manifest import WindowSpec

CLOCK_RESET_S = 5.0
FIRST_CAPACITY = 64


@dataclass(frozen=True, slots=True)
class Window:
    """What a feature extractor sees.

    times_ns: [n] int64, source time of each step, rising.
    signals: name -> [n] float64; NaN where a step has no GOOD value.
    waveforms: the newest GOOD snapshot of each name inside the window.
    complete: False while the asset's history is shorter than the window's length (but at least `min_length`).
    """

    asset: str
    start_ns: int
    end_ns: int
    times_ns: NDArray[np.int64]
    signals: Mapping[str, NDArray[np.float64]]
    waveforms: Mapping[str, Waveform] = field(default_factory=dict)
    state: AssetState = AssetState.UNKNOWN
    complete: bool = True
    context: Mapping[str, Any] = field(default_factory=dict)
    """Owner's constants for this asset from `[assets.context]`: bearing geometry, rated speed, ..."""


class WindowCounters(msgspec.Struct):
    """What was left out of windows, and why."""

    late: int = 0
    duplicates: int = 0
    implausible: int = 0
    gaps: int = 0
    clock_resets: int = 0


class Snapshot(msgspec.Struct, array_like=True):
    """A builder's whole state between two batches."""

    times_ns: bytes
    values: bytes
    open_steps: dict[int, list[float]]
    newest_ns: int | None
    steps_since: float
    last_end_ns: int | None
    state: str
    boot_id: str
    fresh: dict[str, Waveform]
    used_ns: dict[str, int]
    counters: WindowCounters


class WindowBuilder:
    """Turns the batches of one asset into the windows of one model."""

    def __init__(
        self,
        asset: str,
        spec: WindowSpec,
        context: Mapping[str, Any] | None = None,
        limits: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self._asset = asset
        self._spec = spec
        self._context = dict(context or {})
        self._limits = dict(limits or {})
        self._rows = {name: row for row, name in enumerate(spec.signals)}
        self._wanted_waveforms = frozenset(spec.waveforms)
        self._lateness_ns = int(spec.lateness_s * 1e9)
        self._reset_ns = self._lateness_ns + int(CLOCK_RESET_S * 1e9)
        self._max_gap_ns = spec.max_gap_s * 1e9
        self._past = _Past(len(spec.signals))
        self._open: dict[int, list[float]] = {}
        self._newest_ns: int | None = None
        self._steps_since = 0.0
        self._last_end_ns: int | None = None
        self._state = AssetState.UNKNOWN
        self._boot_id = ""
        self._fresh: dict[str, Waveform] = {}
        self._used_ns: dict[str, int] = {}
        self.counters = WindowCounters()

    def add(self, batch: Batch) -> list[Window]:
        """Take a batch and return the windows that it closes, oldest first."""
        if batch.state is not None:
            self._state = batch.state
        for reading in batch.readings:
            row = self._rows.get(reading.name)
            if row is not None:
                self._place(reading, row)
        for waveform in batch.waveforms:
            if waveform.name in self._wanted_waveforms and waveform.quality is Quality.GOOD:
                self._fresh[waveform.name] = waveform
        windows = self._close_steps()
        if self._wanted_waveforms:
            window = self._waveform_window()
            return [] if window is None else [window]
        return windows

    # ---- readings into steps ----------------------------------------------------------------------------------------

    def _place(self, reading: Reading, row: int) -> None:
        time_ns = self._time_of(reading.clock)
        if self._newest_ns is not None and time_ns < self._newest_ns - self._reset_ns:
            self.counters.clock_resets += 1
            self._begin_anew()
        last_ns = self._past.last_ns
        if last_ns is not None and time_ns <= last_ns:
            if time_ns == last_ns:
                self.counters.duplicates += 1
            else:
                self.counters.late += 1
            return
        value = self._value_of(reading)
        step = self._open.get(time_ns)
        if step is None:
            step = self._open[time_ns] = [float("nan")] * len(self._rows)
            step.append(0.0)  # a bit for each signal that was seen, to tell a duplicate from a first value
        seen = int(step[-1])
        if seen & (1 << row):
            self.counters.duplicates += 1
            if not math.isnan(step[row]):
                return
        step[row] = value
        step[-1] = float(seen | (1 << row))
        if self._newest_ns is None or time_ns > self._newest_ns:
            self._newest_ns = time_ns

    def _time_of(self, clock: Clock) -> int:
        if clock.synced:
            return clock.source_ns
        if clock.boot_id != self._boot_id:
            if self._boot_id:
                self.counters.gaps += 1
                self._begin_anew()
            self._boot_id = clock.boot_id
        return clock.monotonic_ns

    def _value_of(self, reading: Reading) -> float:
        value = reading.value
        if reading.quality is not Quality.GOOD or value is None or isinstance(value, str):
            return float("nan")
        number = float(value)
        low, high = self._limits.get(reading.name, (float("-inf"), float("inf")))
        if math.isnan(number):
            return number
        if math.isinf(number) or not low <= number <= high:
            self.counters.implausible += 1
            return float("nan")
        return number

    def _begin_anew(self) -> None:
        self._past.clear()
        self._open.clear()
        self._newest_ns = None
        self._steps_since = 0.0
        self._last_end_ns = None
        self._fresh.clear()
        self._used_ns.clear()

    # ---- steps into windows -----------------------------------------------------------------------------------------

    def _close_steps(self) -> list[Window]:
        if not self._open or self._newest_ns is None:
            return []
        limit_ns = self._newest_ns - self._lateness_ns
        windows = []
        for time_ns in sorted(time_ns for time_ns in self._open if time_ns <= limit_ns):
            step = self._open.pop(time_ns)
            last_ns = self._past.last_ns
            if last_ns is not None and time_ns - last_ns > self._max_gap_ns:
                self.counters.gaps += 1
                self._past.clear()
                self._steps_since, self._last_end_ns = 0.0, None
            self._past.append(time_ns, step[:-1])
            self._trim()
            if not self._wanted_waveforms and self._due(time_ns):
                windows.append(self._window(time_ns))
        return windows

    def _trim(self) -> None:
        if self._spec.by == "count":
            self._past.keep_last(int(self._spec.length))
        elif self._past.last_ns is not None:
            self._past.keep_since(self._past.last_ns - int(self._spec.length * 1e9))

    def _long_enough(self) -> bool:
        """Whether the past has `min_length`."""
        wanted = self._spec.min_length or self._spec.length
        if self._spec.by == "count":
            return len(self._past) >= wanted
        return self._past.span_ns >= int(wanted * 1e9) or (wanted == 0 and len(self._past) > 0)

    def _due(self, time_ns: int) -> bool:
        """Whether a window ends at this step: `step` steps or seconds after the last one, if the past suffices."""
        if self._spec.by == "count":
            self._steps_since += 1
            if self._last_end_ns is not None and self._steps_since < self._spec.step:
                return False
        elif self._last_end_ns is not None and time_ns - self._last_end_ns < int(self._spec.step * 1e9):
            return False
        return self._long_enough()

    def _waveform_window(self) -> Window | None:
        if self._fresh.keys() != self._wanted_waveforms or not self._long_enough():
            return None
        times = {name: self._time_of(waveform.clock) for name, waveform in self._fresh.items()}
        if any(times[name] <= self._used_ns.get(name, times[name] - 1) for name in times):
            return None
        self._used_ns = times
        window = self._window(max(times.values()), dict(self._fresh))
        self._fresh.clear()
        return window

    def _window(self, end_ns: int, waveforms: Mapping[str, Waveform] | None = None) -> Window:
        self._steps_since, self._last_end_ns = 0.0, end_ns
        times_ns, values = self._past.copy()
        full = self._spec.length if self._spec.by == "count" else int(self._spec.length * 1e9)
        length = len(times_ns) if self._spec.by == "count" else self._past.span_ns
        return Window(
            asset=self._asset,
            start_ns=int(times_ns[0]) if len(times_ns) else end_ns,
            end_ns=end_ns,
            times_ns=times_ns,
            signals={name: values[row] for name, row in self._rows.items()},
            waveforms=waveforms or {},
            state=self._state,
            complete=length >= full,
            context=self._context,
        )

    # ---- state ------------------------------------------------------------------------------------------------------

    def dump(self) -> Snapshot:
        """The whole state; a builder that loads it goes on exactly as this one would."""
        times_ns, values = self._past.copy()
        return Snapshot(
            times_ns.tobytes(),
            values.tobytes(),
            dict(self._open),
            self._newest_ns,
            self._steps_since,
            self._last_end_ns,
            self._state.value,
            self._boot_id,
            dict(self._fresh),
            dict(self._used_ns),
            self.counters,
        )

    def load(self, snapshot: Snapshot) -> None:
        """Go on from `snapshot`. One of other signals (the model changed) is ignored: the window begins anew."""
        times_ns = np.frombuffer(snapshot.times_ns, np.int64)
        values = np.frombuffer(snapshot.values, np.float64)
        if len(values) != len(times_ns) * len(self._rows):
            return
        self._past.fill(times_ns, values.reshape(len(self._rows), len(times_ns)))
        self._open = {int(time_ns): list(step) for time_ns, step in snapshot.open_steps.items()}
        self._newest_ns = snapshot.newest_ns
        self._steps_since = snapshot.steps_since
        self._last_end_ns = snapshot.last_end_ns
        self._state = AssetState(snapshot.state)
        self._boot_id = snapshot.boot_id
        self._fresh = dict(snapshot.fresh)
        self._used_ns = dict(snapshot.used_ns)
        self.counters = snapshot.counters


class _Past:
    """Closed steps in two arrays that slide: appending is cheap, and a window is one copy."""

    def __init__(self, signals: int) -> None:
        self._times_ns = np.empty(FIRST_CAPACITY, np.int64)
        self._values = np.empty((signals, FIRST_CAPACITY), np.float64)
        self._start = self._end = 0

    def __len__(self) -> int:
        return self._end - self._start

    @property
    def last_ns(self) -> int | None:
        return int(self._times_ns[self._end - 1]) if len(self) else None

    @property
    def span_ns(self) -> int:
        return int(self._times_ns[self._end - 1] - self._times_ns[self._start]) if len(self) else 0

    def append(self, time_ns: int, values: list[float]) -> None:
        if self._end == len(self._times_ns):
            self._make_room()
        self._times_ns[self._end] = time_ns
        self._values[:, self._end] = values
        self._end += 1

    def keep_last(self, steps: int) -> None:
        self._start = max(self._start, self._end - steps)

    def keep_since(self, time_ns: int) -> None:
        held = self._times_ns[self._start : self._end]
        self._start += int(np.searchsorted(held, time_ns))

    def clear(self) -> None:
        self._start = self._end = 0

    def copy(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return self._times_ns[self._start : self._end].copy(), self._values[:, self._start : self._end].copy()

    def fill(self, times_ns: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        capacity = max(FIRST_CAPACITY, 2 * len(times_ns))
        self._times_ns = np.empty(capacity, np.int64)
        self._values = np.empty((len(values), capacity), np.float64)
        self._start, self._end = 0, len(times_ns)
        self._times_ns[: self._end], self._values[:, : self._end] = times_ns, values

    def _make_room(self) -> None:
        """Slide to the front; grow only where more than half of the room is in use."""
        times_ns, values = self.copy()
        self.fill(times_ns, values)
