"""Alerts, work orders, and the cursors of the sinks that hand them on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from millhand.errors import StoreError
from millhand.records import TECHNICIAN, Alert, AlertState, WorkOrder
from millhand.store.catalog import Catalog
from millhand.store.database import Database
from millhand.store.outbox import Outbox
from millhand.store.rows import KINDS

PAIRS_CAP = 10_000
"""The newest training pairs that are kept, about 40 MB."""
_RANK = {AlertState.OPEN: 0, AlertState.ACKED: 1, AlertState.CLEARED: 2}


class AlertBook:
    """One row for each alert and each order as it is now, and one row on the `alert` stream for each change."""

    def __init__(self, database: Database, catalog: Catalog, outbox: Outbox) -> None:
        self._database = database
        self._catalog = catalog
        self._outbox = outbox

    # ---- inside a transaction ---------------------------------------------------------------------------------------

    def apply(self, alert: Alert) -> Alert:
        """Insert or update by id; an alert that changes nothing leaves no row. Returns what is stored now.

        An alert goes from open over acknowledged to cleared and never back, and who acknowledged it stays known: a
        rule that updates its alert does not undo what a person did.
        """
        known = self.alert(alert.id)
        if known is not None:
            state = max(known.state, alert.state, key=_RANK.__getitem__)
            alert = msgspec.structs.replace(alert, state=state, acked_by=alert.acked_by or known.acked_by)
            if state is known.state and alert.changed_ns < known.changed_ns:
                alert = msgspec.structs.replace(alert, changed_ns=known.changed_ns)
            if alert == known:
                return known
        body, stored_s = msgspec.msgpack.encode(alert), self._database.clock.now_s()
        asset_id = self._catalog.asset_id(alert.asset)
        self._database.connection.execute(
            "INSERT INTO alert (id, asset_id, state, raised_ns, stored_s, body) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET state = excluded.state, stored_s = excluded.stored_s, body = excluded.body",
            (alert.id, asset_id, str(alert.state), alert.raised_ns, stored_s, body),
        )
        self._outbox.append_alert(asset_id, "alert", stored_s, body)
        return alert

    def add_order(self, order: WorkOrder) -> None:
        """Insert an order's first version and its stream row; a known id changes nothing."""
        body, stored_s = msgspec.msgpack.encode(order), self._database.clock.now_s()
        asset_id = self._catalog.asset_id(order.asset)
        cursor = self._database.connection.execute(
            "INSERT OR IGNORE INTO work_order (id, alert_id, asset_id, created_ns, stored_s, body) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (order.id, order.alert_id, asset_id, order.created_ns, stored_s, body),
        )
        if cursor.rowcount:
            self._add_version(order, body)
            self._outbox.append_alert(asset_id, "order", stored_s, body)

    def _add_version(self, order: WorkOrder, body: bytes) -> None:
        self._database.connection.execute(
            "INSERT INTO order_version (order_id, revision, body) VALUES (?, ?, ?)", (order.id, order.revision, body)
        )

    # ---- whole calls ------------------------------------------------------------------------------------------------

    def revise(self, order: WorkOrder, by_person: bool) -> WorkOrder | None:
        known = self.order(order.id)
        if known is None:
            raise StoreError(f"work order '{order.id}' is not known", hint="list the orders with: millhand order list")
        if known.revision != order.revision:
            return None
        order = msgspec.structs.replace(order, revision=known.revision + 1)
        body, stored_s = msgspec.msgpack.encode(order), self._database.clock.now_s()
        with self._database.transaction() as connection:
            connection.execute("UPDATE work_order SET body = ?, stored_s = ? WHERE id = ?", (body, stored_s, order.id))
            self._add_version(order, body)
            if by_person:
                self._add_pair(known, order)
            self._outbox.append_alert(self._catalog.asset_id(order.asset), "order", stored_s, body)
            self._outbox.save()
        return order

    def _add_pair(self, before: WorkOrder, after: WorkOrder) -> None:
        """Where a person edits an edit, the pair still begins with what a machine wrote last."""
        machine = [version for version in self.versions(before.id) if not version.writer.startswith(TECHNICIAN)]
        bodies = [msgspec.msgpack.encode(order) for order in (machine[-1] if machine else before, after)]
        connection = self._database.connection
        connection.execute("INSERT INTO order_pair (order_id, before, after) VALUES (?, ?, ?)", (before.id, *bodies))
        connection.execute("DELETE FROM order_pair WHERE id <= (SELECT max(id) FROM order_pair) - ?", (PAIRS_CAP,))

    def versions(self, order_id: str) -> list[WorkOrder]:
        rows = self._database.connection.execute(
            "SELECT body FROM order_version WHERE order_id = ? ORDER BY revision", (order_id,)
        )
        return [msgspec.msgpack.decode(body, type=WorkOrder) for (body,) in rows]

    def pairs(self, after: int, limit: int) -> list[tuple[int, WorkOrder, WorkOrder]]:
        rows = self._database.connection.execute(
            "SELECT id, before, after FROM order_pair WHERE id > ? ORDER BY id LIMIT ?", (after, limit)
        )
        return [
            (place, msgspec.msgpack.decode(before, type=WorkOrder), msgspec.msgpack.decode(edited, type=WorkOrder))
            for place, before, edited in rows
        ]

    def acknowledge(self, alert_id: str, by: str, now_ns: int) -> Alert:
        known = self.alert(alert_id)
        if known is None:
            raise StoreError(f"alert '{alert_id}' is not known", hint="list the alerts with: millhand alert list")
        if known.acked_by:
            return known
        state = AlertState.ACKED if known.state is AlertState.OPEN else known.state
        with self._database.transaction():
            alert = self.apply(msgspec.structs.replace(known, state=state, acked_by=by, changed_ns=now_ns))
            self._outbox.save()
        return alert

    def alert(self, alert_id: str) -> Alert | None:
        row = self._database.connection.execute("SELECT body FROM alert WHERE id = ?", (alert_id,)).fetchone()
        return None if row is None else msgspec.msgpack.decode(row[0], type=Alert)

    def alerts(self, state: str | None, asset: str | None, limit: int) -> list[Alert]:
        rows = self._database.connection.execute(
            "SELECT body FROM alert WHERE (?1 IS NULL OR state = ?1) "
            "AND (?2 IS NULL OR asset_id = (SELECT id FROM asset WHERE name = ?2)) "
            "ORDER BY raised_ns DESC, id LIMIT ?3",
            (state, asset, limit),
        )
        return [msgspec.msgpack.decode(body, type=Alert) for (body,) in rows]

    def order(self, order_id: str) -> WorkOrder | None:
        row = self._database.connection.execute("SELECT body FROM work_order WHERE id = ?", (order_id,)).fetchone()
        return None if row is None else msgspec.msgpack.decode(row[0], type=WorkOrder)

    def orders(self, asset: str | None, alert_id: str | None, limit: int) -> list[WorkOrder]:
        rows = self._database.connection.execute(
            "SELECT body FROM work_order WHERE (?1 IS NULL OR asset_id = (SELECT id FROM asset WHERE name = ?1)) "
            "AND (?2 IS NULL OR alert_id = ?2) ORDER BY created_ns DESC, id LIMIT ?3",
            (asset, alert_id, limit),
        )
        return [msgspec.msgpack.decode(body, type=WorkOrder) for (body,) in rows]

    # ---- sinks ------------------------------------------------------------------------------------------------------

    def sink_cursor(self, name: str) -> int:
        """Where the sink stands; one that the file does not know begins with what came since the file was opened."""
        connection = self._database.connection
        row = connection.execute("SELECT cursor FROM sink WHERE name = ?", (name,)).fetchone()
        if row is not None:
            return int(row[0])
        start = self._database.alert_last_at_open
        with self._database.transaction():
            connection.execute("INSERT INTO sink (name, cursor) VALUES (?, ?)", (name, start))
        return start

    def advance_sink(self, name: str, cursor: int) -> None:
        if cursor > self._outbox.state("alert").last:
            return  # It was read from a file that has been set aside since.
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO sink (name, cursor) VALUES (?1, ?2) "
                "ON CONFLICT (name) DO UPDATE SET cursor = max(cursor, excluded.cursor)",
                (name, cursor),
            )

    def records_after(self, cursor: int, limit: int) -> Sequence[tuple[int, Alert | WorkOrder]]:
        rows = self._database.connection.execute(
            "SELECT seq, kind, body FROM alert_row WHERE seq > ? ORDER BY seq LIMIT ?", (cursor, limit)
        )
        return [(seq, _record(kind, body)) for seq, kind, body in rows]


def _record(kind: str, body: bytes) -> Alert | WorkOrder:
    record = msgspec.msgpack.decode(body, type=KINDS[kind])
    assert isinstance(record, Alert | WorkOrder)
    return record
