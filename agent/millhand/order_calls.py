"""What CLI and page may ask of work orders: list, versions, a technician's edit, and the pairs that edits make."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from millhand.errors import InputError
from millhand.ids import ID_SEARCH_LIMIT, by_prefix
from millhand.language.form import edited
from millhand.records import TECHNICIAN, WorkOrder

if TYPE_CHECKING:
    from millhand.control import Handler
    from millhand.store import Store

PAIRS_AT_ONCE = 100


class OrderCalls:
    """Answers for one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def handlers(self) -> dict[str, Handler]:
        return {
            "order.list": self.order_list,
            "order.show": self.order_show,
            "order.versions": self.order_versions,
            "order.edit": self.order_edit,
            "order.pairs": self.order_pairs,
        }

    async def order_list(self, asset: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        return [_plain(order) for order in await self._store.orders(asset=asset, limit=limit)]

    async def order_show(self, order_id: str) -> dict[str, Any]:
        return _plain(await self._order(order_id))

    async def order_versions(self, order_id: str) -> list[dict[str, Any]]:
        """Every version, oldest first."""
        order = await self._order(order_id)
        return [_plain(version) for version in await self._store.order_versions(order.id)]

    async def order_edit(self, order_id: str, changes: dict[str, Any], by: str, revision: int) -> dict[str, Any]:
        """Store what a person changed as a new version; `revision` is the one that was looked at.

        Raises InputError where a field is not known or too long, or another version has come meanwhile.
        """
        name = " ".join(by.split())
        if not name:
            raise InputError("an edit needs the name of who made it", hint="give one with --by")
        order = await self._order(order_id)
        changed = edited(order, changes)
        writer, now_ns = f"{TECHNICIAN} {name}", time.time_ns()
        version = msgspec.structs.replace(changed, writer=writer, struck=(), revised_ns=now_ns, revision=revision)
        stored = await self._store.revise_order(version, by_person=True)
        if stored is None:
            raise InputError(
                f"work order '{order.id[:8]}' has a newer version than {revision}",
                hint=f"look at it and edit again: millhand order show {order.id[:8]}",
            )
        return _plain(stored)

    async def order_pairs(self, after: int = 0) -> list[dict[str, Any]]:
        """Some pairs behind place `after`, oldest first; none at the end."""
        pairs = await self._store.order_pairs(after, PAIRS_AT_ONCE)
        return [{"place": place, "before": _plain(old), "after": _plain(new)} for place, old, new in pairs]

    async def _order(self, order_id: str) -> WorkOrder:
        return by_prefix(await self._store.orders(limit=ID_SEARCH_LIMIT), order_id, "work order")


def _plain(order: WorkOrder) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(order)
    return plain
