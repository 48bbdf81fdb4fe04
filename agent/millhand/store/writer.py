"""Writes a group of steps as one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from millhand.errors import StoreError
from millhand.records import Prediction, Reading
from millhand.store.alerts import AlertBook
from millhand.store.catalog import Catalog, time_ns
from millhand.store.conversations import ConversationBook
from millhand.store.database import Database
from millhand.store.history import History
from millhand.store.outbox import Outbox
from millhand.store.rollups import Rollups
from millhand.store.rows import Bulk, Step
from millhand.store.settings import StoreSettings
from millhand.store.waveforms import WaveformRing

# What a row takes beside its body: columns and index entries.
ROW_BYTES = 80


@dataclass(frozen=True, slots=True)
class EncodedStep:
    """A step with its bodies, made by the caller so that a value that cannot be encoded fails there."""

    step: Step
    body: bytes
    predictions: tuple[tuple[Prediction, bytes], ...]

    @property
    def stored_bytes(self) -> int:
        """About what the step adds to the file; waveforms and rollups left out, which have caps of their own."""
        return ROW_BYTES + len(self.body) + sum(ROW_BYTES + len(body) for _, body in self.predictions)


def encode(step: Step) -> EncodedStep:
    """Raises StoreError for a value that MessagePack has no form for."""
    try:
        body = msgspec.msgpack.encode(Bulk(readings=step.batch.readings, predictions=step.predictions))
        predictions = tuple((item, msgspec.msgpack.encode(item)) for item in step.predictions)
        for record in (*step.alerts, *step.orders, *step.batch.waveforms):
            msgspec.msgpack.encode(record)
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(
            f"a step of asset '{step.asset}' cannot be stored: {error}",
            hint="give numbers of at most 64 bits, booleans, or valid text",
        ) from error
    return EncodedStep(step, body, predictions)


class Writer:
    """The parts of the store over one open file. Load a new one after a roll-back: the parts mirror the file."""

    def __init__(self, database: Database, settings: StoreSettings) -> None:
        self.database = database
        self.catalog = Catalog(database)
        self.outbox = Outbox(database)
        self.alerts = AlertBook(database, self.catalog, self.outbox)
        self.conversations = ConversationBook(database)
        self.history = History(database)
        self.rollups = Rollups(database)
        self.waveforms = WaveformRing(database, settings.waveform_bytes_cap)

    def write(self, steps: Sequence[EncodedStep]) -> int:
        """Commit all steps or none; returns after the fsync with the number of repeated predictions.

        Raises sqlite3.Error; this writer must not be used again then.
        """
        repeated = 0
        points: dict[int, tuple[int, bytes | None, bytes]] = {}
        readings: list[tuple[int, Reading]] = []
        with self.database.transaction():
            for encoded in steps:
                step = encoded.step
                asset_id = self.catalog.asset_id(step.asset)
                cursor = step.batch.cursor
                if cursor is None and asset_id in points:
                    cursor = points[asset_id][1]
                points[asset_id] = (asset_id, cursor, step.state)
                readings += [
                    (self.catalog.metric_id(asset_id, reading.name, reading.unit), reading)
                    for reading in step.batch.readings
                ]
                repeated += self._write_bulk(asset_id, encoded)
                self._write_rest(asset_id, step)
            self.rollups.add(readings)
            self.catalog.save_newest(readings)
            self.catalog.save_resume_points(list(points.values()))
            self.outbox.save()
        return repeated

    def _write_bulk(self, asset_id: int, encoded: EncodedStep) -> int:
        """One row for the step's readings and new predictions, none for a step without; returns the repeats."""
        step, body, stored_s = encoded.step, encoded.body, self.database.clock.now_s()
        seq = self.outbox.state("bulk").last + 1
        new = self.history.add_predictions(asset_id, seq, stored_s, encoded.predictions)
        repeated = len(step.predictions) - len(new)
        if repeated:
            body = msgspec.msgpack.encode(Bulk(readings=step.batch.readings, predictions=tuple(new)))
        times = [time_ns(reading.clock) for reading in step.batch.readings]
        times += [prediction.window_end_ns for prediction in new]
        if times:
            self.outbox.append_bulk(asset_id, min(times), max(times), stored_s, body)
        return repeated

    def _write_rest(self, asset_id: int, step: Step) -> None:
        for waveform in step.batch.waveforms:
            self.waveforms.add(asset_id, waveform)
        for alert in step.alerts:
            self.alerts.apply(alert)
        for order in step.orders:
            self.alerts.add_order(order)

    def status(self) -> dict[str, Any]:
        """Rows, bytes and what is unsent, a stream."""
        return {
            name: {
                "rows": state.row_count,
                "bytes": state.body_bytes,
                "last": state.last,
                "acked": state.acked,
                "unsent": state.last - state.acked,
                "oldest_unsent_age_s": self.outbox.oldest_unsent_s(name),
                "dropped": self.outbox.dropped(name),
            }
            for name, state in self.outbox.streams.items()
        }
