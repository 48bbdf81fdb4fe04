"""The closed steps that a window may still look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FIRST_CAPACITY = 64


class Past:
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

    def knows(self, time_ns: int, row: int) -> bool:
        """Whether the step of that time holds a usable value in `row`."""
        held = self._times_ns[self._start : self._end]
        place = int(np.searchsorted(held, time_ns))
        found = place < len(held) and held[place] == time_ns
        return bool(found and not np.isnan(self._values[row, self._start + place]))

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
