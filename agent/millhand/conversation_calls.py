"""What CLI and page may ask of conversations: a question, the list, one whole, and to forget it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from typing import TYPE_CHECKING, Any

import msgspec

from millhand.errors import InputError, suggestion
from millhand.ids import ID_SEARCH_LIMIT, by_prefix
from millhand.language.asking import Asking, Question
from millhand.language.conversation import Conversation

if TYPE_CHECKING:
    from millhand.control import Handler
    from millhand.store import Store


LAST = "last"
"""In the place of an id: the conversation that was changed last."""


class ConversationCalls:
    """Answers for one store; `asking` is made where the first question comes."""

    def __init__(self, store: Store, asking: Callable[[], Asking], assets: Callable[[], Collection[str]]) -> None:
        self._store = store
        self._assets = assets
        self._asking = asking

    def handlers(self) -> dict[str, Handler]:
        return {
            "ask": self.ask,
            "conversation.list": self.conversation_list,
            "conversation.show": self.conversation_show,
            "conversation.delete": self.conversation_delete,
        }

    async def ask(
        self, question: str, asset: str = "", order_id: str = "", conversation_id: str = "", language: str = "en"
    ) -> AsyncIterator[dict[str, Any]]:
        """As `Asking.ask`. Raises InputError for an asset or an id that is not known."""
        if asset and asset not in self._assets():
            known_assets = ", ".join(sorted(self._assets())) or "none"
            raise InputError(
                f"asset '{asset}' is not known{suggestion(asset, self._assets())}", hint=f"known: {known_assets}"
            )
        order = None
        if order_id:
            orders = await self._store.orders(limit=ID_SEARCH_LIMIT)
            order = by_prefix(orders, order_id, "work order")
        known = await self._conversation(conversation_id) if conversation_id else None
        asked = Question(question, asset, order, known, language)
        async for event in self._asking().ask(asked):
            yield event

    async def conversation_list(self, limit: int = 50) -> list[dict[str, Any]]:
        """Newest first."""
        return [msgspec.to_builtins(known) for known in await self._store.conversations(limit)]

    async def conversation_show(self, conversation_id: str) -> dict[str, Any]:
        """One conversation with all its turns."""
        known = await self._conversation(conversation_id)
        return {**msgspec.to_builtins(known), "turns": msgspec.to_builtins(await self._store.turns(known.id))}

    async def conversation_delete(self, conversation_id: str = "", all: bool = False) -> dict[str, int]:
        """Forget one, or all of them."""
        if bool(conversation_id) == all:
            raise InputError("name one conversation, or all", hint="millhand conversation delete ID, or --all")
        found = await self._store.conversations(ID_SEARCH_LIMIT) if all else [await self._conversation(conversation_id)]
        return {"deleted": sum([await self._store.delete_conversation(known.id) for known in found])}

    async def _conversation(self, conversation_id: str) -> Conversation:
        found = await self._store.conversations(ID_SEARCH_LIMIT)
        if conversation_id == LAST and found:
            return found[0]
        return by_prefix(found, conversation_id, "conversation")
