"""ModelInfer, the method that must be fast: from the call's message to its answer without a task in between.

The request goes to the worker, and the answer is written out by the callback that the client of the worker makes. Only
what needs waiting takes the other way, through a task: a worker that is not connected yet, and a version that has
just moved.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from millhand.errors import ModelError
from millhand.serving import protocol
from millhand.serving.exchange import deadline_ns
from millhand.serving.grpc import wire
from millhand.serving.grpc.plans import Plans
from millhand.serving.grpc.requests import InferCall, read_request, write_response
from millhand.serving.grpc.rpc import Call, CallOff
from millhand.serving.routing import Routes


class InferMethod:
    """Answers ModelInfer; `infer` serves the requests of streams too."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._plans = Plans()

    def start(self, call: Call, message: bytes) -> CallOff:
        """Begin; `call` is answered, now or later, unless what is returned is called: the client has left.

        Raises MillhandError for a request that cannot begin.
        """
        plan = self._plans.find(message)
        if plan is None:
            request = read_request(message)
            self._plans.keep(message, request)
        else:
            request = plan.call
        call.asks_for(request.model)
        self._routes.model(request.model, request.version)
        deadline = self._deadline(call, request)
        reached = self._routes.reached(request.model, request.version)
        if reached is None:
            return call.answer_later(self._answer_slowly, call, message, deadline)
        client, version = reached
        slot = client.lease()
        try:
            if plan is None:
                tensors, payload, size = protocol.place(request.tensors, client.slot(slot))
                inline = size >= 0
            else:
                tensors = plan.tensors
                payload, inline = plan.place(message, client.slot(slot))
            infer = protocol.Infer(request.model, version, request.priority, inline, tensors, request.wanted)
            waiting = _Waiting(self, call, message, request, deadline, plan is not None)
            number = client.submit(infer, deadline, slot, payload, waiting.done)
        except BaseException:
            client.release(slot)
            raise
        return functools.partial(client.cancel, number)

    async def infer(self, call: Call, request: InferCall, deadline: int = 0) -> wire.ModelInferResponse:
        """By the way that can wait for a connection or for the daemon's word. Errors as `Routes.infer`."""
        sent_ns = time.time_ns()
        call.asks_for(request.model)
        answer = await self._routes.infer(
            request.model,
            request.version,
            request.tensors,
            deadline=deadline or self._deadline(call, request),
            priority=request.priority,
            wanted=request.wanted,
        )
        call.note(request.model, answer, sent_ns)
        return write_response(request, answer.version, answer.outputs, self._labels(request))

    def respond(self, waiting: _Waiting, result: protocol.Result, memory: memoryview) -> bytes:
        """The response around a worker's answer. Raises InputError."""
        if waiting.planned:
            return self._plans.answer(waiting.request, result, memory)
        request = waiting.request
        outputs = protocol.fetch(result.tensors, memory)
        return write_response(request, result.version, outputs, self._labels(request)).SerializeToString()

    def start_again(self, waiting: _Waiting) -> None:
        """The version has moved: ask where to."""
        waiting.call.answer_later(self._answer_slowly, waiting.call, waiting.message, waiting.deadline)

    async def _answer_slowly(self, call: Call, message: bytes, deadline: int) -> bytes:
        return (await self.infer(call, read_request(message), deadline)).SerializeToString()

    def _deadline(self, call: Call, request: InferCall) -> int:
        """CLOCK_MONOTONIC: the call's own or the request's, whichever is first; else the configuration's."""
        if request.budget_ms is None:
            return call.deadline_ns or deadline_ns(self._routes.deadline_ms)
        wanted = deadline_ns(request.budget_ms)
        return min(wanted, call.deadline_ns) if call.deadline_ns else wanted

    def _labels(self, request: InferCall) -> Mapping[str, Sequence[str]]:
        labels: Mapping[str, Sequence[str]] = self._routes.model(request.model)["labels"]
        return labels


class _Waiting:
    """A call whose request is at the worker."""

    __slots__ = ("_method", "_sent_ns", "call", "deadline", "message", "planned", "request")

    def __init__(
        self, method: InferMethod, call: Call, message: bytes, request: InferCall, deadline: int, planned: bool
    ) -> None:
        self._method = method
        self._sent_ns = time.time_ns()
        self.call = call
        self.message = message
        self.request = request
        self.deadline = deadline
        self.planned = planned

    def done(self, outcome: Any) -> None:
        """Take the worker's answer; its memory is valid during this call alone."""
        call = self.call
        try:
            if isinstance(outcome, tuple):
                result, memory = outcome
                call.note(self.request.model, result, self._sent_ns)
                call.reply(self._method.respond(self, result, memory))
            elif isinstance(outcome, ModelError) and outcome.retriable:
                self._method.start_again(self)
            else:
                call.fail(outcome)
        except Exception as error:
            call.fail(error)
