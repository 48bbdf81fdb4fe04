"""One process of the load: streams of chat against one server; prints one JSON line.

    python benchmarks/gpu/streams.py URL MODEL STREAMS SECONDS SEED [--temperature 0] [--questions]

Each stream asks again and again, with another prompt each time so that no prefix is known, until the time is over; what
was begun before is finished. Tokens are the server's own count (`usage`). The variable STREAMS_KEY is what the server
wants to be shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

WORDS = ("pump", "bearing", "seal", "gland", "motor", "belt", "valve", "oil", "leak", "noise", "heat", "shaft")

MACHINES = ("feed pump", "gearbox", "conveyor", "hydraulic press", "cooling fan", "air compressor", "spindle", "mixer")
SIGNS = ("runs hot", "vibrates", "leaks oil", "makes a grinding noise", "stops after a minute",
         "draws too much current", "smells of burnt rubber", "loses pressure")  # fmt: skip
WISHES = ("What should I check first?", "What are the likely causes?", "How do I find out why, step by step?",
          "Which parts wear out and do this?", "How do I tell a bad bearing from a bad seal here?")  # fmt: skip


@dataclass
class Seen:
    """What all streams of this process saw."""

    first_ms: list[float] = field(default_factory=list)
    """From the request to the first token."""
    token_ms: list[float] = field(default_factory=list)
    """Of each answer the mean time from token to token."""
    spans: list[tuple[float, float, int]] = field(default_factory=list)
    """Of each answer when its first and its last token came, and how many there were."""
    answers: int = 0
    errors: list[str] = field(default_factory=list)
    began_s: float = 0.0
    until_s: float = 0.0
    """The time that was asked for, by the system's monotonic clock, which all processes share."""


def question(dice: random.Random) -> str:
    """What a technician would ask; the numbers keep two from being the same."""
    machine, sign, wish = dice.choice(MACHINES), dice.choice(SIGNS), dice.choice(WISHES)
    hours, line = dice.randrange(100, 20000), dice.randrange(1, 60)
    return f"The {machine} of line {line} {sign} since this morning. It has run {hours} hours since its service. {wish}"


async def ask(session: aiohttp.ClientSession, arguments: argparse.Namespace, dice: random.Random, seen: Seen) -> None:
    """One request, streamed."""
    text = question(dice) if arguments.questions else " ".join(dice.choices(WORDS, k=arguments.prompt_words))
    body: dict[str, Any] = {
        "model": arguments.model,
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": arguments.tokens,
        "temperature": arguments.temperature,
    }
    began, first, last, tokens, why = time.monotonic(), 0.0, 0.0, 0, ""
    async with session.post(f"{arguments.url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            seen.errors.append(f"{answer.status}: {(await answer.text())[:200]}")
            return
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                seen.errors.append(str(chunk["error"])[:200])
                return
            if any((choice.get("delta") or {}).get("content") for choice in chunk.get("choices", ())):
                last = time.monotonic()
                first = first or last
            for choice in chunk.get("choices", ()):
                why = choice.get("finish_reason") or why
            if usage := chunk.get("usage"):
                tokens = int(usage["completion_tokens"])
    if not tokens or not first:
        seen.errors.append(f"an answer without text or usage: {tokens} tokens, ended for '{why}'")
        return
    seen.spans.append((first, last, tokens))
    seen.answers += 1
    seen.first_ms.append(1e3 * (first - began))
    if tokens > 1:
        seen.token_ms.append(1e3 * (last - first) / (tokens - 1))


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("streams", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt-words", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--questions", action="store_true", help="ask what a technician would")
    arguments = parser.parse_args()
    seen = Seen()
    key = os.environ.get("STREAMS_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        seen.began_s = time.monotonic()
        seen.until_s = seen.began_s + arguments.seconds

        async def stream(number: int) -> None:
            dice = random.Random(arguments.seed * 1000 + number)
            while time.monotonic() < seen.until_s and len(seen.errors) < 10:
                try:
                    await ask(session, arguments, dice, seen)
                except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                    seen.errors.append(f"{type(error).__name__}: {error}"[:200])

        await asyncio.gather(*(stream(number) for number in range(arguments.streams)))
    print(json.dumps(seen.__dict__))


if __name__ == "__main__":
    asyncio.run(main())
