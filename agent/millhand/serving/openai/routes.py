"""Which language models there are and where their servers answer, as the daemon tells it (`language.routes`)."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from millhand.errors import ControlError, suggestion
from millhand.serving.openai.failure import Failure
from millhand.serving.routing import control_stream

log = logging.getLogger("millhand.gateway")

COMES_BY_ITSELF = ("starting", "restarting")
"""States of a server that will answer without anybody's doing."""
RETRY_S = 5.0


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One language model."""

    name: str
    """As clients call it."""
    state: str = "ready"
    reason: str = ""
    """Why it does not answer."""
    hint: str = ""
    urls: tuple[str, ...] = ()
    """Where its servers answer, as `http://127.0.0.1:9000`; several where it is served more than once."""
    keys: dict[str, str] = {}
    """What each server wants to be shown, by URL; made anew at each of its starts."""
    abilities: frozenset[str] = frozenset()
    context_tokens: int = 0
    """Tokens that a conversation may hold; 0 where it is not known."""
    reasoning: bool = False
    """Whether it thinks aloud in `<think>` before it answers."""
    parameters: int = 0
    """Weights; 0 where they are not known."""


class LanguageRoutes:
    """Follows the daemon; knows how busy each server is with requests of this process."""

    def __init__(self, control_path: Path) -> None:
        self._control_path = control_path
        self._routes: dict[str, Route] = {}
        self._busy: Counter[str] = Counter()
        self._told = asyncio.Event()

    async def follow(self) -> None:
        """Take every change; returns when the daemon is gone."""
        try:
            async for told in control_stream(self._control_path, "language.routes"):
                self._take(told)
        except ControlError as error:
            log.info("%s", error.message)

    async def told(self) -> None:
        """Wait until the daemon has told of its models; before, none is known."""
        await self._told.wait()

    def _take(self, told: Any) -> None:
        routes = msgspec.convert(told["models"], list[Route])
        self._routes = {route.name: route for route in routes}
        self._told.set()

    @property
    def all(self) -> list[Route]:
        """Every model, also those that do not answer now."""
        return list(self._routes.values())

    def ready(self) -> bool:
        """Whether every model answers, and there is one."""
        return bool(self._routes) and all(route.urls for route in self._routes.values())

    def knows(self, model: str) -> bool:
        """Whether a language server has the model, be it ready or not."""
        return model in self._routes

    def route(self, model: str) -> Route:
        """A model that answers. Raises Failure: 404 for an unknown name, 503 where it does not answer now."""
        route = self._routes.get(model)
        if route is None:
            raise Failure(
                404,
                f"model '{model}' is not served{suggestion(model, self._routes)}",
                hint=f"served: {', '.join(self._routes) or 'none; set [language] model'}",
                param="model",
                code="model_not_found",
            )
        if not route.urls:
            raise unanswered(route)
        return route

    def least_busy(self, route: Route, without: frozenset[str] = frozenset()) -> str:
        """The server of a model with the fewest requests of this process; empty where all are in `without`.

        Of equals any: each process knows its own requests alone, and the first server would get all that is left over.
        """
        urls = [url for url in route.urls if url not in without]
        return min(urls, key=lambda url: (self._busy[url], random.random()), default="")  # noqa: S311 - no secret

    def begin(self, url: str) -> None:
        self._busy[url] += 1

    def running(self, route: Route) -> int:
        """Requests of this process that a model's servers answer now."""
        return sum(self._busy[url] for url in route.urls)

    def end(self, url: str) -> None:
        self._busy[url] -= 1
        if not self._busy[url]:
            del self._busy[url]


def unanswered(route: Route) -> Failure:
    """What a client is told of a model without a server that answers."""
    comes = route.state in COMES_BY_ITSELF
    return Failure(
        503,
        f"model '{route.name}' is {route.state}{f': {route.reason}' if route.reason else ''}",
        hint=route.hint or ("send the request again later" if comes else "look at 'millhand' on the node"),
        kind="server_error",
        code="model_not_ready",
        retry_after_s=RETRY_S if comes else None,
    )
