"""The paths that are served, and what answers them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import msgspec

from millhand import __version__
from millhand.errors import ConfigError, DeadlineError, InputError, MillhandError, ModelError, PluginError, suggestion
from millhand.metrics import CONTENT_TYPE
from millhand.serving.admin import AdminToken
from millhand.serving.front_metrics import MetricsReporter
from millhand.serving.http.infer import InferEndpoint, Reply
from millhand.serving.http.messages import RETRY_AFTER, Request, Response, WrongMethod, error_response, json_response
from millhand.serving.http.openapi import document
from millhand.serving.repository_index import index_entries
from millhand.serving.routing import NotServing, Routes, UnknownModel, control_call, not_ready

log = logging.getLogger("millhand.http")

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)

NOT_SERVED = {
    "/v2/systemsharedmemory/": "send tensors in the request",
    "/v2/cudasharedmemory/": "send tensors in the request",
    "/v2/trace/setting": "send a traceparent with a request; [tracing] says where traces go",
    "/v2/logging": "set [log] in the configuration",
}
"""Triton's extensions that have no meaning here, and what to do instead."""

Cancel = Callable[[], None]
Endpoint = Callable[..., Response | Coroutine[Any, Any, Response]]

VERSION_PART = "versions"
CONTROL_S = 10.0
"""How long the daemon may take to answer; loads and unloads take as long as they need."""


