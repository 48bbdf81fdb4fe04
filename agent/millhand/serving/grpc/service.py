"""The methods of `inference.GRPCInferenceService` and `grpc.health.v1.Health`, but for the repository's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from millhand import __version__
from millhand.errors import DeadlineError, InputError, MillhandError
from millhand.serving.grpc import wire
from millhand.serving.grpc.infer import InferMethod
from millhand.serving.grpc.requests import read_request
from millhand.serving.grpc.rpc import Call, Method, Unary
from millhand.serving.grpc.status import Code, Refusal, text_of
from millhand.serving.routing import Routes, UnknownModel, control_call

log = logging.getLogger("millhand.grpc")

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
EXTENSIONS = ("model_configuration", "model_repository", "schedule_policy", "statistics")
STREAM_CALLS_CAP = 32
"""Requests of one stream that run at once; the next ones wait in the client."""
CONTROL_S = 10.0
SERVING, NOT_SERVING = 1, 2
NOT_SERVED = {
    "SystemSharedMemoryStatus": "send tensors in the request",
    "SystemSharedMemoryRegister": "send tensors in the request",
    "SystemSharedMemoryUnregister": "send tensors in the request",
    "CudaSharedMemoryStatus": "send tensors in the request",
    "CudaSharedMemoryRegister": "send tensors in the request",
    "CudaSharedMemoryUnregister": "send tensors in the request",
    "TraceSetting": "send a traceparent with a request",
    "LogSettings": "set [log] in the configuration",
}

Request = TypeVar("Request", bound=Message)


class InferenceService:
    """Answers from one `Routes` and the daemon's control socket."""

    def __init__(self, routes: Routes, control_path: Path) -> None:
        self._routes = routes
        self._control_path = control_path
        self._infer = InferMethod(routes)

    def methods(self) -> Iterable[Method]:
        """Everything but the repository's methods."""
        unary: dict[str, Unary] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._server,
            "ModelReady": reading(wire.ModelRequest, self._model_ready),
            "ModelMetadata": reading(wire.ModelRequest, self._model_metadata),
            "ModelConfig": reading(wire.ModelRequest, self._model_config),
            "ModelStatistics": reading(wire.ModelRequest, self._model_statistics),
        }
        yield from (Method(SERVICE, name, unary=handler) for name, handler in unary.items())
        yield Method(SERVICE, "ModelInfer", starting=self._infer.start)
        yield Method(SERVICE, "ModelStreamInfer", streaming=self._stream_infer)
        yield from (Method(SERVICE, name, unary=_refusing(name, remedy)) for name, remedy in NOT_SERVED.items())
        yield Method(HEALTH, "Check", unary=reading(wire.HealthCheckRequest, self._health))

    # ---- inference --------------------------------------------------------------------------------------------------

    async def _stream_infer(self, call: Call) -> None:
        """Requests run as they come, answers keep their order; one request's error is its own answer."""
        running: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(STREAM_CALLS_CAP)
        async with asyncio.TaskGroup() as group:
            group.create_task(_write_in_order(call, running))
            async for message in call.messages():
                await running.put(group.create_task(self._infer_streamed(call, message)))
            await running.put(None)

    async def _infer_streamed(self, call: Call, message: bytes) -> bytes:
        try:
            request = read_request(message)
        except InputError as error:
            return wire.ModelStreamInferResponse(error_message=text_of(error)).SerializeToString()
        try:
            response = wire.ModelStreamInferResponse(infer_response=await self._infer.infer(call, request))
        except Exception as error:
            if not isinstance(error, MillhandError):
                log.exception("a request of a stream failed")
            response = wire.ModelStreamInferResponse(error_message=text_of(error))
            response.infer_response.id = request.id
        return response.SerializeToString()

    # ---- server and models ------------------------------------------------------------------------------------------

    async def _live(self, call: Call, message: bytes) -> bytes:
        return wire.ServerLiveResponse(live=True).SerializeToString()

    async def _ready(self, call: Call, message: bytes) -> bytes:
        return wire.ServerReadyResponse(ready=self._routes.ready()).SerializeToString()

    async def _server(self, call: Call, message: bytes) -> bytes:
        response = wire.ServerMetadataResponse(name="millhand", version=__version__, extensions=EXTENSIONS)
        return response.SerializeToString()

    async def _model_ready(self, call: Call, request: wire.ModelRequest) -> Message:
        try:
            ready = bool(self._routes.model(request.name, request.version)["sockets"])
        except UnknownModel:
            ready = False
        return wire.ModelReadyResponse(ready=ready)

    async def _model_metadata(self, call: Call, request: wire.ModelRequest) -> Message:
        model = self._routes.model(request.name, request.version)
        response = wire.ModelMetadataResponse(
            name=request.name, versions=sorted(model["sockets"], key=int), platform=model["backend"]
        )
        for tensors, field in ((model["inputs"], response.inputs), (model["outputs"], response.outputs)):
            for tensor in tensors:
                field.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
        return response

    async def _model_config(self, call: Call, request: wire.ModelRequest) -> Message:
        self._routes.model(request.name, request.version)
        model = await control(call, self._control_path, "model.show", model=request.name)
        response = wire.ModelConfigResponse()
        config = response.config
        config.name = request.name
        config.platform = config.backend = model["backend"]
        config.max_batch_size = model["max_batch"]
        config.dynamic_batching.max_queue_delay_microseconds = model["max_delay_us"]
        for tensors, field in ((model["inputs"], config.input), (model["outputs"], config.output)):
            for tensor in tensors:
                datatype = "STRING" if tensor["datatype"] == "BYTES" else tensor["datatype"]
                field.add(name=tensor["name"], data_type=wire.DATA_TYPE[datatype], dims=tensor["shape"][1:])
        return response

    async def _model_statistics(self, call: Call, request: wire.ModelRequest) -> Message:
        if request.name:
            self._routes.model(request.name, request.version)
        stats = await control(call, self._control_path, "model.stats")
        response = wire.ModelStatisticsResponse()
        for counts in stats["models"]:
            if request.name in ("", counts["model"]) and request.version in ("", str(counts["version"])):
                _add_statistics(response, counts)
        return response

    async def _health(self, call: Call, request: wire.HealthCheckRequest) -> Message:
        if request.service not in ("", SERVICE):
            raise Refusal(Code.NOT_FOUND, f"service '{request.service}' is not known", hint=f"ask for {SERVICE}")
        return wire.HealthCheckResponse(status=SERVING if self._routes.ready() else NOT_SERVING)


