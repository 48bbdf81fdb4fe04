"""What the gRPC tests share: a client of grpcio with generic stubs, and requests."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import numpy as np

from millhand.serving.grpc import wire
from millhand.serving.tensors import DATATYPE_OF

SERVICE = "inference.GRPCInferenceService"
RESPONSES = {
    "ServerLive": wire.ServerLiveResponse,
    "ServerReady": wire.ServerReadyResponse,
    "ServerMetadata": wire.ServerMetadataResponse,
    "ModelReady": wire.ModelReadyResponse,
    "ModelMetadata": wire.ModelMetadataResponse,
    "ModelConfig": wire.ModelConfigResponse,
    "ModelStatistics": wire.ModelStatisticsResponse,
    "ModelInfer": wire.ModelInferResponse,
    "ModelStreamInfer": wire.ModelStreamInferResponse,
    "RepositoryIndex": wire.RepositoryIndexResponse,
    "RepositoryModelLoad": wire.RepositoryModelRequest,
    "RepositoryModelUnload": wire.RepositoryModelRequest,
}


class Client:
    """One channel. Every call takes what grpc.aio's take: `timeout`, `metadata`, `compression`."""

    def __init__(self, address: str, **options: Any) -> None:
        arguments = [("grpc.use_local_subchannel_pool", 1), *options.items()]
        self.channel = grpc.aio.insecure_channel(address, options=arguments)

    def call(self, name: str, request: Any = b"", service: str = SERVICE, **arguments: Any) -> Any:
        """Await it for the response; raises grpc.aio.AioRpcError."""
        read = RESPONSES[name].FromString if name in RESPONSES else None
        method = self.channel.unary_unary(f"/{service}/{name}", _write, read)
        return method(request, **arguments)

    def stream(self, requests: Any = None, name: str = "ModelStreamInfer", **arguments: Any) -> Any:
        """The call of a stream: iterate over it, or use its read and write."""
        read = RESPONSES[name].FromString if name in RESPONSES else None
        return self.channel.stream_stream(f"/{SERVICE}/{name}", _write, read)(requests, **arguments)

    async def infer(self, model: str, tensors: Any, **arguments: Any) -> dict[str, Any]:
        """The outputs by name."""
        return outputs(await self.call("ModelInfer", infer_request(model, tensors), **arguments))

    async def close(self) -> None:
        await self.channel.close()


def _write(request: Any) -> bytes:
    data: bytes = request if isinstance(request, bytes) else request.SerializeToString()
    return data


def infer_request(model: str, tensors: Any, **fields: Any) -> Any:
    """A ModelInferRequest with raw tensors; an array of objects becomes BYTES."""
    request = wire.ModelInferRequest(model_name=model, **fields)
    for name, array in tensors.items():
        request.inputs.add(name=name, datatype=DATATYPE_OF[array.dtype.name], shape=array.shape)
        raw = array.tobytes()
        if array.dtype == object:
            raw = b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel())
        request.raw_input_contents.append(raw)
    return request


def outputs(response: Any) -> dict[str, Any]:
    """The arrays of a ModelInferResponse."""
    arrays = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            arrays[output.name] = raw
        else:
            dtype = {value: key for key, value in DATATYPE_OF.items()}[output.datatype]
            arrays[output.name] = np.frombuffer(raw, dtype).reshape(tuple(output.shape))
    return arrays


def info_of(error: grpc.aio.AioRpcError) -> Any:
    """The ErrorInfo beside an error, checked to say the same as the error itself."""
    metadata = dict(error.trailing_metadata())
    status = wire.Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    (detail,) = status.details
    assert detail.type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    return wire.ErrorInfo.FromString(detail.value)
