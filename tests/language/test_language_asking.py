"""A question from retrieval to what is kept: a real store, a real pack, and a server that answers as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from millhand.conversation_calls import ConversationCalls
from millhand.errors import InputError, LanguageError, RefusedError
from millhand.language.asking import Asking, Question, repeated
from millhand.language.client import LanguageClient, Place
from millhand.language.pack import SHIPPED, read_pack
from millhand.language.passages import Passage
from millhand.store import Store

PASSAGES = [
    Passage(id="aa11", source="pump.pdf", page=3, line=7, text="Tighten the gland to 25 Nm."),
    Passage(id="bb22", source="seal.md", line=2, text="A worn seal weeps."),
]


class Server:
    """Answers each chat request with the next of `answers`, one event a word, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answers: list[str | bytes] = []
        self.context_tokens = 4096
        self.parameters = 7_000_000_000
        self.guarded = False
        self.reads = asyncio.Event()
        """Nothing is answered before."""
        self.reads.set()
        self._url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        )
        self.asked.append(json.loads(await reader.readexactly(size)))
        await self.reads.wait()
        answer = self.answers.pop(0)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        if isinstance(answer, bytes):
            writer.write(answer)
        else:
            for word in answer.split(" "):
                event = {"choices": [{"delta": {"content": f"{word} "}}]}
                writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            writer.write(b"data: [DONE]\n\n")
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    def place(self) -> Place:
        return Place(self._url, guarded=self.guarded)

    def models(self) -> list[dict[str, Any]]:
        return (
            [{"name": "small", "context_tokens": self.context_tokens, "parameters": self.parameters}]
            if self._url
            else []
        )


class Manuals:
    """Always finds the same, and remembers what for."""

    def __init__(self) -> None:
        self.searched: list[tuple[str, str, int]] = []
        self.found = PASSAGES

    async def search(self, query: str, asset: str = "", limit: int = 5) -> list[Passage]:
        self.searched.append((query, asset, limit))
        return self.found


@pytest.fixture
async def site(tmp_path) -> AsyncIterator[tuple[Server, Manuals, Store, Asking]]:
    server, manuals = Server(), Manuals()
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    server._url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    store = await Store.open(tmp_path / "s.db")
    client = LanguageClient(server.place, server.models)
    asking = Asking(store, client, manuals.search, read_pack(SHIPPED / "maintenance"))
    async with listener:
        yield server, manuals, store, asking
    await store.close()


async def events(asking: Asking, question: Question) -> list[dict[str, Any]]:
    return [event async for event in asking.ask(question)]


async def test_an_answer_comes_with_its_sources_and_is_kept(site):
    server, manuals, store, asking = site
    server.answers = ["Tighten it to 25 Nm [S1]."]
    sources, *pieces, end = await events(asking, Question("The gland weeps, what now?", asset="pump-1"))
    assert [(source["label"], source["place"]) for source in sources["sources"]] == [
        ("S1", "pump.pdf, page 3, line 7"),
        ("S2", "seal.md, line 2"),
    ]
    assert "".join(piece["text"] for piece in pieces) == "Tighten it to 25 Nm [S1]. "
    assert end["end"]["citations"] == {"S1": "pump.pdf, page 3, line 7"}
    assert end["end"]["unknown_citations"] == []
    assert manuals.searched == [("The gland weeps, what now?", "pump-1", 4)]
    policy, asked = server.asked[0]["messages"]
    assert policy["role"] == "system" and "Never invent part numbers" in policy["content"]
    assert "[S1] (pump.pdf, page 3, line 7) Tighten the gland to 25 Nm." in asked["content"]
    (known,) = await store.conversations()
    assert (known.title, known.asset) == ("The gland weeps, what now?", "pump-1")
    said = await store.turns(known.id)
    assert [(turn.role, turn.text) for turn in said] == [
        ("user", "The gland weeps, what now?"),
        ("assistant", "Tighten it to 25 Nm [S1]."),
    ]
    assert [citation.id for citation in said[1].citations] == ["aa11"]


async def test_waiting_is_told_while_the_model_reads(site, monkeypatch):
    server, _, _, asking = site
    monkeypatch.setattr("millhand.language.asking.TELL_EVERY_S", 0.01)
    server.answers = ["Tighten it [S1]."]
    server.reads.clear()
    seen: list[dict[str, Any]] = []
    async for event in asking.ask(Question("why")):
        seen.append(event)
        if [found for found in seen if "waited_s" in found][2:]:
            server.reads.set()
    kinds = [next(iter(event)) for event in seen]
    assert kinds[:4] == ["sources", "waited_s", "waited_s", "waited_s"] and kinds[-2:] == ["text", "end"]
    waits = [event["waited_s"] for event in seen if "waited_s" in event]
    assert waits == sorted(waits)


async def test_an_answer_that_repeats_itself_is_cut_and_marked(site):
    server, _, store, asking = site
    server.answers = ["First look. " + "Tighten the gland of the pump. " * 30]
    found = await events(asking, Question("why"))
    assert {"notice": "the model began to repeat itself: the answer was cut off there"} in found
    assert "".join(event.get("text", "") for event in found).endswith(" […]") and len(found) < 60
    (known,) = await store.conversations()
    assert (await store.turns(known.id))[1].text == "First look. Tighten the gland of the pump. […]"


@pytest.mark.parametrize(
    "text",
    [
        "Check bolt 1: 45 Nm\nCheck bolt 2: 45 Nm\nCheck bolt 3: 45 Nm\n",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "No, no, no, no.",
        "Tighten the gland of the pump. Tighten the gland of the pump.",
    ],
)
def test_what_is_no_repetition(text):
    assert all(repeated(text[:end]) == 0 for end in range(len(text) + 1))


