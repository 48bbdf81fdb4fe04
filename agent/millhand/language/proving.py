"""A server is believed once it has completed something: health alone proves nothing."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any

import msgspec

from millhand.errors import LanguageError, MillhandError
from millhand.language.exchange import Reply, exchange
from millhand.language.launch import Ability
from millhand.language.process import ServerProcess, require_owner

HEALTH_TIMEOUT_S = 5.0
POLL_S = 0.1
PROOF_TOKENS = 8
PROOF_TEXT = "Say that you are ready."
WORDS_CHARACTERS = 300
Send = Callable[..., Awaitable[Reply]]
"""`exchange` with time and headers."""


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen when a server was proved."""

    text: str
    """The answer; empty for a model that embeds."""
    tokens: int
    """Tokens of the answer; of a model that embeds, numbers of the vector."""
    seconds: float
    """Time that it took, the first use of everything included."""


async def await_health(process: ServerProcess, url: str) -> None:
    """Wait until it says that it is well, and see to it that it is ours that says so. Raises LanguageError where the
    process ends before, or another one has its port.
    """
    while not await healthy(url, HEALTH_TIMEOUT_S):
        if process.ended:
            return  # whoever watches it tells how it ended
        await asyncio.sleep(POLL_S)
    await asyncio.to_thread(require_owner, process)


async def healthy(url: str, timeout_s: float) -> bool:
    """Whether its page /health says 200 within that time."""
    try:
        return (await exchange(f"{url}/health", timeout_s=timeout_s)).status == 200
    except (LanguageError, TimeoutError):
        return False


async def prove(
    url: str, model: str, abilities: Collection[Ability], embeds: bool, timeout_s: float, headers: Mapping[str, str]
) -> Proof:
    """Have it complete something short; `headers` show its key. Raises LanguageError naming what is wrong with it."""
    ask = _embedding if embeds else _completion
    begun_s = time.perf_counter()
    try:
        text, tokens = await ask(partial(exchange, timeout_s=timeout_s, headers=headers), url, model, abilities)
    except TimeoutError as error:
        raise LanguageError(
            f"it says that it is well, but gave no completion within {timeout_s:.0f} s",
            hint="see its log; on a slow node raise [language] start_timeout_s",
        ) from error
    return Proof(text=text, tokens=tokens, seconds=time.perf_counter() - begun_s)


async def _completion(send: Send, url: str, model: str, abilities: Collection[Ability]) -> tuple[str, int]:
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": PROOF_TEXT}],
        "max_tokens": PROOF_TOKENS,
        "temperature": 0,
    }
    answer = answered(await send(f"{url}/v1/chat/completions", body=asked))
    text, reasoning = message_of(answer)
    if not (text + reasoning).strip():
        raise LanguageError("its completion is empty", hint="is it a model that chats? see its chat template")
    if "usage" not in abilities:
        return text, 0
    tokens = answer.get("usage", {}).get("completion_tokens")
    if type(tokens) is not int or not 1 <= tokens <= PROOF_TOKENS + 1:  # some count the end
        raise LanguageError(f"it counts {tokens!r} tokens in a completion of at most {PROOF_TOKENS}")
    return text or reasoning, tokens


async def _embedding(send: Send, url: str, model: str, abilities: Collection[Ability]) -> tuple[str, int]:
    asked = {"model": model, "input": PROOF_TEXT}
    answer = answered(await send(f"{url}/v1/embeddings", body=asked))
    try:
        vector = [float(value) for value in answer["data"][0]["embedding"]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LanguageError(f"its embedding is none: {_shown(answer)}") from error
    if not vector or not all(map(math.isfinite, vector)) or not any(vector):
        raise LanguageError("its embedding is empty, zero or not finite")
    return "", len(vector)


def answered(reply: Reply) -> dict[str, Any]:
    """The JSON object of an answer. Raises LanguageError with the server's own words where it is an error or none."""
    try:
        answer = msgspec.json.decode(reply.body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LanguageError(f"it answered {reply.status} with what is no JSON: {_shown(reply.body[:200])}") from error
    if reply.status != 200:
        raise refusal(reply.status, answer)
    if not isinstance(answer, dict):
        raise LanguageError(f"its answer is no object: {_shown(answer)}")
    return answer


def refusal(status: int, answer: Any) -> MillhandError:
    """The error for what a server answered in place of a completion."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    words = error.get("message", error) if isinstance(error, dict) else error
    return LanguageError(f"it answered {status}: {_shown(words)}", retriable=status in (408, 429) or status >= 500)


def message_of(answer: dict[str, Any]) -> tuple[str, str]:
    """Text and reasoning of the first choice. Raises LanguageError where there is none."""
    try:
        message = answer["choices"][0]["message"]
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""  # the second is vLLM's name
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise LanguageError(f"its answer is no completion: {_shown(answer)}") from error
    if not isinstance(text, str) or not isinstance(reasoning, str):
        raise LanguageError(f"its answer is no completion: {_shown(answer)}")
    return text, reasoning


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text[:WORDS_CHARACTERS]
