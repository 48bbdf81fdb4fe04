"""Versions of work orders: numbered, both kept, told on the stream; edits as pairs; an old file keeps all its rows."""

from __future__ import annotations

import sqlite3

import msgspec
import pytest

from millhand.errors import StoreError
from millhand.records import TECHNICIAN, AlertState, WorkOrder
from millhand.store.alerts import PAIRS_CAP
from millhand.store.database import APPLICATION_ID, migrations

SECOND_DAYS = 1 / 86_400


def version_of(order: WorkOrder, writer: str, **changes: object) -> WorkOrder:
    return msgspec.structs.replace(order, writer=writer, revised_ns=order.created_ns + 1, **changes)


async def test_a_version_is_numbered_kept_and_told(kit, path):
    async with kit.opened(path) as store:
        draft = kit.order(1)
        await store.commit(kit.step(0, orders=(draft,)))
        seen = store.changed.count
        second = await store.revise_order(version_of(draft, "model", likely_cause="a dry bearing"))
        assert second.revision == 2
        assert store.changed.count > seen
        third = await store.revise_order(version_of(second, f"{TECHNICIAN} kim", minutes=40), by_person=True)
        assert await store.order(draft.id) == third == (await store.orders())[0]
        assert await store.order_versions(draft.id) == [draft, second, third]
        told = [row.record() for row in await store.pending("alert", 0)]
        assert told == [draft, second, third]
        assert await store.order_pairs() == [(1, second, third)]
    async with kit.opened(path) as store:
        assert await store.order_versions(draft.id) == [draft, second, third]


async def test_a_version_of_an_old_version_changes_nothing(kit, path):
    async with kit.opened(path) as store:
        draft = kit.order(1)
        await store.commit(kit.step(0, orders=(draft,)))
        edited = await store.revise_order(version_of(draft, f"{TECHNICIAN} kim"), by_person=True)
        assert await store.revise_order(version_of(draft, "model")) is None
        assert await store.order(draft.id) == edited
        assert len(await store.pending("alert", 0)) == 2
        with pytest.raises(StoreError, match="not known"):
            await store.revise_order(kit.order(7))


async def test_the_writer_that_writes_again_does_not_undo_a_version(kit, path):
    async with kit.opened(path) as store:
        draft = kit.order(1)
        await store.commit(kit.step(0, orders=(draft,)))
        second = await store.revise_order(version_of(draft, "model"))
        await store.commit(kit.step(1, orders=(draft,)))
        assert await store.order(draft.id) == second
        assert await store.order_versions(draft.id) == [draft, second]


async def test_an_edit_of_an_edit_is_paired_with_what_a_machine_wrote_last(kit, path):
    async with kit.opened(path) as store:
        draft = kit.order(1)
        await store.commit(kit.step(0, orders=(draft,)))
        machine = await store.revise_order(version_of(draft, "model"))
        first = await store.revise_order(version_of(machine, f"{TECHNICIAN} kim", skill="fitter"), by_person=True)
        second = await store.revise_order(version_of(first, f"{TECHNICIAN} kim", minutes=5), by_person=True)
        assert await store.order_pairs() == [(1, machine, first), (2, machine, second)]
        assert await store.order_pairs(after=1) == [(2, machine, second)]
        assert await store.order_pairs(limit=1) == [(1, machine, first)]
    connection = sqlite3.connect(path)
    connection.execute("UPDATE order_pair SET id = ? WHERE id = 2", (PAIRS_CAP + 1,))
    connection.commit()
    connection.close()
    async with kit.opened(path) as store:
        await store.revise_order(version_of(second, f"{TECHNICIAN} kim", minutes=6), by_person=True)
        # PAIRS_CAP pairs are kept: the oldest has gone.
        assert [place for place, _, _ in await store.order_pairs()] == [PAIRS_CAP + 1, PAIRS_CAP + 2]


async def test_versions_go_with_their_order_and_pairs_stay(kit, path):
    async with kit.opened(path, alert_age_cap_days=2 * SECOND_DAYS) as store:
        draft = kit.order(1)
        await store.commit(kit.step(0, alerts=(kit.alert(1, state=AlertState.CLEARED),), orders=(draft,)))
        await store.revise_order(version_of(draft, f"{TECHNICIAN} kim"), by_person=True)

        async def gone() -> bool:
            return not await store.orders() and not await store.order_versions(draft.id)

        await kit.until(gone, 30)
        assert len(await store.order_pairs()) == 1


async def test_an_old_file_keeps_all_its_rows(kit, path):
    """A file of the first schema, with orders as they were before they had versions."""
    old = [msgspec.to_builtins(kit.order(number)) for number in range(3)]
    newer = {name for name in WorkOrder.__struct_fields__ if name not in OLD_FIELDS}
    bodies = [msgspec.msgpack.encode({k: v for k, v in order.items() if k not in newer}) for order in old]
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(f"{migrations()[1]}; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1;")
    connection.execute("INSERT INTO asset (id, name) VALUES (1, 'pump')")
    for seq, (order, body) in enumerate(zip(old, bodies, strict=True), 1):
        values = (order["id"], order["alert_id"], 1, order["created_ns"], 0, body)
        connection.execute("INSERT INTO work_order VALUES (?, ?, ?, ?, ?, ?)", values)
        connection.execute("INSERT INTO alert_row VALUES (?, 1, 'order', 0, 0, ?)", (seq, body))
    connection.execute("UPDATE stream SET last = 3, row_count = 3 WHERE name = 'alert'")
    connection.close()
    async with kit.opened(path) as store:
        orders = {order.id: order for order in await store.orders()}
        assert orders == {f"order-{number}": kit.order(number) for number in range(3)}
        for order in orders.values():
            assert (order.revision, order.language, order.struck) == (1, "en", ())
            assert await store.order_versions(order.id) == [order]
        assert [row.record() for row in await store.pending("alert", 0)] == [kit.order(number) for number in range(3)]
        assert (await store.revise_order(version_of(kit.order(1), "model"))).revision == 2
        assert len(await store.order_versions("order-1")) == 2


OLD_FIELDS = (
    *("id", "alert_id", "asset", "symptom", "likely_cause", "action", "priority", "created_ns", "evidence", "writer"),
    "state",
)