async def test_a_source_that_was_not_given_is_named(site):
    server, _, _, asking = site
    server.answers = ["See [S2] and [S9] and [order]."]
    *_, end = await events(asking, Question("why"))
    assert (list(end["end"]["citations"]), end["end"]["unknown_citations"]) == (["S2"], ["S9"])


async def test_a_conversation_goes_on_and_says_what_it_leaves_out(site):
    server, _, store, asking = site
    server.answers = ["word " + " ".join(f"w{number}" for number in range(500)), "Yes.", "No."]
    await events(asking, Question("one"))
    (known,) = await store.conversations()
    await events(asking, Question("two", conversation=known))
    assert [message["content"][:4] for message in server.asked[1]["messages"][1:3]] == ["one", "word"]
    server.context_tokens = 900
    found = await events(asking, Question("three", conversation=known))
    assert [event["notice"] for event in found if "notice" in event] == [
        "2 earlier turns of this conversation lie too far back for the model to see"
    ]
    assert [message["content"] for message in server.asked[2]["messages"][1:3]] == ["two", "Yes."]
    assert len(await store.turns(known.id)) == 6


async def test_guards_are_told_what_comes_from_where(site):
    server, _, _, asking = site
    server.answers, server.guarded = ["Fine.", "Fine."], True
    await events(asking, Question("why"))
    own = server.asked[0].pop("millhand")
    assert own["parts"] == [
        {"source": "client", "text": "why"},
        {"source": "knowledge", "text": PASSAGES[0].text},
        {"source": "knowledge", "text": PASSAGES[1].text},
    ]
    assert own["grounds"] == [passage.text for passage in PASSAGES]
    assert all(part["text"] in server.asked[0]["messages"][-1]["content"] for part in own["parts"])
    server.guarded = False
    await events(asking, Question("why"))
    assert "millhand" not in server.asked[1]


async def test_a_small_model_is_asked_plainly(site):
    server, _, _, asking = site
    server.answers, server.parameters = ["Fine."], 135_000_000
    sources, *_, end = await events(asking, Question("why"))
    asked = server.asked[0]["messages"][-1]["content"]
    assert "square brackets" not in asked and "Tighten the gland" in asked and asked.endswith("why")
    assert len(sources["sources"]) == 2 and end["end"]["citations"] == {}


async def test_passages_make_room_for_a_long_question(site):
    server, manuals, _, asking = site
    server.answers, server.context_tokens = ["Fine."], 1000
    manuals.found = [Passage(id=f"p{number}", source=f"{number}.md", text="x" * 900) for number in range(4)]
    await events(asking, Question("why " * 10))
    shown = server.asked[0]["messages"][-1]["content"]
    assert ("0.md" in shown, "3.md" in shown) == (True, False)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b'data: {"error": {"message": "an override", "code": "content_filter"}}\n\n', RefusedError),
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', LanguageError),
        (b'data: {"choices": [{"delta": {}, "finish_reason": "content_filter"}]}\n\ndata: [DONE]\n\n', RefusedError),
        (b"data: [DONE]\n\n", LanguageError),
    ],
)
async def test_what_did_not_come_whole_is_not_kept(site, answer, error):
    server, _, store, asking = site
    server.answers = [answer]
    with pytest.raises(error):
        await events(asking, Question("why"))
    assert await store.conversations() == []


@pytest.mark.parametrize(("text", "message"), [(" \n", "is empty"), ("x" * 40_000, "more than 32768")])
async def test_what_is_no_question_is_refused(site, text, message):
    server, _, _, asking = site
    with pytest.raises(InputError, match=message):
        await events(asking, Question(text))
    assert server.asked == []


async def test_a_node_without_a_model_says_what_to_do(site):
    server, _, _, asking = site
    server._url = ""
    with pytest.raises(LanguageError, match="no language model is configured"):
        await events(asking, Question("why"))


async def test_what_the_control_socket_is_asked(site):
    server, _, store, asking = site
    calls: dict[str, Callable[..., Any]] = ConversationCalls(store, lambda: asking, lambda: ["pump-1"]).handlers()
    server.answers = ["One [S1].", "Two.", "Three."]
    for question in ("first", "second"):
        assert [event async for event in calls["ask"](question)][-1]["end"]
    second, first = await calls["conversation.list"]()
    assert [event async for event in calls["ask"]("more", conversation_id=first["id"][:8])]
    shown = await calls["conversation.show"](first["id"][:8])
    assert [turn["text"] for turn in shown["turns"]] == ["first", "One [S1].", "more", "Three."]
    with pytest.raises(InputError, match="no conversations have an id"):
        [event async for event in calls["ask"]("more", conversation_id="ffff-not")]
    with pytest.raises(InputError, match="asset 'pump-2' is not known; did you mean 'pump-1'"):
        [event async for event in calls["ask"]("more", asset="pump-2")]
    assert (await calls["conversation.show"]("last"))["id"] == first["id"]
    with pytest.raises(InputError, match="no work orders have an id"):
        [event async for event in calls["ask"]("more", order_id="ffff-not")]
    assert await calls["conversation.delete"](second["id"]) == {"deleted": 1}
    with pytest.raises(InputError, match="name one conversation, or all"):
        await calls["conversation.delete"]()
    assert await calls["conversation.delete"](all=True) == {"deleted": 1}
    assert await calls["conversation.list"]() == []
