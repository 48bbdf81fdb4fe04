"""A question to the node's language model: what is retrieved for it, what the model is told, and what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from millhand.errors import InputError, LanguageError
from millhand.language.client import SMALL_PARAMETERS, LanguageClient
from millhand.language.conversation import Conversation, Turn, fitting, title_of
from millhand.language.guarding import Part
from millhand.records import Citation, WorkOrder

if TYPE_CHECKING:
    from millhand.language.pack import Pack
    from millhand.language.passages import Passage
    from millhand.store import Store

PASSAGES = 4
PASSAGE_CHARS = 900
"""What of a passage the model is shown: a small model loses the thread in more."""
ANSWER_TOKENS_CAP = 384
CONTEXT_TOKENS = 2048
"""Of a model that does not tell."""
QUESTION_BYTES_CAP = 32 << 10
ASK, ASK_SMALL = "ask", "ask_small"
"""Prompts of the pack."""
TELL_EVERY_S = 2.0
CUT = "[…]"
"""Where an answer was cut off."""
REPEATED_CHARS_LEAST, REPEATED_CHARS_CAP = 20, 400
_LETTERS = re.compile(r"[^\W\d_]")
_CITED = re.compile(r"\[\s*(S\d+|order)\s*\]", re.IGNORECASE)
ORDER = "order"
"""The label of the work order among the sources; passages are S1, S2, ...: a small model copies those without fault."""


Search = Callable[[str, str, int], Awaitable[Sequence["Passage"]]]
"""Query, asset, at most so many -> what the knowledge base found, best first."""


@dataclass(frozen=True)
class Question:
    """What a person asks."""

    text: str
    asset: str = ""
    order: WorkOrder | None = None
    """The work order that it is about."""
    conversation: Conversation | None = None
    """None begins a new one."""
    language: str = "en"


class Asking:
    """Answers questions and keeps the conversations."""

    def __init__(self, store: Store, client: LanguageClient, search: Search, pack: Pack) -> None:
        self._store = store
        self._client = client
        self._search = search
        self._pack = pack

    async def ask(self, question: Question) -> AsyncIterator[dict[str, Any]]:
        """Yield what happens: `sources` first, `notice` where something was left out or cut off, `waited_s` as long as
        the model reads, `text` piece by piece, `end` with the conversation and what the answer cited. Only an answer
        that came to its end, or was cut where it repeats itself, is kept.

        Raises InputError for a question that is empty or too long, LanguageError, RefusedError.
        """
        text = question.text.strip()
        _check(text)
        context_tokens = int(self._client.model().get("context_tokens") or CONTEXT_TOKENS)
        answer_tokens = min(ANSWER_TOKENS_CAP, context_tokens // 3)
        passages = await self._passages(text, question)
        yield {
            "sources": [{**msgspec.to_builtins(p), "label": label, "place": p.place} for label, p in passages.items()]
        }
        messages, left_out = await self._messages(question, text, passages, context_tokens - answer_tokens)
        if left_out:
            turns = "1 earlier turn" if left_out == 1 else f"{left_out} earlier turns"
            yield {"notice": f"{turns} of this conversation lie too far back for the model to see"}
        answer = ""
        parts, grounds = _parts(text, passages, question.order)
        pieces = self._client.stream(messages, max_tokens=answer_tokens, parts=parts, grounds=grounds)
        async with contextlib.aclosing(_with_waits(pieces)) as coming:
            async for piece in coming:
                if isinstance(piece, float):
                    yield {"waited_s": piece}
                    continue
                answer += piece
                yield {"text": piece}
                if again := repeated(answer):
                    answer = f"{answer[: len(answer) - again].rstrip()} {CUT}"
                    yield {"text": f" {CUT}"}
                    yield {"notice": "the model began to repeat itself: the answer was cut off there"}
                    break
        if not answer.strip():
            raise LanguageError("the language model gave an empty answer", hint="ask again, or in other words")
        yield {"end": await self._keep(question, text, answer.strip(), passages)}

    @property
    def _prompt(self) -> str:
        """A small model loses itself in instructions: it is not asked to cite, the sources are shown all the same."""
        small = 0 < self._client.parameters < SMALL_PARAMETERS and ASK_SMALL in self._pack.prompts
        return ASK_SMALL if small else ASK

    async def _passages(self, text: str, question: Question) -> dict[str, Passage]:
        """What retrieval found, by the label that the model is to cite."""
        asset = question.asset or (question.order.asset if question.order else "")
        found = await self._search(text, asset, PASSAGES)
        return {f"S{number}": passage for number, passage in enumerate(found, 1)}

    async def _messages(
        self, question: Question, text: str, passages: Mapping[str, Passage], tokens_cap: int
    ) -> tuple[list[Mapping[str, str]], int]:
        known = question.conversation
        earlier = [] if known is None else await self._store.turns(known.id)
        language = question.language if question.language in self._pack.manifest.languages else "en"
        for shown in range(len(passages), -1, -1):
            sources = _sources(dict(list(passages.items())[:shown]), question.order)
            asked = self._pack.prompt(self._prompt, language, sources=sources, question=text)
            try:
                return fitting(self._pack.prompt("policy", language), earlier, asked, tokens_cap)
            except InputError:
                if not shown:
                    raise
        raise AssertionError("unreachable")

    async def _keep(
        self, question: Question, text: str, answer: str, passages: Mapping[str, Passage]
    ) -> dict[str, Any]:
        now_ns = time.time_ns()
        cited = {label.upper() for label in _CITED.findall(answer)} - {ORDER.upper()}
        citations = tuple(Citation(passage.id, passage.place) for label, passage in passages.items() if label in cited)
        known = question.conversation or Conversation(
            id=str(uuid.uuid4()), title=title_of(text), created_ns=now_ns, changed_ns=now_ns
        )
        changed = msgspec.structs.replace(
            known,
            changed_ns=now_ns,
            asset=question.asset or known.asset,
            order_id=question.order.id if question.order else known.order_id,
        )
        turns = [
            Turn(role="user", text=text, at_ns=now_ns),
            Turn(role="assistant", text=answer, at_ns=now_ns, citations=citations),
        ]
        await self._store.append_turns(changed, turns)
        return {
            "conversation": msgspec.to_builtins(changed),
            "citations": {label: passages[label].place for label in sorted(cited & passages.keys())},
            "cites": self._prompt == ASK,
            "unknown_citations": sorted(cited - passages.keys()),
        }


async def _with_waits(pieces: AsyncGenerator[str]) -> AsyncGenerator[str | float]:
    """The pieces; before the first, every `TELL_EVERY_S`, for how many seconds it has been waited for."""
    begun_s = time.monotonic()
    async with contextlib.aclosing(pieces):
        first = asyncio.ensure_future(anext(pieces, None))
        try:
            while not (await asyncio.wait({first}, timeout=TELL_EVERY_S))[0]:
                yield time.monotonic() - begun_s
            piece = await first
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        if piece is not None:
            yield piece
        async for piece in pieces:
            yield piece


def repeated(text: str) -> int:
    """How many characters at the end say again, for the second and third time, what stands before them; 0: none do.

    Only what is long enough to be no habit of speech counts, and what has words: a table's rules repeat themselves too.
    """
    for size in range(REPEATED_CHARS_LEAST, min(REPEATED_CHARS_CAP, len(text) // 3) + 1):
        block = text[-size:]
        if text.endswith(block, 0, -size) and text.endswith(block, 0, -2 * size) and len(_LETTERS.findall(block)) > 9:
            return 2 * size
    return 0


def _check(text: str) -> None:
    if not text:
        raise InputError("the question is empty", hint="write what you want to know")
    if len(text.encode()) > QUESTION_BYTES_CAP:
        raise InputError(
            f"the question has {len(text.encode())} bytes, more than {QUESTION_BYTES_CAP}",
            hint="ask about a part of it, or add the text with: millhand knowledge add FILE",
        )


def _sources(passages: Mapping[str, Passage], order: WorkOrder | None) -> str:
    """What the answer may rest on, each with the label that it is cited by."""
    found = [f"[{label}] ({passage.place}) {passage.text[:PASSAGE_CHARS]}" for label, passage in passages.items()]
    if order is not None:
        found.insert(0, f"[{ORDER}] (work order for {order.asset}) {_about(order)}")
    return "\n".join(found) or "(none)"


def _about(order: WorkOrder) -> str:
    steps = " ".join(f"{number}. {step}" for number, step in enumerate(order.action, 1))
    return f"{order.symptom} Likely cause: {order.likely_cause} Steps: {steps}"


def _parts(text: str, passages: Mapping[str, Passage], order: WorkOrder | None) -> tuple[list[Part], list[str]]:
    """What guards look at in the prompt, by where it comes from; and what the answer may rest on."""
    data = [Part("knowledge", passage.text[:PASSAGE_CHARS]) for passage in passages.values()]
    data += [] if order is None else [Part("order", _about(order))]
    return [Part("client", text), *data], [part.text for part in data]
