"""Who reads and who runs: the threads of a worker take turns. Imported by workers: Python 3.10.

One thread leads: it waits for requests, reads them, and runs itself what is due, without a hand-over; what arrives
meanwhile waits in the sockets and is read as one when it comes back. So a short inference costs no switch between
threads, and the same thread stays warm. Others are called only where there is more to run at once than one batch, and
by the watch, which looks after a run that lasts: then another thread leads, so that a worker whose model computes, or
hangs, still reads, answers `ping` and cancels.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable

from millhand.serving.batcher import Batch, Batcher

log = logging.getLogger("millhand.worker")

WATCH_S = 0.002
"""So long nobody may read; a run that lasts longer is left to its thread, and another one leads."""
WATCH_ENDS_AFTER = 10
"""Looks in a row that found somebody leading; then the watch sleeps until the next run."""


class Turns:
    """The threads around one batcher; `call` is what the batcher calls for another of them."""

    def __init__(
        self, batcher: Batcher, read: Callable[[float | None], None], run: Callable[[Batch], None], runners: int
    ) -> None:
        """`read(timeout_s)` waits until clients have sent something, at most so long, and takes it."""
        self._batcher = batcher
        self._read = read
        self._run = run
        self._runners = runners
        self._lead = threading.Lock()
        self._left_ns = 0  # since when nobody leads; 0 while one does
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._running = threading.Event()

    def serve(self) -> None:
        """Take turns for good: in this thread, and in one more for each runner."""
        threading.Thread(target=self._guarded, args=(self._watch,), name="watch", daemon=True).start()
        for number in range(self._runners):
            threading.Thread(target=self._guarded, args=(self._take_turns,), name=f"turn {number}", daemon=True).start()
        self.call()
        self._guarded(self._take_turns)

    def call(self) -> None:
        """Let a waiting thread look for work."""
        self._calls.put(None)

    def _guarded(self, life: Callable[[], None]) -> None:
        try:
            life()
        except BaseException:
            log.critical("a thread of the worker failed", exc_info=True)
            os._exit(1)  # the daemon starts it anew; half a worker would only be slow

    def _take_turns(self) -> None:
        take = self._batcher.take
        while True:
            batch = self._lead_until_due() if self._lead.acquire(blocking=False) else take()
            if batch is not None:
                self._run(batch)
            elif self._lead.locked():
                self._wait()

    def _lead_until_due(self) -> Batch | None:
        """Read until a batch is due. The lead is free when this returns."""
        self._left_ns = 0
        try:
            batch = self._batcher.take()
            while batch is None:
                self._read(self._batcher.wait_s())
                batch = self._batcher.take()
        finally:
            self._left_ns = time.monotonic_ns()
            self._lead.release()
        if not self._running.is_set():
            self._running.set()
        return batch

    def _wait(self) -> None:
        """Until called, or until a batch is due that the leader may not know of."""
        try:
            self._calls.get(timeout=self._batcher.wait_s())
        except queue.Empty:
            return

    def _watch(self) -> None:
        while True:
            self._running.wait()
            looks = 0
            while looks < WATCH_ENDS_AFTER:
                time.sleep(WATCH_S)
                left_ns = self._left_ns
                if left_ns == 0:
                    looks += 1
                    continue
                looks = 0
                if time.monotonic_ns() - left_ns > WATCH_S * 1e9:
                    self.call()
            self._running.clear()
            if self._left_ns:  # a run began between the last look and here
                self._running.set()
