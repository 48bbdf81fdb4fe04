"""What runs on the store's thread: groups of steps, single calls, upkeep, and recovery from a bad file."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from millhand.errors import StoreError
from millhand.store.database import CHECKPOINT_PAGES, Database
from millhand.store.faults import Damage, is_damage, is_surroundings, store_error
from millhand.store.retention import Retention
from millhand.store.settings import StoreSettings
from millhand.store.writer import EncodedStep, Writer

log = logging.getLogger("millhand.store")

Result = TypeVar("Result")

# Upkeep looks at the caps after this many steps, or this long after the last look.
LOOK_STEPS = 64
LOOK_S = 1.0
TOKEN_S = 60.0
# The rate of growth is taken over this many samples.
RATE_SAMPLE_S = 10.0
RATE_SAMPLES = 60
# Pages that a commit touches beside its bodies: indexes, counters, resume point, newest values, rollups.
PAGES_A_COMMIT = 8


class Engine:
    """Synchronous heart of the store. Every method runs on the store's thread."""

    def __init__(self, database: Database, settings: StoreSettings) -> None:
        self._database = database
        self._settings = settings
        self._counts = {"commits": 0, "steps": 0, "repeated_predictions": 0, "files_begun_anew": 0}
        self._last_commit_s: float | None = None
        self._last_error = ""
        self._unfolded_pages = 0
        self._written_bytes = 0
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=RATE_SAMPLES)
        self._unseen_steps = 0
        self._next_token_s = time.monotonic() + TOKEN_S
        self._load()

    def _load(self) -> None:
        """Mirror the file as it is now."""
        self._writer = Writer(self._database, self._settings)
        self._retention = Retention(self._database, self._writer.outbox, self._writer.waveforms, self._settings)
        self._stale = False
        # After a failure, look at disk and caps at once: it may have been for want of space.
        self._next_look_s = 0.0

    # ---- steps ------------------------------------------------------------------------------------------------------

    def write(self, steps: Sequence[EncodedStep]) -> list[StoreError | None]:
        """Commit the steps as one transaction; for each, None or why it was not committed."""
        try:
            self._on_good_file(lambda: self._write(steps))
        except Exception as error:
            if len(steps) > 1 and not isinstance(error, StoreError) and not is_surroundings(error):
                # One bad step must not fail its neighbours.
                return [self.write([step])[0] for step in steps]
            self._last_error = str(error)
            return [store_error(error, self._database.path) for _ in steps]
        return [None] * len(steps)

    def _write(self, steps: Sequence[EncodedStep]) -> None:
        self._counts["repeated_predictions"] += self._writer.write(steps)
        self._last_commit_s = time.monotonic()
        self._counts["commits"] += 1
        self._counts["steps"] += len(steps)
        self._unseen_steps += len(steps)
        body_bytes = sum(encoded.stored_bytes for encoded in steps)
        self._written_bytes += body_bytes
        self._unfolded_pages += PAGES_A_COMMIT + 2 * len(steps) + body_bytes // 4096

    def call(self, function: Callable[[Writer], Result]) -> Result:
        """Run a single call. Raises StoreError."""
        try:
            return self._on_good_file(lambda: function(self._writer))
        except Exception as error:
            self._last_error = str(error)
            raise store_error(error, self._database.path) from error

    def _on_good_file(self, function: Callable[[], Result]) -> Result:
        """Run `function`; on a damaged or replaced file begin a new one, and run it on that."""
        try:
            return self._try(function)
        except Exception as error:
            if not is_damage(error):
                raise
            self._last_error = str(error)
        self._counts["files_begun_anew"] += 1
        self._database.replace(self._last_error)
        return self._try(function)

    def _try(self, function: Callable[[], Result]) -> Result:
        try:
            if not self._database.is_open:
                # The last attempt to begin a new file failed, for want of space perhaps.
                self._database.open()
            moved = self._database.moved()
            if moved:
                raise Damage(moved)
            if self._stale:
                self._load()
            return function()
        except StoreError:
            raise
        except Exception:
            # What the parts hold in memory may be ahead of the file now.
            self._stale = True
            raise

    # ---- upkeep -----------------------------------------------------------------------------------------------------

    def upkeep(self) -> float:
        """Do one small piece of upkeep when it is due; returns the seconds until it wants to be called again."""
        try:
            return self._on_good_file(self._upkeep)
        except Exception as error:
            if str(error) != self._last_error:
                log.warning("upkeep of the store failed: %s", error)
            self._last_error = str(error)
            self._next_look_s = time.monotonic() + LOOK_S
            return LOOK_S

    def _upkeep(self) -> float:
        now = time.monotonic()
        if self._unfolded_pages >= CHECKPOINT_PAGES:
            self._unfolded_pages = 0
            self._database.checkpoint()
        if now - self._samples[-1][0] >= RATE_SAMPLE_S:
            self._samples.append((now, self._written_bytes))
        if now >= self._next_token_s:
            self._next_token_s = now + TOKEN_S
            self._database.renew_token()
        if now >= self._next_look_s or self._unseen_steps >= LOOK_STEPS:
            self._unseen_steps = 0
            more = self._retention.run_slice()
            self._next_look_s = now if more else now + LOOK_S
        return max(0.0, self._next_look_s - now)

    # ---- status -----------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        database = self._database
        wal = database.path.with_name(database.path.name + "-wal")
        live = self._retention.live_bytes
        return {
            "path": str(database.path),
            "epoch": database.epoch,
            "file_bytes": database.path.stat().st_size,
            "wal_bytes": wal.stat().st_size if wal.exists() else 0,
            "live_bytes": live,
            "bytes_cap": self._settings.bytes_cap,
            "waveform_bytes": self._writer.waveforms.body_bytes,
            "free_disk_bytes": self._retention.free_disk_bytes,
            "streams": self._writer.status(),
            "seconds_until_full": self._seconds_until_full(live),
            "last_commit_age_s": None if self._last_commit_s is None else time.monotonic() - self._last_commit_s,
            "set_aside": [str(path) for path in database.set_aside],
            "restored_copy": database.restored,
            "last_error": self._last_error,
            **self._counts,
        }

    def _seconds_until_full(self, live_bytes: int) -> float | None:
        """When unsent rows must begin to go if nothing more is acknowledged; None while nothing is written."""
        then, written = self._samples[0]
        grown = self._written_bytes - written
        if grown <= 0:
            return None
        state = self._writer.outbox.state("bulk")
        kept = state.row_count - (state.last - state.acked)
        reclaimable = state.body_bytes * max(kept, 0) // max(state.row_count, 1)
        settings = self._settings
        room = min(settings.bytes_cap - live_bytes, self._retention.free_disk_bytes - settings.free_disk_floor_bytes)
        return max(0.0, room + reclaimable) * (time.monotonic() - then) / grown
