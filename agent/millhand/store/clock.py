"""The store's own clock, by which rows age."""

from __future__ import annotations

import time


class StoreClock:
    """Seconds for which the store has been open, over all its runs.

    It follows CLOCK_BOOTTIME, so a wall clock that starts in 1970, jumps back or jumps years ahead makes no row older
    or younger. Time while the node is off does not count: rows can only live longer than the cap says, never shorter.
    The value is written to the file about once a minute and at close; a crash loses at most that minute.
    """

    def __init__(self, start_s: int) -> None:
        self._start_s = start_s
        self._origin_s = _boot_s()

    def now_s(self) -> int:
        return self._start_s + int(_boot_s() - self._origin_s)


def _boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
