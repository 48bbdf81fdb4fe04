"""Asks the model itself on a guard's behalf: past the guards, and past the gateway's queue."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from millhand.errors import DeadlineError, LanguageError
from millhand.serving.openai.failure import Failure
from millhand.serving.openai.routes import Route
from millhand.serving.openai.upstream import Upstream, read_whole

DEADLINE_S = 20.0


class Opinion:
    """What `ConsideringGuard.consider` gets: a `Complete` for one model."""

    def __init__(self, upstream: Upstream, route: Route) -> None:
        self._upstream = upstream
        self._route = route

    @property
    def parameters(self) -> int:
        """Weights of the model; 0 where they are not known."""
        return self._route.parameters

    async def __call__(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        schema: Mapping[str, Any] | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The answer's text. Raises LanguageError, DeadlineError."""
        asked: dict[str, Any] = {
            "model": self._route.name,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        if schema is not None:
            asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        answer = await self._ask(asked)
        return str(answer["choices"][0]["message"].get("content") or "")

    async def score(self, messages: Sequence[Mapping[str, str]], candidates: Sequence[str]) -> Sequence[float]:
        """Not offered to guards. Raises LanguageError."""
        raise LanguageError("guards cannot have candidates scored", retriable=False)

    async def _ask(self, asked: Mapping[str, Any]) -> Any:
        try:
            async with (
                asyncio.timeout(DEADLINE_S),
                self._upstream.ask(self._route, "/v1/chat/completions", msgspec.json.encode(asked)) as response,
            ):
                return msgspec.json.decode(await read_whole(response))
        except TimeoutError as error:
            raise DeadlineError(f"no second opinion came within {DEADLINE_S:g} s") from error
        except (Failure, msgspec.DecodeError) as error:
            raise LanguageError(str(error)) from error
