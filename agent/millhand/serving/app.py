"""The HTTP application: Open Inference Protocol v2 and /metrics. Runs in the HTTP process (serving/http.py)."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from millhand import __version__
from millhand.errors import DeadlineError, InputError, MillhandError
from millhand.metrics import CONTENT_TYPE
from millhand.serving.front_metrics import REQUESTS, SECONDS, MetricsReporter
from millhand.serving.inference import encode_response, read_body
from millhand.serving.observation import Observation
from millhand.serving.routing import Routes, UnknownModel
from millhand.serving.tracing import RequestTrace

log = logging.getLogger("millhand.http")

Endpoint = Callable[[Request], Awaitable[Response]]


class BodyTooLarge(InputError):
    """A request's body exceeds [http] body_bytes_cap."""


class Application:
    """The endpoints around one `Routes`."""

    def __init__(
        self, routes: Routes, reporter: MetricsReporter, observation: Observation, body_bytes_cap: int
    ) -> None:
        self._routes = routes
        self._reporter = reporter
        self._observation = observation
        self._body_bytes_cap = body_bytes_cap

    def build(self) -> Starlette:
        table: list[tuple[str, str, Endpoint]] = [
            ("GET", "/v2", self._server),
            ("GET", "/v2/health/live", self._live),
            ("GET", "/v2/health/ready", self._ready),
            ("GET", "/metrics", self._metrics),
        ]
        for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            table += [
                ("GET", prefix, self._model),
                ("GET", f"{prefix}/ready", self._model_ready),
                ("POST", f"{prefix}/infer", self._infer),
            ]
        routes = [Route(path, self._counted(path, endpoint), methods=[method]) for method, path, endpoint in table]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._no_route})

    async def _server(self, request: Request) -> Response:
        return _json({"name": "millhand", "version": __version__, "extensions": []})

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = self._routes.ready()
        return _json({"ready": ready}, 200 if ready else 503)

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        model = self._routes.model(name, request.path_params.get("version", ""))
        keys = ("name", "datatype", "shape")
        return _json({
            "name": name,
            "versions": sorted(model["sockets"], key=int),
            "platform": model["backend"],
            "inputs": [{key: tensor[key] for key in keys} for tensor in model["inputs"]],
            "outputs": [{key: tensor[key] for key in keys} for tensor in model["outputs"]],
        })  # fmt: skip

    async def _model_ready(self, request: Request) -> Response:
        name = request.path_params["model"]
        ready = bool(self._routes.model(name, request.path_params.get("version", ""))["sockets"])
        return _json({"name": name, "ready": ready}, 200 if ready else 503)

    async def _infer(self, request: Request) -> Response:
        name, version = request.path_params["model"], request.path_params.get("version", "")
        self._routes.model(name, version)  # an unknown model is said before a large body is read
        wanted = read_body(await self._body(request))
        request.state.infer_ns = time.time_ns()
        answer = request.state.answer = await self._routes.infer(
            name,
            version,
            wanted.tensors,
            deadline_ms=wanted.deadline_ms,
            priority=wanted.priority,
            wanted=wanted.wanted,
        )
        return _json(encode_response(name, answer.version, wanted, answer.outputs))

    async def _metrics(self, request: Request) -> Response:
        text = await self._reporter.page(request.query_params.get("names", ""))
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    async def _body(self, request: Request) -> bytes:
        claimed = request.headers.get("content-length", "")
        if claimed.isdecimal() and int(claimed) > self._body_bytes_cap:
            raise self._too_large()
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._body_bytes_cap:
                raise self._too_large()
            parts.append(part)
        return b"".join(parts)

    def _counted(self, path: str, endpoint: Endpoint) -> Endpoint:
        """Count, time and trace the endpoint, and turn its errors into answers."""

        async def counted(request: Request) -> Response:
            started, start_ns = time.perf_counter(), time.time_ns()
            try:
                response = await endpoint(request)
            except MillhandError as error:
                response = _error(error)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:
                log.exception("a request failed")
                response = _json({"error": f"internal error: {type(error).__name__}"}, 500)
            REQUESTS.inc(method=request.method, path=path, status=response.status_code)
            SECONDS.observe(time.perf_counter() - started, path=path)
            self._observe(request, path, response, start_ns)
            return response

        return counted

    async def _no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        REQUESTS.inc(method=request.method, path="other", status=error.status_code)
        text = f"{request.method} '{request.url.path}' is not served: {error.detail} (see /v2)"
        response = _json({"error": text}, error.status_code, error.headers)
        self._observe(request, "", response, time.time_ns())
        return response

    def _observe(self, request: Request, route: str, response: Response, start_ns: int) -> None:
        if self._observation.wanted:
            self._observation.answered(_trace(request, route, response.status_code, start_ns), len(response.body))

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body is larger than {self._body_bytes_cap} bytes",
            hint="send less at once, or raise [http] body_bytes_cap",
        )


def _trace(request: Request, route: str, status: int, start_ns: int) -> RequestTrace:
    answer = getattr(request.state, "answer", None)
    return RequestTrace(
        method=request.method,
        path=request.scope["raw_path"].decode("latin-1"),
        route=route,
        status=status,
        start_ns=start_ns,
        end_ns=time.time_ns(),
        traceparent=",".join(request.headers.getlist("traceparent")),  # several are not valid, and mean a new trace
        model=request.path_params.get("model", ""),
        version=str(answer.version) if answer else "",
        infer_ns=getattr(request.state, "infer_ns", 0) if answer else 0,
        queue_ns=answer.queue_ns if answer else 0,
        compute_ns=answer.compute_ns if answer else 0,
    )


def _status(error: MillhandError) -> int:
    if isinstance(error, UnknownModel):
        return 404
    if isinstance(error, BodyTooLarge):
        return 413
    if isinstance(error, DeadlineError):
        return 504
    return 503 if error.retriable else 400 if isinstance(error, InputError) else 500


def _error(error: MillhandError) -> Response:
    text = f"{error.message} ({error.hint})" if error.hint else error.message
    return _json({"error": text}, _status(error))


def _json(data: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")
