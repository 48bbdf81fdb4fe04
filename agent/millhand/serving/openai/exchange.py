"""One question to a language server and its answer, streamed or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from millhand.serving.openai import metrics
from millhand.serving.openai.admission import Admission, Rates
from millhand.serving.openai.asked import Asked
from millhand.serving.openai.failure import Failure
from millhand.serving.openai.guarding import GuardSession
from millhand.serving.openai.relay import Choice, StreamRelay, Usage, whole_answer
from millhand.serving.openai.routes import Route
from millhand.serving.openai.thinking import Thinking
from millhand.serving.openai.upstream import Upstream, read_some, read_whole

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}
STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long an answer may take; keys as in `[gateway]`."""

    first_token_s: float
    idle_s: float
    deadline_s: float


class Counted(msgspec.Struct):
    """What is counted of a whole answer."""

    usage: Usage | None = None
    choices: list[Choice] = []


_COUNTED = msgspec.json.Decoder(Counted)


class Exchange:
    """One request on its way; made anew for each."""

    def __init__(
        self,
        upstream: Upstream,
        admission: Admission,
        rates: Rates,
        limits: Limits,
        *,
        asked: Asked,
        route: Route,
        role: str,
        session: GuardSession | None,
        answer_session: GuardSession | None,
        started_s: float,
    ) -> None:
        """`session`: guards, if any; `answer_session`: the same where they must see answers. `started_s`: when the
        request's head came, on the loop's clock.
        """
        self._upstream = upstream
        self._admission = admission
        self._rates = rates
        self._limits = limits
        self._asked = asked
        self._route = route
        self._role = role
        self._session = session
        self._answer_session = answer_session
        self._started_s = started_s
        self._loop = asyncio.get_running_loop()
        self._deadline_s = started_s + limits.deadline_s
        # The server tells thoughts from answers itself where it is able to.
        self._thinks = route.reasoning and asked.endpoint == "chat"
        self._splits = self._thinks and "reasoning" not in route.abilities

    async def answer(self, request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
        """Ask and answer. Raises Failure as long as nothing was sent; after that the stream ends with it."""
        key = (self._route.name,)
        queued_s = time.monotonic()
        await self._admission.enter(self._route.name)
        metrics.QUEUE_SECONDS.observe_in(key, time.monotonic() - queued_s)
        try:
            body = self._asked.body(with_usage="usage" in self._route.abilities, as_read=self._session is not None)
            return await (self._streamed if self._asked.stream else self._whole)(request, body, headers)
        finally:
            self._admission.leave()

    async def _whole(self, request: web.BaseRequest, body: bytes, headers: Mapping[str, str]) -> web.StreamResponse:
        try:
            async with (
                asyncio.timeout_at(self._deadline_s),
                self._upstream.ask(self._route, PATHS[self._asked.endpoint], body) as response,
            ):
                answer = await read_whole(response)
        except TimeoutError as error:
            raise self._overdue(f"was not whole within {self._limits.deadline_s:g} s") from error
        self._count(answer)
        if self._asked.endpoint != "embeddings" and (self._thinks or self._answer_session is not None):
            answer = await whole_answer(answer, self._answer_session, self._thinks, self._opened)
        return web.Response(body=answer, headers={"Content-Type": "application/json", **headers})

    async def _streamed(self, request: web.BaseRequest, body: bytes, headers: Mapping[str, str]) -> web.StreamResponse:
        relay = StreamRelay(
            wants_usage=self._asked.wants_usage,
            session=self._answer_session,
            thinking=(lambda: Thinking(self._opened)) if self._splits else None,
            reads=self._thinks or self._answer_session is not None,
        )
        answer = web.StreamResponse(headers={**STREAM_HEADERS, **headers})
        try:
            async with asyncio.timeout(self._limits.first_token_s) as limit:
                async with self._upstream.ask(self._route, PATHS[self._asked.endpoint], body) as response:
                    if response.content_type != "text/event-stream":
                        raise Failure(
                            502, "the language server did not stream", kind="server_error", code="server_failed"
                        )
                    await answer.prepare(request)
                    await self._relay(response, relay, answer, limit)
        except TimeoutError as error:
            failure = self._overdue("has come to a halt" if relay.pieces else "did not begin in time")
            if not answer.prepared:
                raise failure from error
            await _write_last(answer, relay.fail(failure))
        except Failure as failure:
            if not answer.prepared:
                raise
            await _write_last(answer, relay.fail(failure))
        finally:
            self._counted(relay.usage, relay.pieces, [relay.finish_reason])
        if relay.failure is not None:
            metrics.ENDINGS.inc(model_name=self._route.name, code=relay.failure.code)
        await answer.write_eof()
        return answer

    async def _relay(
        self,
        response: aiohttp.ClientResponse,
        relay: StreamRelay,
        answer: web.StreamResponse,
        limit: asyncio.Timeout,
    ) -> None:
        key, idle_s, now = (self._route.name,), self._limits.idle_s, self._loop.time
        before_s, pieces = self._started_s, 0
        while not relay.ended:
            data = await read_some(response)
            written = relay.feed(data) if data else relay.close()
            if written:
                await answer.write(written)
            now_s = now()
            if new := relay.pieces - pieces:
                spent_s = now_s - before_s
                if pieces:
                    metrics.TOKEN_SECONDS.observe_in(key, spent_s / new, new)
                else:
                    metrics.FIRST_TOKEN_SECONDS.observe_in(key, spent_s)
                before_s, pieces = now_s, relay.pieces
            if pieces:
                limit.reschedule(min(now_s + idle_s, self._deadline_s))

    @property
    def _opened(self) -> bool:
        """Whether the chat template has opened the thought: it has, unless the client switched thinking off."""
        template: Mapping[str, Any] = self._asked.fields.get("chat_template_kwargs") or {}
        return template.get("enable_thinking", True) is not False

    def _overdue(self, what: str) -> Failure:
        return Failure(
            504,
            f"the answer {what}",
            hint="ask for less; [gateway] first_token_s, idle_s and deadline_s set the limits",
            kind="server_error",
            code="timeout",
        )

    def _count(self, answer: bytes) -> None:
        try:
            counted = _COUNTED.decode(answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Failure(
                502, "the language server sent something that is no answer", kind="server_error", code="server_failed"
            ) from error
        self._counted(counted.usage, 0, [choice.finish_reason or "" for choice in counted.choices])

    def _counted(self, usage: Usage | None, pieces: int, reasons: list[str]) -> None:
        """Count an answer; of one that was broken off, the pieces that came stand for its tokens."""
        model = self._route.name
        read = (usage.prompt_tokens or 0) if usage else 0
        written = (usage.completion_tokens or 0) if usage else pieces
        metrics.PROMPT_TOKENS.inc(read, model_name=model)
        metrics.GENERATION_TOKENS.inc(written, model_name=model)
        self._rates.used(self._role, read + written)
        for reason in filter(None, reasons):
            metrics.SUCCESS.inc(model_name=model, finished_reason=reason)
        metrics.WHOLE_SECONDS.observe_in((model,), self._loop.time() - self._started_s)


async def _write_last(answer: web.StreamResponse, event: bytes) -> None:
    """Write the event that ends a stream to a client that may not read; its connection ends anyway."""
    try:
        async with asyncio.timeout(1):
            await answer.write(event)
    except (TimeoutError, OSError):
        return
