"""The endpoint that must be fast: an inference from the request's body to the response without a task in between.

The tensors go from the body into a slot of the worker's ring, the request to the worker, and the worker's answer is
written out by the callback that the client of the worker makes. Only what needs waiting takes the other way, through
a task: a worker that is not connected yet, and a version that has just moved.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from millhand.errors import InputError, MillhandError, ModelError
from millhand.serving import protocol
from millhand.serving.client import WorkerClient, deadline_ns
from millhand.serving.http.messages import BINARY, JSON, Request, Response, error_response
from millhand.serving.inference import InferRequest, read_body, read_raw, write_response
from millhand.serving.routing import Routes

log = logging.getLogger("millhand.http")

_encode = msgspec.json.Encoder().encode
_HEADER_SIZE = b"inference-header-content-length"

Reply = Callable[[Response], None]


class InferEndpoint:
    """Answers POST .../infer."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    def start(self, request: Request, name: str, version: str, reply: Reply) -> Callable[[], None]:
        """Begin; `reply` is called once, now or later, unless what is returned is called: the client has left.

        Raises MillhandError for a request that cannot begin.
        """
        model = self._routes.model(name, version)
        wanted = _read(request, model)
        deadline = deadline_ns(wanted.deadline_ms or self._routes.deadline_ms)
        call = _Call(self._routes, name, version, wanted, deadline, model.get("labels", ()), reply)
        reached = self._routes.reached(name, version)
        if reached is None:
            return call.start_slowly()
        return call.start(*reached)


class _Call:
    """One request under way."""

    def __init__(
        self,
        routes: Routes,
        name: str,
        version: str,
        wanted: InferRequest,
        deadline: int,
        labels: tuple[str, ...],
        reply: Reply,
    ) -> None:
        self._routes = routes
        self._name = name
        self._version = version
        self._wanted = wanted
        self._deadline = deadline
        self._labels = labels
        self._reply = reply
        self._task: asyncio.Task[None] | None = None

    def start(self, client: WorkerClient, version: int) -> Callable[[], None]:
        """Send it to a connected worker."""
        wanted = self._wanted
        slot = client.lease()
        try:
            placed, payload, size = protocol.place(wanted.tensors, client.slot(slot))
            infer = protocol.Infer(
                self._name, version, self._deadline, wanted.priority, slot, size >= 0, placed, wanted.wanted
            )
            number = client.submit(infer, payload, self._done)
        except BaseException:
            client.release(slot)
            raise

        def cancel() -> None:
            client.cancel(number)
            if self._task is not None:
                self._task.cancel()

        return cancel

    def start_slowly(self) -> Callable[[], None]:
        """Send it by the way that can wait for a connection or for the daemon's word."""
        task = self._task = asyncio.create_task(self._infer_slowly())
        return functools.partial(_call_off, task)

    def _done(self, outcome: Any) -> None:
        """The worker's answer; its memory is valid during this call alone."""
        try:
            if isinstance(outcome, tuple):
                result, memory = outcome
                response = self._respond(result.version, protocol.fetch(result.tensors, memory))
            elif isinstance(outcome, ModelError) and outcome.retriable:  # the version has moved: ask where to
                self.start_slowly()
                return
            else:
                response = error_response(outcome)
        except Exception as error:
            response = _failed(error)
        self._reply(response)

    async def _infer_slowly(self) -> None:
        wanted = self._wanted
        try:
            answer = await self._routes.infer(
                self._name,
                self._version,
                wanted.tensors,
                deadline=self._deadline,
                priority=wanted.priority,
                wanted=wanted.wanted,
            )
            response = self._respond(answer.version, answer.outputs)
        except Exception as error:
            response = _failed(error)
        self._reply(response)

    def _respond(self, version: int, outputs: dict[str, Any]) -> Response:
        data, buffers = write_response(self._name, version, self._wanted, outputs, self._labels)
        head = _encode(data)
        if not buffers:
            return Response(head, 200, JSON)
        return Response(b"".join([head, *buffers]), 200, BINARY, [(_HEADER_SIZE, b"%d" % len(head))])


def _read(request: Request, model: dict[str, Any]) -> InferRequest:
    size = request.headers.get(_HEADER_SIZE)
    if size is None:
        return read_body(request.body)
    if not size.isdigit() or len(size) > 12:
        raise InputError(
            f"Inference-Header-Content-Length '{size.decode(errors='replace')}' is no size",
            hint="give the number of bytes of the JSON that begins the body",
        )
    return read_body(request.body, int(size)) if int(size) else read_raw(request.body, model["inputs"])


def _call_off(task: asyncio.Task[None]) -> None:
    task.cancel()


def _failed(error: Exception) -> Response:
    if not isinstance(error, MillhandError):
        log.exception("a request failed", exc_info=error)
    return error_response(error)
