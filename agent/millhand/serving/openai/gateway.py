"""What the gateway answers: OpenAI's endpoints, and how it stands with the gateway itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from millhand.errors import MillhandError
from millhand.language.guarding import JUDGE_PATH, GuardContext, Part
from millhand.metrics import CONTENT_TYPE
from millhand.serving.front_metrics import REQUESTS, SECONDS, MetricsReporter
from millhand.serving.observation import Observation
from millhand.serving.openai import metrics
from millhand.serving.openai.admission import Admission, Rates
from millhand.serving.openai.asked import Asked, Endpoint
from millhand.serving.openai.embedding import embedded
from millhand.serving.openai.exchange import Exchange, Limits
from millhand.serving.openai.failure import Failure, failure_of
from millhand.serving.openai.guarding import Guards, GuardSession, Refused
from millhand.serving.openai.opinion import Opinion
from millhand.serving.openai.routes import LanguageRoutes, Route
from millhand.serving.openai.server import read_body
from millhand.serving.openai.tokens import AGENT_ROLE, Token, TokenKeeper
from millhand.serving.openai.upstream import Upstream
from millhand.serving.tracing import RequestTrace

MODELS = "/v1/models"
ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
CORS_METHODS = "GET, POST, OPTIONS"
CORS_HEADERS = "Authorization, Content-Type"
CORS_SECONDS = "600"
SOURCES = ("client", "knowledge", "order", "agent")
CLIENT_LEFT = 499
"""The status that is counted where a client left before its answer's end, as nginx counts it."""
Answer = Callable[[web.BaseRequest, Token], Awaitable[web.StreamResponse]]


class Own(msgspec.Struct, frozen=True, kw_only=True):
    """The field `millhand` of the agent's own requests."""

    source: str = "agent"
    grounds: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    """What of the messages comes from elsewhere; each is judged by its own source."""


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """Texts that the agent is about to put into a prompt."""

    model: str
    parts: tuple[Part, ...]


class Doors(msgspec.Struct, frozen=True, kw_only=True):
    """Who may come in, and with how much."""

    body_bytes_cap: int
    request_timeout_s: float
    cors_origins: tuple[str, ...]


