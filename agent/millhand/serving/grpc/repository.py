"""The repository's methods of the inference service: index, load, unload. They need the token of the owner's file."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from google.protobuf.message import Message

from millhand.errors import ConfigError, DeadlineError, InputError, ModelError, PluginError, suggestion
from millhand.serving.admin import AdminToken, PermissionDenied, TokenMissing
from millhand.serving.grpc import wire
from millhand.serving.grpc.rpc import Call, Method
from millhand.serving.grpc.service import SERVICE, control, reading
from millhand.serving.grpc.status import Code, Refusal
from millhand.serving.repository_index import index_entries
from millhand.serving.routing import Routes, UnknownModel

LOAD_PARAMETERS = ("version",)
UNLOAD_PARAMETERS = ("unload_dependents",)
"""Triton's clients always send it; no model depends on another here."""


class RepositoryService:
    """Index, load and unload through the daemon's control socket."""

    def __init__(self, routes: Routes, control_path: Path, token: AdminToken) -> None:
        self._routes = routes
        self._control_path = control_path
        self._token = token

    def methods(self) -> Iterable[Method]:
        yield Method(SERVICE, "RepositoryIndex", unary=reading(wire.RepositoryIndexRequest, self._index))
        yield Method(SERVICE, "RepositoryModelLoad", unary=reading(wire.RepositoryModelRequest, self._load))
        yield Method(SERVICE, "RepositoryModelUnload", unary=reading(wire.RepositoryModelRequest, self._unload))

    async def _index(self, call: Call, request: wire.RepositoryIndexRequest) -> Message:
        self._authorize(call, request.repository_name)
        response = wire.RepositoryIndexResponse()
        for entry in index_entries(await control(call, self._control_path, "model.list"), request.ready):
            response.models.add(**entry._asdict())
        return response

    async def _load(self, call: Call, request: wire.RepositoryModelRequest) -> Message:
        self._authorize(call, request.repository_name)
        _check_parameters(request, LOAD_PARAMETERS)
        version = request.parameters["version"].int64_param if "version" in request.parameters else None
        await self._change(call, "model.load", model=request.model_name, version=version)
        return wire.RepositoryModelRequest()  # the response has no fields

    async def _unload(self, call: Call, request: wire.RepositoryModelRequest) -> Message:
        self._authorize(call, request.repository_name)
        _check_parameters(request, UNLOAD_PARAMETERS)
        await self._change(call, "model.unload", model=request.model_name)
        return wire.RepositoryModelRequest()

    def _authorize(self, call: Call, repository: str) -> None:
        try:
            self._token.check(call.head.metadata.get("authorization", ""))
        except TokenMissing as error:
            raise Refusal(Code.UNAUTHENTICATED, error.message, hint=error.hint) from error
        except PermissionDenied as error:
            raise Refusal(Code.PERMISSION_DENIED, error.message, hint=error.hint) from error
        if repository:
            raise InputError(f"repository_name '{repository}' is not known", hint="leave it out: there is one only")

    async def _change(self, call: Call, name: str, **arguments: object) -> None:
        left_ms = call.remaining_ms  # without a deadline it takes as long as it needs
        try:
            async with asyncio.timeout(None if left_ms is None else left_ms / 1000):
                await self._routes.change(name, by="gRPC", **arguments)
        except TimeoutError as error:
            raise DeadlineError("the model did not change before the deadline", hint="give it more time") from error
        except UnknownModel:
            raise
        except (ConfigError, ModelError, PluginError) as error:
            raise Refusal(Code.FAILED_PRECONDITION, error.message, hint=error.hint) from error


def _check_parameters(request: wire.RepositoryModelRequest, known: tuple[str, ...]) -> None:
    for key in request.parameters:
        if key not in known:
            raise InputError(
                f"parameter '{key}' is not served{suggestion(key, known)}",
                hint=f"use {', '.join(known)}; a model's configuration is its model.toml",
            )