class Endpoints:
    """Answers requests; what it needs of the daemon it asks over the control socket."""

    def __init__(
        self, routes: Routes, reporter: MetricsReporter, control_path: Path, admin_token_path: Path | None
    ) -> None:
        self._routes = routes
        self._reporter = reporter
        self._control_path = control_path
        self._token = AdminToken(admin_token_path, "http")
        self._infer = InferEndpoint(routes)
        self._fixed: dict[str, tuple[str, Endpoint]] = {
            "/v2": ("GET", self._server),
            "/v2/health/live": ("GET", self._live),
            "/v2/health/ready": ("GET", self._ready),
            "/v2/models/stats": ("GET", self._all_stats),
            "/v2/repository/index": ("POST", self._index),
            "/v2/openapi.json": ("GET", self._openapi),
            "/metrics": ("GET", self._metrics),
        }
        self._of_model: dict[str, tuple[str, Endpoint | None]] = {
            "/infer": ("POST", None),
            "": ("GET", self._model),
            "/ready": ("GET", self._model_ready),
            "/config": ("GET", self._config),
            "/stats": ("GET", self._stats),
        }

    def handle(self, request: Request, reply: Reply) -> Cancel | None:
        """Answer now or later; what is returned calls a later answer off."""
        try:
            return self._dispatch(request, reply)
        except MillhandError as error:
            reply(error_response(error))
        except Exception as error:
            log.exception("a request failed")
            reply(error_response(error))
        return None

    def _dispatch(self, request: Request, reply: Reply) -> Cancel | None:
        target = request.head.target
        if target is None:
            target = request.head.target = self._find(request)
        request.route, endpoint, arguments = target
        if endpoint is None:
            name, version = arguments
            return self._infer.start(request, name, version, reply)
        return _answer(endpoint(request, *arguments), reply)

    def _find(self, request: Request) -> tuple[str, Endpoint | None, tuple[str, ...]]:
        """(route, endpoint, its arguments); None is the endpoint that infers. Raises for what is not served."""
        path = request.head.path
        arguments: tuple[str, ...] = ()
        if path.startswith("/v2/models/") and path != "/v2/models/stats":
            name, version, rest = _split(path)
            route = "/v2/models/{model}" + ("/versions/{version}" if version else "") + rest
            found = self._of_model.get(rest)
            arguments = (name, version)
        elif path.startswith("/v2/repository/models/"):
            name, _, action = path[len("/v2/repository/models/") :].rpartition("/")
            route = f"/v2/repository/models/{{model}}/{action}"
            found = ("POST", self._load_or_unload) if action in ("load", "unload") and name else None
            arguments = (name, action)
        else:
            route = path.rstrip("/")
            found = self._fixed.get(route)
        if found is None:
            raise _NoSuchPath(f"{request.head.method} '{path[:200]}' is not served", hint=_remedy(path))
        method, endpoint = found
        request.route = route
        _check_method(request, method)
        return route, endpoint, arguments

    # ---- the server -------------------------------------------------------------------------------------------------

    def _server(self, request: Request) -> Response:
        return json_response({"name": "millhand", "version": __version__, "extensions": EXTENSIONS})

    def _live(self, request: Request) -> Response:
        return json_response({"live": True})

    def _ready(self, request: Request) -> Response:
        if self._routes.ready():
            return json_response({"ready": True})
        waiting = self._routes.waiting()
        text = f"models are not ready: {', '.join(waiting) or 'all of them: the node is starting'}"
        comes = not waiting or self._routes.comes(waiting)
        return _not_ready({"ready": False}, f"{text} (see 'millhand model list')", comes)

    def _openapi(self, request: Request) -> Response:
        return json_response(document(self._routes.models))

    async def _metrics(self, request: Request) -> Response:
        text = await _soon(self._reporter.page(parse_qs(request.head.query).get("names", [""])[0]))
        return Response(text.encode(), 200, CONTENT_TYPE.encode())

    # ---- one model --------------------------------------------------------------------------------------------------

    def _model(self, request: Request, name: str, version: str) -> Response:
        model = self._routes.model(name, version)
        keys = ("name", "datatype", "shape")
        return json_response({
            "name": name,
            "versions": sorted(model["sockets"], key=int),
            "platform": model["backend"],
            "inputs": [{key: tensor[key] for key in keys} for tensor in model["inputs"]],
            "outputs": [{key: tensor[key] for key in keys} for tensor in model["outputs"]],
        })  # fmt: skip

    def _model_ready(self, request: Request, name: str, version: str) -> Response:
        model = self._routes.model(name, version)
        if model["sockets"]:
            return json_response({"name": name, "ready": True})
        error = not_ready(name, model)
        return _not_ready({"name": name, "ready": False}, error.text, not isinstance(error, NotServing))

    async def _config(self, request: Request, name: str, version: str) -> Response:
        self._routes.model(name, version)
        return json_response(model_config(await self._ask("model.show", model=name)))

    async def _stats(self, request: Request, name: str, version: str) -> Response:
        self._routes.model(name, version)
        return json_response({"model_stats": await self._statistics(name, version)})

    async def _all_stats(self, request: Request) -> Response:
        return json_response({"model_stats": await self._statistics("", "")})

    async def _statistics(self, name: str, version: str) -> list[dict[str, Any]]:
        stats = await self._ask("model.stats")
        return [
            statistics(entry)
            for entry in stats["models"]
            if name in ("", entry["model"]) and version in ("", str(entry["version"]))
        ]

    # ---- the repository ---------------------------------------------------------------------------------------------

    async def _index(self, request: Request) -> Response:
        self._authorize(request)
        wanted = _body(request)
        ready = wanted.get("ready", False)
        if not isinstance(ready, bool):
            raise InputError(f"key 'ready' = {ready!r} is not valid", hint="give true or false")
        return json_response([entry._asdict() for entry in index_entries(await self._ask("model.list"), ready)])

    async def _load_or_unload(self, request: Request, name: str, action: str) -> Response:
        self._authorize(request)
        arguments = _change_arguments(action, _body(request).get("parameters", {}))
        try:
            await self._routes.change(f"model.{action}", model=name, by="HTTP", **arguments)
        except UnknownModel:
            raise
        except (ConfigError, ModelError, PluginError) as error:  # what was asked for cannot be: no fault of the server
            raise InputError(error.message, hint=error.hint, retriable=error.retriable) from error
        return json_response({})

    def _authorize(self, request: Request) -> None:
        self._token.check(request.head.headers.get(b"authorization", b"").decode(errors="replace"))

    async def _ask(self, call: str, **arguments: Any) -> Any:
        return await _soon(control_call(self._control_path, call, **arguments))


class _NoSuchPath(UnknownModel):
    """Nothing is served there."""