class Gateway:
    """One a process."""

    def __init__(
        self,
        *,
        doors: Doors,
        limits: Limits,
        keeper: TokenKeeper,
        rates: Rates,
        admission: Admission,
        routes: LanguageRoutes,
        upstream: Upstream,
        guards: Guards,
        reporter: MetricsReporter,
        observation: Observation,
        control_path: Path,
    ) -> None:
        self._doors = doors
        self._limits = limits
        self._keeper = keeper
        self._rates = rates
        self._admission = admission
        self._routes = routes
        self._upstream = upstream
        self._guards = guards
        self._reporter = reporter
        self._observation = observation
        self._control_path = control_path
        self._known: dict[tuple[str, str], Answer] = {
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", MODELS): self._models,
            ("GET", f"{MODELS}/{{model}}"): self._model,
            ("POST", JUDGE_PATH): self._judge,
            **{("POST", path): self._asking(endpoint) for path, endpoint in ENDPOINTS.items()},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. Errors come in OpenAI's shape."""
        started_s, started_ns = asyncio.get_running_loop().time(), time.time_ns()
        pattern = f"{MODELS}/{{model}}" if request.path.startswith(f"{MODELS}/") else request.path
        route = pattern if any(pattern == path for _, path in self._known) else "other"
        status = CLIENT_LEFT
        answer: web.StreamResponse | None = None
        try:
            answer = await self._answered(request, pattern)
            status = answer.status
            return answer
        except ConnectionResetError:  # while it was written to
            metrics.ENDINGS.inc(model_name="", code="client_left")
            return web.Response(status=CLIENT_LEFT)  # which goes nowhere
        except asyncio.CancelledError:
            metrics.ENDINGS.inc(model_name="", code="client_left")
            raise
        finally:
            REQUESTS.inc(method=request.method if route != "other" else "other", path=route, status=status)
            SECONDS.observe_in((route,), asyncio.get_running_loop().time() - started_s)
            if self._observation.wanted:
                self._observe(request, route, status, started_ns, answer)

    async def _answered(self, request: web.BaseRequest, pattern: str) -> web.StreamResponse:
        try:
            origin = self._origin(request)
            if request.method == "OPTIONS" and origin:
                return web.Response(status=204, headers=_cors(origin))
            answer = self._known.get((request.method, pattern))
            if answer is None:
                raise self._unknown(request.method, pattern)
            caller = self._caller(request, pattern)
            return await answer(request, caller)
        except MillhandError as error:
            return self._failed(request, failure_of(error))
        except Failure as failure:
            return self._failed(request, failure)

    def _failed(self, request: web.BaseRequest, failure: Failure) -> web.Response:
        metrics.ENDINGS.inc(model_name="", code=failure.code)
        headers = {"Content-Type": "application/json", **failure.headers, **self._open_to(request)}
        if failure.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.Response(status=failure.status, body=failure.body, headers=headers)

    # ---- who asks ---------------------------------------------------------------------------------------------------

    def _origin(self, request: web.BaseRequest) -> str:
        """The web page that asks, empty where it is none. Raises Failure for one that may not: a browser would send
        what it asks, though it might not show the answer.
        """
        origin = request.headers.get("Origin", "")
        if origin and origin not in self._doors.cors_origins:
            raise Failure(
                403,
                f"web pages of '{origin}' may not ask",
                hint="the node's owner may add it to [gateway] cors_origins",
                code="origin_refused",
            )
        return origin

    def _open_to(self, request: web.BaseRequest) -> dict[str, str]:
        origin = request.headers.get("Origin", "")
        return _cors(origin) if origin in self._doors.cors_origins else {}

    def _caller(self, request: web.BaseRequest, pattern: str) -> Token:
        authorization = request.headers.get("Authorization", "")
        caller = self._keeper.caller(authorization) if authorization else None
        if caller is not None:
            return caller
        if not self._keeper.asks or pattern == "/health":
            return Token("", "", "")
        raise Failure(
            401,
            "no token was shown" if not authorization else "the token is not known",
            hint="send 'Authorization: Bearer <token>'; the node's owner makes one with 'millhand gateway token'",
            code="invalid_api_key",
        )

    # ---- about the gateway ------------------------------------------------------------------------------------------

    async def _health(self, request: web.BaseRequest, caller: Token) -> web.Response:
        if self._routes.ready():
            return _json({"status": "ok"})
        states = {route.name: route.state for route in self._routes.all}
        return _json({"status": "unavailable", "models": states}, status=503)

    async def _metrics(self, request: web.BaseRequest, caller: Token) -> web.Response:
        text = await self._reporter.page(request.query.get("names", ""))
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, request: web.BaseRequest, caller: Token) -> web.Response:
        listed = [_listed(route) for route in self._routes.all]
        return _json({"object": "list", "data": listed}, headers=self._open_to(request))

    async def _model(self, request: web.BaseRequest, caller: Token) -> web.Response:
        name = request.path.removeprefix(f"{MODELS}/")
        known = {route.name: route for route in self._routes.all}
        route = known.get(name) or self._routes.route(name)
        return _json(_listed(route), headers=self._open_to(request))

    def _unknown(self, method: str, pattern: str) -> Failure:
        methods = [known for known, path in self._known if path == pattern]
        if methods:
            return Failure(405, f"{pattern} takes {methods[0]}, not {method}", code="method_not_allowed")
        paths = sorted({path for _, path in self._known} - {JUDGE_PATH})
        return Failure(404, f"'{pattern}' is not served", hint=f"served: {', '.join(paths)}", code="not_found")

    # ---- questions --------------------------------------------------------------------------------------------------

    def _asking(self, endpoint: Endpoint) -> Answer:
        async def answer(request: web.BaseRequest, caller: Token) -> web.StreamResponse:
            return await self._ask(request, caller, endpoint)

        return answer

    async def _ask(self, request: web.BaseRequest, caller: Token, endpoint: Endpoint) -> web.StreamResponse:
        started_s = asyncio.get_running_loop().time()
        body = await read_body(request, self._doors.body_bytes_cap, self._doors.request_timeout_s)
        self._rates.begin(caller.role)
        asked = Asked(endpoint, body)
        if endpoint == "embeddings" and not self._routes.knows(asked.model):
            return await self._embed(request, asked, caller)
        route = self._routes.route(asked.model)
        session = self._session(asked, route, caller)
        asked.require(route.abilities, route.context_tokens)
        if session is not None:
            await self._admit(session, asked)
        exchange = Exchange(
            self._upstream,
            self._admission,
            self._rates,
            self._limits,
            asked=asked,
            route=route,
            role=caller.role,
            session=session,
            answer_session=session if self._guards.at("output") else None,
            started_s=started_s,
        )
        return await exchange.answer(request, self._open_to(request))

    async def _embed(self, request: web.BaseRequest, asked: Asked, caller: Token) -> web.Response:
        """Embeddings by the node's own embedder."""
        session = self._session(asked, Route(name=asked.model), caller)
        if session is not None:
            await self._admit(session, asked)
        body = await embedded(self._control_path, asked)
        return web.Response(body=body, headers={"Content-Type": "application/json", **self._open_to(request)})

    async def _judge(self, request: web.BaseRequest, caller: Token) -> web.Response:
        """Texts as guards let them go on, for the agent alone; no server sees them."""
        if caller.role != AGENT_ROLE:
            raise self._unknown("", "this path")
        body = await read_body(request, self._doors.body_bytes_cap, self._doors.request_timeout_s)
        try:
            judged = msgspec.json.decode(body, type=Judged)
        except msgspec.MsgspecError as error:
            raise Failure(400, f"the body is not what is judged: {error}", code="invalid_json") from error
        texts: list[str | None] = [part.text for part in judged.parts]
        if not self._guards.none:
            opinion = Opinion(self._upstream, Route(name=judged.model))
            context = GuardContext(model=judged.model, role=caller.role, source="agent")
            session = self._guards.session(context, caller.name, opinion)
            texts = [await session.part(part) for part in judged.parts]
        return _json({"texts": texts})

    def _session(self, asked: Asked, route: Route, caller: Token) -> GuardSession | None:
        """What stands before one request; None where there are no guards. Raises Failure."""
        own = _own(asked, caller)
        if self._guards.none:
            return None
        context = GuardContext(
            model=asked.model,
            role=caller.role,
            source=own.source,  # type: ignore[arg-type]  # checked in _own
            grounds=own.grounds,
            tools=asked.tools,
            guided=asked.guided,
        )
        return self._guards.session(context, caller.name, Opinion(self._upstream, route), own.parts)

    async def _admit(self, session: GuardSession, asked: Asked) -> None:
        try:
            await session.admit(asked)
        except Refused:
            metrics.GUARDED.inc(model_name=asked.model, outcome="refused")
            raise
        metrics.GUARDED.inc(model_name=asked.model, outcome="passed")

    def _observe(
        self, request: web.BaseRequest, route: str, status: int, started_ns: int, answer: web.StreamResponse | None
    ) -> None:
        trace = RequestTrace(
            method=request.method,
            path=request.path,
            route="" if route == "other" else route,
            status=status,
            start_ns=started_ns,
            end_ns=time.time_ns(),
            traceparent=request.headers.get("traceparent", ""),
        )
        self._observation.answered(trace, answer.body_length if answer is not None and answer.prepared else 0)


def _own(asked: Asked, caller: Token) -> Own:
    """What the agent says of its own request. Raises Failure where somebody else does, or it is wrong."""
    said = asked.own()
    if not said:
        return Own(source="agent" if caller.role == AGENT_ROLE else "client")
    if caller.role != AGENT_ROLE:
        raise Failure(400, "field 'millhand' is not known", param="millhand", code="unknown_field")
    try:
        own = msgspec.convert(said, Own)
    except msgspec.ValidationError as error:
        raise Failure(400, f"millhand {error}", param="millhand") from error
    if own.source not in SOURCES:
        raise Failure(400, f"millhand.source must be one of: {', '.join(SOURCES)}", param="millhand")
    return own


def _listed(route: Route) -> dict[str, Any]:
    return {
        "id": route.name,
        "object": "model",
        "created": 0,
        "owned_by": "millhand",
        "max_model_len": route.context_tokens or None,
        "state": route.state,
        "abilities": sorted(route.abilities),
    }


def _json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(data), headers={"Content-Type": "application/json", **(headers or {})}
    )


def _cors(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": CORS_METHODS,
        "Access-Control-Allow-Headers": CORS_HEADERS,
        "Access-Control-Max-Age": CORS_SECONDS,
        "Vary": "Origin",
    }
