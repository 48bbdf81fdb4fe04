"""The endpoint that must be fast: an inference from the request's body to the response without a task in between.

The tensors go from the body into a slot of the worker's ring, the request to the worker, and the worker's answer is
written out by the callback that the client of the worker makes. Only what needs waiting takes the other way, through
a task: a worker that is not connected yet, and a version that has just moved.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from numpy.typing import NDArray

from millhand.errors import InputError, MillhandError, ModelError
from millhand.serving import protocol
from millhand.serving.answer import write_response
from millhand.serving.client import WorkerClient, deadline_ns
from millhand.serving.http.messages import BINARY, JSON, Inference, Request, Response, error_response
from millhand.serving.inference import InferRequest, read_body, read_raw
from millhand.serving.routing import Routes
from millhand.serving.tensors import dtype_name

log = logging.getLogger("millhand.http")

_encode = msgspec.json.Encoder().encode
_HEADER_SIZE = b"inference-header-content-length"

KEPT_CAP = 256
KEPT_HEADER_BYTES_CAP = 1024

Reply = Callable[[Response], None]


class InferEndpoint:
    """Answers POST .../infer."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._plans: dict[bytes, BinaryPlan] = {}
        self._answers: dict[tuple[Any, ...], bytes] = {}

    def start(self, request: Request, name: str, version: str, reply: Reply) -> Callable[[], None]:
        """Begin; `reply` is called once, now or later, unless what is returned is called: the client has left.

        Raises MillhandError for a request that cannot begin.
        """
        model = self._routes.model(name, version)
        body, header_bytes = request.body, _header_bytes(request)
        plan = self._plan(body, header_bytes) if header_bytes else None
        wanted = _read(body, header_bytes, model) if plan is None else plan.request
        if header_bytes and plan is None:
            self._keep_plan(bytes(body[:header_bytes]), wanted, len(body) - header_bytes)
        deadline = deadline_ns(wanted.deadline_ms or self._routes.deadline_ms)
        call = _Call(self, name, version, wanted, model["labels"], plan, body, header_bytes, deadline, reply)
        reached = self._routes.reached(name, version)
        return call.start_slowly() if reached is None else call.start(*reached)

    def respond(self, call: _Call, result: protocol.Result, memory: memoryview) -> Response:
        """The response around a worker's answer. Raises InputError."""
        if call.plan is None or not call.plan.same_answer:
            return self.write(call, result.version, protocol.fetch(result.tensors, memory))
        # The JSON before binary data is the same for the same shapes; the data are in the slot as they go out.
        key = (call.name, result.version, result.tensors)
        head = self._answers.get(key)
        if head is None:
            outputs = protocol.fetch(result.tensors, memory)
            head = _encode(write_response(call.name, result.version, call.wanted, outputs)[0])
            if len(self._answers) >= KEPT_CAP:
                self._answers.clear()
            self._answers[key] = head
        parts = [memory[tensor.offset : tensor.offset + tensor.size] for tensor in result.tensors]
        return Response(b"".join([head, *parts]), 200, BINARY, [(_HEADER_SIZE, b"%d" % len(head))])

    def write(self, call: _Call, version: int, outputs: dict[str, Any]) -> Response:
        """The same for outputs as arrays."""
        data, buffers = write_response(call.name, version, call.wanted, outputs, call.labels)
        head = _encode(data)
        if not buffers:
            return Response(head, 200, JSON)
        return Response(b"".join([head, *buffers]), 200, BINARY, [(_HEADER_SIZE, b"%d" % len(head))])

    async def infer(self, call: _Call) -> Response:
        """By the way that can wait for a connection or for the daemon's word."""
        sent_ns = time.monotonic_ns()
        answer = await self._routes.infer(
            call.name,
            call.version,
            call.tensors(),
            deadline=call.deadline,
            priority=call.wanted.priority,
            wanted=call.wanted.wanted,
        )
        response = self.write(call, answer.version, answer.outputs)
        response.inference = Inference(call.name, answer.version, sent_ns, answer.queue_ns, answer.compute_ns)
        return response

    def _plan(self, body: bytes | memoryview, header_bytes: int) -> BinaryPlan | None:
        plan = self._plans.get(bytes(body[:header_bytes]))
        return plan if plan is not None and len(body) - header_bytes == plan.size else None

    def _keep_plan(self, header: bytes, wanted: InferRequest, size: int) -> None:
        """A client sends the same JSON before its data again and again: what it means is kept, by its bytes."""
        plan = BinaryPlan.of(wanted, size) if len(header) <= KEPT_HEADER_BYTES_CAP else None
        if plan is not None:
            if len(self._plans) >= KEPT_CAP:
                self._plans.clear()
            self._plans[header] = plan