async def _soon(answer: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(CONTROL_S):
            return await answer
    except TimeoutError as error:
        raise DeadlineError(f"the daemon did not answer within {CONTROL_S:g} s", hint="look at its log") from error


def _answer(response: Response | Coroutine[Any, Any, Response], reply: Reply) -> Cancel | None:
    if isinstance(response, Response):
        reply(response)
        return None

    def answer(task: asyncio.Task[Response]) -> None:
        if task.cancelled():
            return
        try:
            found = task.result()
        except Exception as error:
            if not isinstance(error, MillhandError):
                log.exception("a request failed")
            found = error_response(error)
        reply(found)

    task = asyncio.create_task(response)
    task.add_done_callback(answer)
    return lambda: _call_off(task)


def _call_off(task: asyncio.Task[Response]) -> None:
    task.cancel()


def _not_ready(data: dict[str, Any], text: str, comes: bool) -> Response:
    """A 503, which says when to come again where that helps."""
    return json_response({**data, "error": text}, 503, [RETRY_AFTER] if comes else [])


def _remedy(path: str) -> str:
    """What to do instead of asking for a path that is not served."""
    path = "/v2/trace/setting" if path.startswith("/v2/models/") and path.endswith("/trace/setting") else path
    return next((remedy for start, remedy in NOT_SERVED.items() if path.startswith(start)), "see /v2/openapi.json")


def _split(path: str) -> tuple[str, str, str]:
    """'/v2/models/<name>[/versions/<version>]<rest>' -> (name, version, rest)."""
    name, *rest = path[len("/v2/models/") :].split("/")
    version = ""
    if len(rest) >= 2 and rest[0] == VERSION_PART:
        version = rest[1]
        rest = rest[2:]
        if not version.isdecimal() or not version.isascii():
            raise UnknownModel(f"model '{name[:100]}' has no version '{version[:100]}'", hint="versions are numbers")
    return name, version, "".join(f"/{part}" for part in rest)


def _check_method(request: Request, method: str) -> None:
    head = request.head
    if head.method == method or (method == "GET" and head.method == "HEAD"):
        return
    error = WrongMethod(f"{head.method} is not allowed on '{head.path[:200]}'", hint=f"use {method}")
    error.allowed = method
    raise error


def _change_arguments(action: str, parameters: Any) -> dict[str, Any]:
    """What a load or unload is told by its `parameters`. Raises InputError."""
    if not isinstance(parameters, dict):
        raise InputError("key 'parameters' is no object", hint="leave it out")
    if action == "unload":
        return {}  # Triton's clients send unload_dependents; no model depends on another here
    known = ("version",)
    for key in parameters:
        if key not in known:
            raise InputError(
                f"parameter '{key}' is not served{suggestion(key, known)}",
                hint="put model.toml and artifacts on disk, then load",
            )
    version = parameters.get("version")
    if isinstance(version, bool) or not isinstance(version, int | None):
        raise InputError(f"parameter 'version' = {version!r} is not valid", hint="give a version's number")
    return {"version": version}


def _body(request: Request) -> dict[str, Any]:
    if not request.body:
        return {}
    try:
        body = msgspec.json.decode(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the body is not valid JSON: {error}", hint="send an object, or nothing") from error
    if not isinstance(body, dict):
        raise InputError("the body is no JSON object", hint="send an object, or nothing")
    return body


# ---- Triton's words -------------------------------------------------------------------------------------------------


def model_config(model: dict[str, Any]) -> dict[str, Any]:
    """The part of Triton's ModelConfig that has a meaning here."""

    def tensors(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = {"BYTES": "TYPE_STRING"}
        return [
            {
                "name": spec["name"],
                "data_type": names.get(spec["datatype"], f"TYPE_{spec['datatype']}"),
                "dims": spec["shape"][1:],
            }
            for spec in specs
        ]

    policies: dict[str, dict[str, Any]] = {
        "all": {"all": {}},
        "latest": {"latest": {"num_versions": 1}},
        "specific": {"specific": {"versions": model["versions"]}},
    }
    return {
        "name": model["name"],
        "platform": model["backend"],
        "backend": model["backend"],
        "version_policy": policies[model["policy"]],
        "max_batch_size": model["max_batch"],
        "input": tensors(model["inputs"]),
        "output": tensors(model["outputs"]),
        "dynamic_batching": {"max_queue_delay_microseconds": model.get("max_delay_us", 0)},
    }


def statistics(entry: dict[str, Any]) -> dict[str, Any]:
    """Triton's statistics of one version out of a worker's counters (LaneStats)."""

    def duration(count: int, total_ns: int) -> dict[str, int]:
        return {"count": count, "ns": total_ns}

    failed = entry["failed"] + entry["expired"] + entry["rejected"] + entry["cancelled"]
    return {
        "name": entry["model"],
        "version": str(entry["version"]),
        "inference_count": entry["rows"],
        "execution_count": entry["batches"],
        "inference_stats": {
            "success": duration(entry["success"], entry["queue_ns"] + entry["request_compute_ns"]),
            "fail": duration(failed, 0),
            "queue": duration(entry["success"], entry["queue_ns"]),
            "compute_infer": duration(entry["success"], entry["request_compute_ns"]),
        },
    }
