"""The ring of raw waveforms."""

from __future__ import annotations

import msgspec

from millhand.records import Waveform
from millhand.store.database import Database


class WaveformRing:
    """Newest waveforms of all assets under one byte cap; the oldest make room. They never leave the node.

    `body_bytes` mirrors the file; load a new one after a roll-back.
    """

    def __init__(self, database: Database, bytes_cap: int) -> None:
        self._database = database
        self._bytes_cap = bytes_cap
        row = database.connection.execute("SELECT coalesce(sum(body_bytes), 0) FROM waveform").fetchone()
        self.body_bytes = int(row[0])

    def add(self, asset_id: int, waveform: Waveform) -> None:
        """Call inside a transaction. A waveform larger than the whole ring is left out."""
        body = msgspec.msgpack.encode(waveform)
        if len(body) > self._bytes_cap:
            return
        while self.body_bytes + len(body) > self._bytes_cap:
            self._drop_oldest()
        self._database.connection.execute(
            "INSERT INTO waveform (asset_id, name, body_bytes, body) VALUES (?, ?, ?, ?)",
            (asset_id, waveform.name, len(body), body),
        )
        self.body_bytes += len(body)

    def drop(self, at_least_bytes: int) -> bool:
        """Give back the oldest waveforms, at least so many bytes while there are any; whether there were any."""
        if not self.body_bytes:
            return False
        goal_bytes = max(0, self.body_bytes - at_least_bytes)
        with self._database.transaction():
            while self.body_bytes > goal_bytes:
                self._drop_oldest()
        return True

    def _drop_oldest(self) -> None:
        rows = self._database.connection.execute(
            "DELETE FROM waveform WHERE id = (SELECT min(id) FROM waveform) RETURNING body_bytes"
        ).fetchall()
        self.body_bytes -= int(rows[0][0])

    def newest(self, asset_id: int, name: str) -> Waveform | None:
        row = self._database.connection.execute(
            "SELECT body FROM waveform WHERE asset_id = ? AND name = ? ORDER BY id DESC LIMIT 1", (asset_id, name)
        ).fetchone()
        return None if row is None else msgspec.msgpack.decode(row[0], type=Waveform)
