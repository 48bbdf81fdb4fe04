"""Retention: what must go, in which order, in slices small enough that a commit never waits long."""

from __future__ import annotations

import shutil
import time

from millhand.store.database import Database
from millhand.store.outbox import TABLES, Outbox
from millhand.store.settings import StoreSettings
from millhand.store.waveforms import WaveformRing

DAY_S = 86_400
SLICE_ROWS = 500
SLICE_BYTES = 256 * 1024
# Free pages that stay in the file for the next rows; giving them back would only make it grow again.
SLACK_PAGES = 256
VACUUM_PAGES = 512
AGE_LOOK_S = 30.0
SEQ_MAX = 2**63 - 1


class Retention:
    """One slice a call; the store's thread calls it between commits.

    Age: each kind of row has its cap, counted on the store's clock. Pressure (bytes_cap, or the disk's floor) takes, in
    this order: rows of readings that the hub has, predictions that the hub has, waveforms, unsent rows of readings, the
    other predictions, rollups, rows of the alert stream. Alerts and orders themselves go by age only. Unsent rows that
    go leave a gap record and are counted by reason: `age`, `bytes` or `disk`.
    """

    def __init__(self, database: Database, outbox: Outbox, waveforms: WaveformRing, settings: StoreSettings) -> None:
        self._database = database
        self._outbox = outbox
        self._waveforms = waveforms
        self._settings = settings
        self._page_bytes = database.pragma("page_size")
        shortest_days = min(
            settings.age_cap_days,
            settings.history_age_cap_days,
            settings.prediction_age_cap_days,
            settings.rollup_age_cap_days,
            settings.alert_age_cap_days,
        )
        self._age_look_s = min(AGE_LOOK_S, shortest_days * DAY_S / 10)
        self._next_age_look_s = 0.0

    @property
    def live_bytes(self) -> int:
        """Bytes of the file that hold data."""
        return (self._database.pragma("page_count") - self._database.pragma("freelist_count")) * self._page_bytes

    @property
    def free_disk_bytes(self) -> int:
        return shutil.disk_usage(self._database.path.parent).free

    def run_slice(self) -> bool:
        """Do one small piece of work; whether there may be more to do at once."""
        if self._drop_aged():
            return True
        reason = self._pressure()
        if reason and self._relieve(reason):
            return True
        return self._give_back(0 if reason == "disk" else SLACK_PAGES)

    # ---- age --------------------------------------------------------------------------------------------------------

    def _drop_aged(self) -> bool:
        now = time.monotonic()
        if now < self._next_age_look_s:
            return False
        caps = self._settings
        acked = self._outbox.state("bulk").acked
        did = (
            self._drop_rows("bulk", "age", self._cutoff_s(caps.history_age_cap_days), acked)
            or self._drop_rows("bulk", "age", self._cutoff_s(caps.age_cap_days))
            or self._drop_rows("alert", "age", self._cutoff_s(caps.alert_age_cap_days))
            or self._drop_predictions(self._cutoff_s(caps.prediction_age_cap_days))
            or self._drop_rollups(self._cutoff_s(caps.rollup_age_cap_days))
            or self._drop_closed(self._cutoff_s(caps.alert_age_cap_days))
        )
        if not did:
            self._next_age_look_s = now + self._age_look_s
        return did

    def _cutoff_s(self, cap_days: float) -> int:
        return self._database.clock.now_s() - int(cap_days * DAY_S)

    # ---- pressure ---------------------------------------------------------------------------------------------------

    def _pressure(self) -> str:
        live = self.live_bytes
        if live > self._settings.bytes_cap:
            return "bytes"
        return "disk" if live > self._settings.reserve_bytes and self._disk_is_low else ""

    @property
    def _disk_is_low(self) -> bool:
        return self.free_disk_bytes < self._settings.free_disk_floor_bytes

    def _relieve(self, reason: str) -> bool:
        acked = self._outbox.state("bulk").acked
        if reason == "disk":
            # What was dropped shows as free disk only after log and file shrank: do that first.
            self._database.checkpoint(truncate=True)
            if self._give_back(0) or not self._disk_is_low:
                return True
        return (
            self._drop_rows("bulk", reason, None, acked)
            or self._drop_predictions(None, acked)
            or self._waveforms.drop(SLICE_BYTES)
            or self._drop_rows("bulk", reason)
            or self._drop_predictions()
            or self._drop_rollups(None)
            or self._drop_rows("alert", reason)
        )

    # ---- slices -----------------------------------------------------------------------------------------------------

    def _drop_rows(self, stream: str, reason: str, stored_before_s: int | None = None, upto: int = SEQ_MAX) -> bool:
        """Drop a stream's oldest rows, at most a slice: those stored before, where given, and up to `upto`."""
        # What a full store is over its cap goes at once, so that it keeps up with any writer.
        slice_bytes = max(SLICE_BYTES, self.live_bytes - self._settings.bytes_cap)
        (seq,) = self._database.connection.execute(
            "SELECT max(seq) FROM ("  # noqa: S608
            "SELECT seq, stored_s, sum(length(body)) OVER (ORDER BY seq) - length(body) AS before "
            f"FROM {TABLES[stream]} WHERE seq <= ?1 ORDER BY seq LIMIT ?2) "
            "WHERE before < ?4 AND (?3 IS NULL OR stored_s < ?3)",
            (upto, SLICE_ROWS, stored_before_s, slice_bytes),
        ).fetchone()
        if seq is None:
            return False
        with self._database.transaction():
            return self._outbox.drop_through(stream, seq, reason) > 0

    def _drop_predictions(self, stored_before_s: int | None = None, upto: int | None = None) -> bool:
        """Delete the oldest predictions, at most a slice: those stored before, and sent in rows up to `upto`."""
        with self._database.transaction() as connection:
            cursor = connection.execute(
                "DELETE FROM prediction WHERE id IN (SELECT id FROM "
                "(SELECT id, stored_s, seq FROM prediction ORDER BY id LIMIT ?3) "
                "WHERE (?1 IS NULL OR stored_s < ?1) AND (?2 IS NULL OR seq <= ?2))",
                (stored_before_s, upto, SLICE_ROWS),
            )
        return cursor.rowcount > 0

    def _drop_rollups(self, stored_before_s: int | None) -> bool:
        """Delete the minutes that come first. A minute that a wrong clock put first only waits for its own age."""
        with self._database.transaction() as connection:
            cursor = connection.execute(
                "DELETE FROM rollup WHERE (minute, metric_id) IN (SELECT minute, metric_id FROM "
                "(SELECT * FROM rollup ORDER BY minute, metric_id LIMIT ?2) WHERE ?1 IS NULL OR stored_s < ?1)",
                (stored_before_s, SLICE_ROWS),
            )
        return cursor.rowcount > 0

    def _drop_closed(self, stored_before_s: int) -> bool:
        """Delete alerts that are no longer open, and orders of alerts that are gone."""
        with self._database.transaction() as connection:
            alerts = connection.execute(
                "DELETE FROM alert WHERE id IN (SELECT id FROM alert WHERE state <> 'open' AND stored_s < ? LIMIT ?)",
                (stored_before_s, SLICE_ROWS),
            )
            orders = connection.execute(
                "DELETE FROM work_order WHERE id IN (SELECT id FROM work_order WHERE stored_s < ? "
                "AND NOT EXISTS (SELECT 1 FROM alert WHERE alert.id = work_order.alert_id) LIMIT ?)",
                (stored_before_s, SLICE_ROWS),
            )
            versions = connection.execute(
                "DELETE FROM order_version WHERE rowid IN (SELECT rowid FROM order_version WHERE NOT EXISTS "
                "(SELECT 1 FROM work_order WHERE work_order.id = order_version.order_id) LIMIT ?)",
                (SLICE_ROWS,),
            )
        return alerts.rowcount + orders.rowcount + versions.rowcount > 0

    def _give_back(self, slack_pages: int) -> bool:
        """Cut free pages off the file, so that the disk really gets them."""
        spare = self._database.pragma("freelist_count") - slack_pages
        if spare <= 0:
            return False
        self._database.shrink(min(spare, VACUUM_PAGES))
        return spare > VACUUM_PAGES
