"""Conversations with the node's language model: what is kept of them, and what of a long one the model still sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from millhand.errors import InputError
from millhand.records import Citation

TITLE_CHARS = 60
BYTES_PER_TOKEN = 3
"""A low guess, so that what is thought to fit does: English has 4 to 5 bytes a token, a Chinese character is 3 bytes
and about one token, part numbers and figures come near 2."""


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was said."""

    role: Literal["user", "assistant"]
    text: str
    at_ns: int
    citations: tuple[Citation, ...] = ()
    """What the answer names of its sources."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """What a list shows of a conversation; its turns lie beside it."""

    id: str
    title: str
    """The beginning of its first question."""
    created_ns: int
    changed_ns: int
    asset: str = ""
    order_id: str = ""
    """The work order that it belongs to."""


def title_of(question: str) -> str:
    """The first words of a question, on one line."""
    words = " ".join(question.split())
    return words if len(words) <= TITLE_CHARS else words[: TITLE_CHARS - 1].rstrip() + "…"


def tokens_of(text: str) -> int:
    """How many tokens a text may take: a guess that errs to the high side."""
    return len(text.encode()) // BYTES_PER_TOKEN + 4


def fitting(policy: str, turns: Sequence[Turn], question: str, tokens_cap: int) -> tuple[list[Mapping[str, str]], int]:
    """The messages that the model is sent, and how many earlier turns were left out.

    The policy and the question always stay; of the earlier turns the newest whole pairs of question and answer do.
    Raises InputError where policy and question alone are longer than `tokens_cap`.
    """
    left = tokens_cap - tokens_of(policy) - tokens_of(question)
    if left < 0:
        raise InputError(
            f"the question with its sources needs about {tokens_cap - left} tokens, {tokens_cap} are left for it",
            hint="ask a shorter question, or raise [language] context_tokens",
        )
    kept = len(turns)
    while kept and turns[kept - 1].role == "assistant":
        start = kept - 2 if kept > 1 else kept - 1
        cost = sum(tokens_of(turn.text) for turn in turns[start:kept])
        if cost > left:
            break
        left, kept = left - cost, start
    messages: list[Mapping[str, str]] = [{"role": "system", "content": policy}]
    messages += [{"role": turn.role, "content": turn.text} for turn in turns[kept:]]
    return [*messages, {"role": "user", "content": question}], kept