def reading(kind: type[Request], handler: Callable[[Call, Request], Awaitable[Message]]) -> Unary:
    """A handler of messages as one of bytes."""

    async def read(call: Call, message: bytes) -> bytes:
        try:
            request = kind.FromString(message)
        except DecodeError as error:
            raise InputError(f"the message is no request of {call.head.method.name}", hint="mend the client") from error
        return (await handler(call, request)).SerializeToString()

    return read


async def control(call: Call, path: Path, name: str, **arguments: Any) -> Any:
    """A call of the control socket within the gRPC call's deadline."""
    left_ms = call.remaining_ms
    try:
        async with asyncio.timeout(CONTROL_S if left_ms is None else left_ms / 1000):
            return await control_call(path, name, **arguments)
    except TimeoutError as error:
        raise DeadlineError(f"the daemon did not answer '{name}' in time", hint="look at its log") from error


async def _write_in_order(call: Call, running: asyncio.Queue[asyncio.Task[bytes] | None]) -> None:
    while (task := await running.get()) is not None:
        await call.write(await task)


def _refusing(name: str, remedy: str) -> Unary:
    async def refuse(call: Call, message: bytes) -> bytes:
        raise Refusal(Code.UNIMPLEMENTED, f"{name} is not served", hint=remedy)

    return refuse


def _add_statistics(response: wire.ModelStatisticsResponse, counts: dict[str, Any]) -> None:
    """Times of inference are summed over batches, as the worker counts them, not over requests."""
    entry = response.model_stats.add(
        name=counts["model"],
        version=str(counts["version"]),
        inference_count=counts["rows"],
        execution_count=counts["batches"],
    )
    total = entry.inference_stats
    total.success.count = total.queue.count = total.compute_infer.count = counts["success"]
    total.success.ns = counts["queue_ns"] + counts["compute_ns"]
    total.queue.ns, total.compute_infer.ns = counts["queue_ns"], counts["compute_ns"]
    total.fail.count = counts["failed"] + counts["expired"] + counts["rejected"]
    for size, count in counts["batch_rows"].items():
        entry.batch_stats.add(batch_size=int(size)).compute_infer.count = count
