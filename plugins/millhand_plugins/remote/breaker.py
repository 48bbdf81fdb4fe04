"""A circuit breaker: when to leave an upstream alone (M. Nygard, Release It!, 2007, chapter 5).

closed     calls pass; `failures` in a row, or a share of `failure_rate` among the last `window`, open it
open       no call passes until the pause is over
half-open  one call passes as a probe: its success closes, its failure opens with twice the pause, up to `retry_cap_ns`

Each admitted call carries a ticket. Every change of state makes older tickets void, so that what began in one state
says nothing in another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"


@dataclass(frozen=True)
class BreakerRules:
    failures: int
    failure_rate: float
    window: int
    retry_ns: int
    retry_cap_ns: int


class Breaker:
    """Thread-safe. Times are CLOCK_MONOTONIC nanoseconds."""

    def __init__(self, rules: BreakerRules, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._rules = rules
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._ticket = 0
        self._streak = 0
        self._recent: deque[bool] = deque(maxlen=rules.window)
        """Whether each of the last calls failed."""
        self._pause_ns = 0
        self._due_ns = 0
        self._probing = False
        self.state = CLOSED

    @property
    def passable(self) -> bool:
        """Whether the next call would be admitted."""
        with self._lock:
            return self._passable()

    @property
    def retry_in_ns(self) -> int:
        """How long an open circuit stays open; 0 in the other states."""
        with self._lock:
            return max(self._due_ns - self._clock_ns(), 0) if self.state == OPEN else 0

    def admit(self) -> int | None:
        """A ticket for one call, which must be given to `settle`; None: the upstream is to be left alone."""
        with self._lock:
            if not self._passable():
                return None
            if self.state != CLOSED:
                self._change(HALF_OPEN)
                self._probing = True
            return self._ticket

    def settle(self, ticket: int, ok: bool | None) -> str:
        """Say how an admitted call went; None: it says nothing. Returns the new state if that changed it, else ""."""
        with self._lock:
            if ticket != self._ticket:
                return ""
            self._probing = False
            if ok is None:
                return ""
            if self.state == HALF_OPEN:
                return self._close() if ok else self._open()
            self._streak = 0 if ok else self._streak + 1
            self._recent.append(not ok)
            return self._open() if self._worn() else ""

    def trip(self) -> None:
        """Open the circuit whatever it has counted."""
        with self._lock:
            self._open()

    def _passable(self) -> bool:
        if self.state == OPEN:
            return self._clock_ns() >= self._due_ns
        return not self._probing

    def _worn(self) -> bool:
        rules = self._rules
        full = len(self._recent) == rules.window
        return self._streak >= rules.failures or (full and sum(self._recent) >= rules.failure_rate * rules.window)

    def _open(self) -> str:
        self._pause_ns = min(max(2 * self._pause_ns, self._rules.retry_ns), self._rules.retry_cap_ns)
        self._due_ns = self._clock_ns() + self._pause_ns
        return self._change(OPEN)

    def _close(self) -> str:
        self._pause_ns = self._streak = 0
        self._recent.clear()
        return self._change(CLOSED)

    def _change(self, state: str) -> str:
        self._ticket += 1
        self._probing = False
        self.state = state
        return state
