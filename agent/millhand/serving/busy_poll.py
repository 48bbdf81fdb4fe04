"""Waiting awake for an answer that is almost there.

A core that sleeps takes some 50 us to wake, more on a virtual machine, and comes back with cold caches: for a model of
0.4 ms that is a large part of the answer's time. So while one request is alone under way, the loop may look for its
answer again and again instead of sleeping. It does so only where that will be short and is worth it: the last lone
answer came within the limit, and this request came soon after it. Requests that come now and then cost nothing; where
several are under way the loop is busy anyway. The idea is the kernel's halt polling (KVM).
"""

from __future__ import annotations

import asyncio
import time

SOON_NS = 2_000_000
"""A request that comes so soon after an answer comes from a client that waits for each."""


class BusyPoll:
    """For one connection to a worker. `sent`: a request is alone under way; `answered`: none is any more."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit_us: int) -> None:
        self._loop = loop
        self._limit_ns = limit_us * 1000
        self._sent_ns = self._answered_ns = 0
        self._took_ns = self._limit_ns
        self._waiting = self._looking = False

    def sent(self) -> None:
        self._sent_ns = now_ns = time.monotonic_ns()
        self._waiting = True
        if self._took_ns < self._limit_ns and now_ns - self._answered_ns < SOON_NS and not self._looking:
            self._looking = True
            self._loop.call_soon(self._look)

    def answered(self) -> None:
        self._answered_ns = time.monotonic_ns()
        self._took_ns = self._answered_ns - self._sent_ns
        self._waiting = False

    def _look(self) -> None:
        """A callback that is due keeps the loop from sleeping when it asks the kernel for news."""
        self._looking = self._waiting and time.monotonic_ns() - self._sent_ns < self._limit_ns
        if self._looking:
            self._loop.call_soon(self._look)
