"""Conversations: kept in order, forgotten for good, bounded."""

from __future__ import annotations

import pytest

from millhand.language.conversation import Conversation, Turn
from millhand.records import Citation
from millhand.store import conversations
from millhand.store.conversations import CONVERSATIONS_CAP

SECRET = "the foreman keeps the spare key behind the boiler"


def talk(number: int, changed_ns: int | None = None) -> Conversation:
    return Conversation(
        id=f"talk-{number}", title=f"question {number}", created_ns=number, changed_ns=changed_ns or number
    )


def pair(text: str, answer: str) -> list[Turn]:
    cited = (Citation("a1b2", "manual.pdf, page 3, line 1"),)
    return [
        Turn(role="user", text=text, at_ns=1),
        Turn(role="assistant", text=answer, at_ns=2, citations=cited),
    ]


async def test_turns_are_kept_in_order_over_a_restart(kit, path):
    first, second = pair("why", "because"), pair("and then", "nothing")
    async with kit.opened(path) as store:
        await store.append_turns(talk(1), first)
        await store.append_turns(talk(2), first)
        await store.append_turns(talk(1, changed_ns=9), second)
    async with kit.opened(path) as store:
        assert [known.id for known in await store.conversations()] == ["talk-1", "talk-2"]
        assert await store.turns("talk-1") == [*first, *second]
        assert await store.turns("talk-2") == first
        assert await store.turns("nobody") == []


async def test_what_is_deleted_is_not_in_the_file(kit, path):
    async with kit.opened(path) as store:
        await store.append_turns(talk(1), pair(SECRET, SECRET))
        await store.append_turns(talk(2), pair("why", "because"))
    assert SECRET.encode() in path.read_bytes()
    async with kit.opened(path) as store:
        assert await store.delete_conversation("talk-1")
        assert not await store.delete_conversation("talk-1")
        assert [known.id for known in await store.conversations()] == ["talk-2"]
        assert await store.turns("talk-1") == []
    assert SECRET.encode() not in path.read_bytes()


async def test_the_oldest_make_room(kit, path, monkeypatch):
    assert CONVERSATIONS_CAP >= 1000
    monkeypatch.setattr(conversations, "CONVERSATIONS_CAP", 3)
    async with kit.opened(path) as store:
        for number in range(1, 6):
            await store.append_turns(talk(number), pair("why", "because"))
        assert [known.id for known in await store.conversations()] == ["talk-5", "talk-4", "talk-3"]
        assert await store.turns("talk-1") == []


@pytest.mark.parametrize("text", ["", "\0", "\U0001f600" * 500, "为什么"])
async def test_any_text_comes_back(kit, path, text):
    async with kit.opened(path) as store:
        await store.append_turns(talk(1), pair(text, text))
        assert [turn.text for turn in await store.turns("talk-1")] == [text, text]