class BinaryPlan(msgspec.Struct, frozen=True):
    """What the JSON before binary data asks for, whatever the data are."""

    request: InferRequest
    """Without tensors."""
    tensors: tuple[protocol.Tensor, ...]
    """Where they lie in the data."""
    size: int
    """Bytes of the data."""
    wanted: tuple[str, ...]
    same_answer: bool
    """Whether the JSON of the answer depends on its shapes alone."""

    @classmethod
    def of(cls, request: InferRequest, size: int) -> BinaryPlan | None:
        """`size`: bytes of the data. None where something hangs on them, or where the JSON will hardly come again."""
        if request.id or not request.tensors:
            return None
        tensors, position = [], 0
        for name, array in request.tensors.items():
            if array.dtype.kind in "Ob":  # values that must be looked at
                return None
            tensors.append(protocol.Tensor(name, dtype_name(array.dtype), array.shape, position, array.nbytes))
            position += array.nbytes
        if position != size:  # some came as JSON
            return None
        bare = msgspec.structs.replace(request, tensors={})
        same = request.all_binary and len(request.wanted) == len(request.outputs)
        return cls(bare, tuple(tensors), position, request.wanted, same)


class _Call:
    """One request under way."""

    __slots__ = (
        "_body",
        "_endpoint",
        "_header_bytes",
        "_reply",
        "_sent_ns",
        "_task",
        "deadline",
        "labels",
        "name",
        "plan",
        "version",
        "wanted",
    )

    def __init__(
        self,
        endpoint: InferEndpoint,
        name: str,
        version: str,
        wanted: InferRequest,
        labels: Mapping[str, Sequence[str]],
        plan: BinaryPlan | None,
        body: bytes | memoryview,
        header_bytes: int | None,
        deadline: int,
        reply: Reply,
    ) -> None:
        self._endpoint = endpoint
        self.name = name
        self.version = version
        self.wanted = wanted
        self.labels = labels
        self.plan = plan
        self.deadline = deadline
        self._body = body
        self._header_bytes = header_bytes
        self._reply = reply
        self._sent_ns = time.monotonic_ns()
        self._task: asyncio.Task[None] | None = None

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The inputs as arrays."""
        return self.wanted.tensors if self.plan is None else read_body(self._body, self._header_bytes).tensors

    def start(self, client: WorkerClient, version: int) -> Callable[[], None]:
        """Send it to a connected worker."""
        slot = client.lease()
        try:
            if self.plan is None:
                placed, payload, size = protocol.place(self.wanted.tensors, client.slot(slot))
                inline, wanted = size >= 0, self.wanted.wanted
            else:
                placed, wanted, size = self.plan.tensors, self.plan.wanted, self.plan.size
                payload, inline = [], not protocol.INLINE_BYTES < size <= client.slot_bytes(slot)
                data = memoryview(self._body)[self._header_bytes :]
                if inline:
                    payload = [data]
                else:
                    client.slot(slot)[:size] = data  # type: ignore[index]
            infer = protocol.Infer(self.name, version, self.wanted.priority, inline, placed, wanted)
            number = client.submit(infer, self.deadline, slot, payload, self._done)
        except BaseException:
            client.release(slot)
            raise
        return functools.partial(self._cancel, client, number)

    def start_slowly(self) -> Callable[[], None]:
        """Send it through a task."""
        self._task = asyncio.create_task(self._infer_slowly())
        return functools.partial(self._cancel, None, 0)

    def _cancel(self, client: WorkerClient | None, number: int) -> None:
        if client is not None:
            client.cancel(number)
        if self._task is not None:
            self._task.cancel()

    def _done(self, outcome: Any) -> None:
        """The worker's answer; its memory is valid during this call alone."""
        try:
            if isinstance(outcome, tuple):
                result, memory = outcome
                response = self._endpoint.respond(self, result, memory)
                response.inference = Inference(
                    self.name, result.version, self._sent_ns, result.queue_ns, result.compute_ns
                )
            elif isinstance(outcome, ModelError) and outcome.retriable:  # the version has moved: ask where to
                self.start_slowly()
                return
            else:
                response = error_response(outcome)
        except Exception as error:
            response = _failed(error)
        self._reply(response)

    async def _infer_slowly(self) -> None:
        try:
            response = await self._endpoint.infer(self)
        except Exception as error:
            response = _failed(error)
        self._reply(response)


def _header_bytes(request: Request) -> int | None:
    """The size of the JSON that begins the body; None where the body is JSON alone. Raises InputError."""
    size = request.head.headers.get(_HEADER_SIZE)
    if size is None:
        return None
    if not size.isdigit() or len(size) > 12:
        raise InputError(
            f"Inference-Header-Content-Length '{size.decode(errors='replace')}' is no size",
            hint="give the number of bytes of the JSON that begins the body",
        )
    return int(size)


def _read(body: bytes | memoryview, header_bytes: int | None, model: dict[str, Any]) -> InferRequest:
    return read_raw(body, model["inputs"]) if header_bytes == 0 else read_body(body, header_bytes)


def _failed(error: Exception) -> Response:
    if not isinstance(error, MillhandError):
        log.exception("a request failed", exc_info=error)
    return error_response(error)
