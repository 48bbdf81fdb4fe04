"""Windows: the part of an asset's recent past that one model looks at.

Rules, which docs/pipeline.md states for people:

- A step is all readings of one source time. A step closes when the newest source time lies `lateness_s` behind it;
  without lateness at the end of the batch that brought it. A closed step never changes.
- A reading of a closed step's time or older is late: dropped and counted. The same name at the same time again is a
  duplicate, counted too: the first usable value wins.
- Source time that goes back by more than CLOCK_RESET_S beyond the lateness is a reset of the asset's clock: the steps
  before it are judged, then the window begins anew. A hole longer than `max_gap_s` does the same, by time also one
  longer than `length`.
- An unsynced source is placed on the node's monotonic clock of one boot, counted from the wall clock's time at its
  first reading; a new boot, and a source that becomes synced or unsynced, begin the window anew. After that first
  reading the wall clock is never used.
- BAD and STALE values, text, non-finite numbers and those outside the asset's limits are NaN.
- With waveforms, a window is due once for each complete fresh set of GOOD snapshots and ends with the newest of them.
  A snapshot that is not newer than the last one used is old. On the asset's own clock, one that lies nearer to the set
  before the newest than to the newest is unpaired: its partner was never read. Those of a set that is not complete yet
  are part of the state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.pipeline.past import Past
from millhand.records import AssetState, Batch, Clock, Quality, Reading, Waveform
from millhand.serving.manifest import WindowSpec

CLOCK_RESET_S = 5.0


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
    unpaired: int = 0


class Snapshot(msgspec.Struct, array_like=True):
    """A builder's whole state between two batches."""

    names: tuple[str, ...]
    """The signals and waveforms that it is of."""
    times_ns: bytes
    values: bytes
    begin_ns: int | None
    open_steps: dict[int, list[float | None]]
    newest_ns: int | None
    steps_since: int
    last_end_ns: int | None
    state: str
    timeline: str
    zero_ns: int
    fresh: dict[str, tuple[int, Waveform]]
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
        self._lateness_ns = round(spec.lateness_s * 1e9)
        self._reset_ns = self._lateness_ns + round(CLOCK_RESET_S * 1e9)
        self._max_gap_ns = min(spec.max_gap_s, spec.length if spec.by == "time" else math.inf) * 1e9
        self._past = Past(len(spec.signals))
        self._begin_ns: int | None = None
        """When the history that the window may look at began; `length` later it is whole."""
        self._open: dict[int, list[float | None]] = {}
        """Source time -> a value a signal, NaN where it is not usable, None where it has not come."""
        self._newest_ns: int | None = None
        self._steps_since = 0
        self._last_end_ns: int | None = None
        self._state = AssetState.UNKNOWN
        self._timeline = ""
        self._zero_ns = 0
        """What the wall clock said at the zero of an unsynced timeline, when that timeline began."""
        self._fresh: dict[str, tuple[int, Waveform]] = {}
        self._used_ns: dict[str, int] = {}
        self._ready: list[Window] = []
        """Windows that the batch in hand has closed so far."""
        self.counters = WindowCounters()
        self.unseen = {*spec.signals, *spec.waveforms}
        """Names that never came since this builder was made: nobody brings them, or not yet."""

    def add(self, batch: Batch) -> list[Window]:
        """Take a batch and return the windows that it closes, oldest first."""
        if batch.state is not None:
            self._state = batch.state
        for reading in batch.readings:
            row = self._rows.get(reading.name)
            if row is not None:
                self.unseen.discard(reading.name)
                self._place(reading, row)
        if self._newest_ns is not None:
            self._close_steps(self._newest_ns - self._lateness_ns)
        if self._wanted_waveforms:
            self._judge_snapshots()
        for waveform in batch.waveforms:
            self.unseen.discard(waveform.name)
            if waveform.name in self._wanted_waveforms and waveform.quality is Quality.GOOD:
                self._place_waveform(waveform)
                self._judge_snapshots()
        windows, self._ready = self._ready, []
        return windows

    # ---- readings into steps ----------------------------------------------------------------------------------------

    def _place(self, reading: Reading, row: int) -> None:
        time_ns = self._time_of(reading.clock)
        if self._newest_ns is not None and time_ns < self._newest_ns - self._reset_ns:
            self.counters.clock_resets += 1
            self._begin_anew()
        last_ns = self._past.last_ns
        if last_ns is not None and time_ns <= last_ns:
            if self._past.knows(time_ns, row):
                self.counters.duplicates += 1
            else:
                self.counters.late += 1
            return
        step = self._open.setdefault(time_ns, [None] * len(self._rows))
        known = step[row]
        if known is not None:
            self.counters.duplicates += 1
        if known is None or math.isnan(known):
            step[row] = self._value_of(reading)
        if self._newest_ns is None or time_ns > self._newest_ns:
            self._newest_ns = time_ns

    def _place_waveform(self, waveform: Waveform) -> None:
        time_ns = self._time_of(waveform.clock)
        used_ns = self._used_ns.get(waveform.name)
        if used_ns is not None and time_ns < used_ns - self._reset_ns:
            self.counters.clock_resets += 1
            self._begin_anew()
        elif used_ns is not None and time_ns <= used_ns:
            self.counters.duplicates += 1
            return
        self._fresh[waveform.name] = (time_ns, waveform)

    def _time_of(self, clock: Clock) -> int:
        timeline = "source" if clock.synced else f"boot {clock.boot_id}"
        if timeline != self._timeline:
            if self._timeline:
                self.counters.gaps += 1
                self._begin_anew()
            self._timeline = timeline
            # Only here, once: so that people read a date, and no later jump of the wall clock moves a window.
            self._zero_ns = clock.receive_ns - clock.monotonic_ns
        return clock.source_ns if clock.synced else clock.monotonic_ns + self._zero_ns

    def _value_of(self, reading: Reading) -> float:
        value = reading.value
        if reading.quality is not Quality.GOOD or value is None or isinstance(value, str):
            return math.nan
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        low, high = self._limits.get(reading.name, (-math.inf, math.inf))
        if math.isinf(number) or number < low or number > high:
            self.counters.implausible += 1
            return math.nan
        return number

    def _begin_anew(self) -> None:
        """Judge what came before the break, then forget it."""
        if self._newest_ns is not None:
            self._close_steps(self._newest_ns)
        self._forget_past()
        self._open.clear()
        self._newest_ns = None
        self._fresh.clear()
        self._used_ns.clear()

    def _forget_past(self) -> None:
        self._past.clear()
        self._begin_ns = None
        self._steps_since, self._last_end_ns = 0, None

    # ---- steps into windows -----------------------------------------------------------------------------------------

    def _close_steps(self, limit_ns: int) -> None:
        """Close the open steps up to `limit_ns`, oldest first."""
        for time_ns in sorted(time_ns for time_ns in self._open if time_ns <= limit_ns):
            self._close(time_ns, self._open.pop(time_ns))
            if not self._wanted_waveforms and self._due(time_ns):
                self._ready.append(self._window(time_ns))

    def _close(self, time_ns: int, step: list[float | None]) -> None:
        self._end_after_gap(time_ns)
        self._past.append(time_ns, [math.nan if value is None else value for value in step])
        self._steps_since += 1
        if self._begin_ns is None:
            self._begin_ns = time_ns
        if self._spec.by == "count":
            self._past.keep_last(int(self._spec.length))
        else:
            self._past.keep_since(time_ns - round(self._spec.length * 1e9))

    def _end_after_gap(self, time_ns: int) -> None:
        """Begin anew where nothing came for too long before `time_ns`."""
        last_ns = self._past.last_ns
        if last_ns is not None and time_ns - last_ns > self._max_gap_ns:
            self.counters.gaps += 1
            self._forget_past()

    def _history(self) -> float:
        """How much history there is, in the unit of the window's length."""
        if self._spec.by == "count":
            return len(self._past)
        if self._begin_ns is None or self._past.last_ns is None:
            return 0.0
        return (self._past.last_ns - self._begin_ns) / 1e9

    def _long_enough(self) -> bool:
        return not self._rows or self._history() >= (self._spec.min_length or self._spec.length)

    def _due(self, time_ns: int) -> bool:
        """Whether a window ends at this step: `step` steps or seconds after the last one, if the past suffices."""
        if self._last_end_ns is not None:
            by_count = self._spec.by == "count"
            since = self._steps_since if by_count else (time_ns - self._last_end_ns) / 1e9
            if since < self._spec.step:
                return False
        return self._long_enough()

    def _judge_snapshots(self) -> None:
        """A window for a complete set of snapshots, if the past suffices."""
        if self._fresh.keys() != self._wanted_waveforms or self._drop_unpaired():
            return
        times_ns = {name: time_ns for name, (time_ns, _) in self._fresh.items()}
        end_ns = max(times_ns.values())
        self._end_after_gap(end_ns)
        if not self._long_enough():
            return
        self._ready.append(self._window(end_ns, {name: waveform for name, (_, waveform) in self._fresh.items()}))
        self._used_ns = times_ns
        self._fresh.clear()

    def _drop_unpaired(self) -> bool:
        """Drop the snapshots of an earlier set than the newest one's, and say whether there were any.

        A channel whose snapshot was missed would else be paired with the other's next one, and each time again.
        """
        newest = max(self._fresh, key=lambda name: self._fresh[name][0])
        newest_ns, before_ns = self._fresh[newest][0], self._used_ns.get(newest)
        if before_ns is None or self._timeline != "source":
            return False
        earlier = [name for name, (time_ns, _) in self._fresh.items() if newest_ns - time_ns > time_ns - before_ns]
        for name in earlier:
            del self._fresh[name]
        self.counters.unpaired += len(earlier)
        return bool(earlier)

    def _window(self, end_ns: int, waveforms: Mapping[str, Waveform] | None = None) -> Window:
        self._steps_since, self._last_end_ns = 0, end_ns
        times_ns, values = self._past.copy()
        return Window(
            asset=self._asset,
            start_ns=int(times_ns[0]) if len(times_ns) else end_ns,
            end_ns=end_ns,
            times_ns=times_ns,
            signals={name: values[row] for name, row in self._rows.items()},
            waveforms=waveforms or {},
            state=self._state,
            complete=not self._rows or self._history() >= self._spec.length,
            context=self._context,
        )

    # ---- state ------------------------------------------------------------------------------------------------------

    def dump(self) -> Snapshot:
        """The whole state, to be encoded before the next `add`; a builder that loads it goes on exactly as this one."""
        times_ns, values = self._past.copy()
        return Snapshot(
            names=(*self._spec.signals, *self._spec.waveforms),
            times_ns=times_ns.tobytes(),
            values=values.tobytes(),
            begin_ns=self._begin_ns,
            open_steps=self._open,
            newest_ns=self._newest_ns,
            steps_since=self._steps_since,
            last_end_ns=self._last_end_ns,
            state=self._state.value,
            timeline=self._timeline,
            zero_ns=self._zero_ns,
            fresh=self._fresh,
            used_ns=self._used_ns,
            counters=self.counters,
        )

    def load(self, snapshot: Snapshot) -> None:
        """Go on from `snapshot`. One of other signals (the model changed) is ignored: the window begins anew."""
        if snapshot.names != (*self._spec.signals, *self._spec.waveforms):
            return
        times_ns = np.frombuffer(snapshot.times_ns, np.int64)
        values = np.frombuffer(snapshot.values, np.float64)
        self._past.fill(times_ns, values.reshape(len(self._rows), len(times_ns)))
        self._begin_ns = snapshot.begin_ns
        self._open = snapshot.open_steps
        self._newest_ns = snapshot.newest_ns
        self._steps_since = snapshot.steps_since
        self._last_end_ns = snapshot.last_end_ns
        self._state = AssetState(snapshot.state)
        self._timeline = snapshot.timeline
        self._zero_ns = snapshot.zero_ns
        self._fresh = snapshot.fresh
        self._used_ns = snapshot.used_ns
        self.counters = snapshot.counters
