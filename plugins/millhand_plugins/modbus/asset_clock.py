"""An asset's running counter of milliseconds or seconds, tied once to the node's wall clock."""

from __future__ import annotations

from millhand_plugins.modbus.options import TimeRegister

# How much farther than the node's own clock a counter may seem to have run before a fall counts as a restart, not as
# a wrap: late polls and a slow network explain a minute, and no quartz is off by half.
_SLACK_S = 60.0
_RATE = 1.5
_WIDTHS = {"uint16": 2**16, "uint32": 2**32, "uint64": 2**64}


class AssetClock:
    """Turns counts into Unix nanoseconds that go on evenly: no jump of the node's wall clock enters.

    The counter is anchored at its first value. A fall is a wrap if the time that went by on the node explains it; else
    the device has restarted, and is anchored anew. After a pause without polls, a counter that went on by less than
    half of the time that passed has restarted too.
    """

    def __init__(self, register: TimeRegister) -> None:
        self._unit_ns = 1_000_000 if register.unit == "ms" else 1_000_000_000
        self._width = _WIDTHS.get(register.form, 0)
        self._count: float = 0
        self._seen_ns = 0
        self._source_ns = 0
        self.anchored = False
        self.restarts = 0

    def observe(self, count: float, wall_ns: int, monotonic_ns: int) -> int:
        """Take the counter's present value; return its time, Unix nanoseconds."""
        elapsed_s = (monotonic_ns - self._seen_ns) / 1e9
        step = count - self._count
        if self.anchored and step < 0 and self._width:
            wrapped = step + self._width
            step = wrapped if wrapped * self._unit_ns / 1e9 <= _RATE * elapsed_s + _SLACK_S else step
        stalled = elapsed_s > _SLACK_S and 0 < step * self._unit_ns / 1e9 < elapsed_s / 2
        if self.anchored and (step < 0 or stalled):
            self.restarts += 1
            self.anchored = False
        self._source_ns = self._source_ns + int(step * self._unit_ns) if self.anchored else wall_ns
        self._count, self._seen_ns, self.anchored = count, monotonic_ns, True
        return self._source_ns

    def at(self, count: float) -> int:
        """The time of another count on the same counter, near the last observed one; needs `anchored`."""
        step = count - self._count
        if self._width and abs(step) > self._width / 2:
            step -= self._width if step > 0 else -self._width
        return self._source_ns + int(step * self._unit_ns)
